"""Job files: each wrong thing is told with its file, line, field, and what was expected."""

import pytest

from dantegpu.cli.jobfile import FileProblem, JobFileInvalid, parse
from dantegpu.contracts.rest.spec import JobSpec


def problems_of(text: str, environ: dict[str, str] | None = None) -> list[FileProblem]:
    with pytest.raises(JobFileInvalid) as caught:
        parse(text, "job.yaml", environ or {})
    return caught.value.problems


def only_problem(text: str, environ: dict[str, str] | None = None) -> FileProblem:
    problems = problems_of(text, environ)
    assert len(problems) == 1, problems
    return problems[0]


def the_job(text: str, environ: dict[str, str] | None = None) -> JobSpec:
    specs = parse(text, "job.yaml", environ or {})
    assert len(specs) == 1
    return specs[0]


def test_a_good_file_becomes_a_spec():
    spec = the_job("name: train\ncommands:\n  - python train.py\nresources: {gpu: rtx4090:2, memory: 16GB}\n")
    assert (spec.name, spec.commands, spec.resources.gpu) == ("train", ["python train.py"], "RTX 4090:2")


def test_an_unknown_field_is_told_with_its_line_and_the_nearest_known_name():
    problem = only_problem("name: train\ncomands: [python train.py]\ncommands: [x]\n")
    assert (problem.line, problem.field, problem.nearest) == (2, "comands", "commands")
    assert str(problem).startswith("job.yaml:2: comands: unknown field; did you mean 'commands'?")


def test_an_unknown_field_inside_another_is_told_with_its_own_line():
    problem = only_problem("commands: [x]\nresources:\n  cpu: 2\n  gpuu: H100\n")
    assert (problem.line, problem.column, problem.field, problem.nearest) == (4, 3, "resources.gpuu", "gpu")


def test_a_field_that_is_not_supported_yet_is_refused_by_name_and_not_ignored():
    problem = only_problem("commands: [x]\nvolumes: []\n")
    assert problem.line == 2
    assert "'volumes' is not supported yet" in problem.message


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ("resources: {gpu: 'A100:40GB..:x'}", "resources.gpu", ""),
        ("resources: {cpu: many}", "resources.cpu", "a number of cores"),
        ("resources: {memory: 16 apples}", "resources.memory", "a size"),
        ("max_price: cheap", "max_price", "$dGPU"),
        ("max_duration: 5 parsecs", "max_duration", "a duration"),
        ("priority: 101", "priority", ""),
        ("env: {A B: c}", "env", "letters, digits and _"),
        ("env: {A: [1]}", "env", "a text"),
        ("name: 2024", "name", ""),
        ("array: many", "array", "a number of tasks"),
        ("deadline: '2026-12-01T18:00:00'", "deadline", "with its zone"),
        ("deadline: soon", "deadline", "a duration"),
        ("after: [job_x]", "after.0", "job_..."),
        ("schedule: {cron: daily}", "schedule.cron", "five fields"),
        ("schedule: {cron: 0 0 * * *, timezone: Mars}", "schedule.timezone", ""),
        ("array: 10000000", "array", ""),
        ("array: {lr: [[1]]}", "array", ""),
        ("type: service", "type", "task"),
        ("files: [/etc]", "files", ".:/work"),
        ("retry: {on_events: [moon]}", "retry.on_events.0", ""),
        ("labels: {'': x}", "labels", ""),
    ],
)
def test_a_wrong_value_is_told_with_its_line_and_what_was_expected(line: str, field: str, expected: str):
    problem = only_problem(f"# a job\ncommands: [x]\n{line}\n")
    assert (problem.line, problem.field) == (3, field)
    assert expected in (problem.expected or "")
    assert "Value error" not in problem.message


def test_an_alias_is_found_at_its_own_line():
    problem = only_problem("run: [x]\nresources:\n  accelerators: ['?']\n")
    assert (problem.line, problem.field) == (3, "resources.gpu")


def test_all_problems_are_told_at_once_in_the_order_of_the_file():
    problems = problems_of("comands: [x]\nenv: [MISSING]\npriority: -1\nvolumes: []\n")
    assert [problem.line for problem in problems] == [1, 2, 3, 4]


def test_a_job_that_runs_nothing_is_told():
    problem = only_problem("name: idle\n")
    assert problem.line == 1
    assert "nothing to run" in problem.message


def test_a_field_that_comes_twice_is_told_with_both_lines():
    problem = only_problem("commands: [x]\nname: a\nname: b\n")
    assert (problem.line, problem.message) == (3, "this field comes twice, first in line 2")


def test_a_bare_env_name_takes_the_shells_value():
    assert the_job("commands: [x]\nenv: [HF_TOKEN, LR=0.1]\n", {"HF_TOKEN": "s3cret"}).env == {
        "HF_TOKEN": "s3cret",
        "LR": "0.1",
    }


def test_a_bare_env_name_that_the_shell_lacks_is_told_at_its_line_with_the_nearest_name():
    problem = only_problem("commands: [x]\nenv:\n  - LR=0.1\n  - HF_TOKN\n", {"HF_TOKEN": "s3cret"})
    assert (problem.line, problem.field) == (4, "env.1")
    assert "did you mean 'HF_TOKEN'?" in problem.message
    assert "s3cret" not in str(problem)


def test_broken_yaml_is_told_with_its_line():
    problem = only_problem("commands:\n  - x\n name: y\n")
    assert problem.line == 3
    assert "not valid YAML" in problem.message


def test_tabs_are_named():
    assert "tabs" in only_problem("resources:\n\tcpu: 1\n").message


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n"])
def test_an_empty_file_is_told(text: str):
    assert "empty" in only_problem(text).message


@pytest.mark.parametrize(("text", "line"), [("- a\n- b\n", 1), ("\n\njust text\n", 3), ("42\n", 1)])
def test_a_file_that_is_no_job_is_told(text: str, line: int):
    problem = only_problem(text)
    assert (problem.line, problem.message) == (line, "this is not a job")


def test_several_documents_are_several_jobs_and_errors_name_the_line_in_the_file():
    specs = parse("commands: [a]\n---\ncommands: [b]\n", "jobs.yaml", {})
    assert [spec.commands for spec in specs] == [["a"], ["b"]]
    assert only_problem("commands: [a]\n---\ncommands: [b]\npriority: x\n").line == 4


def test_a_file_that_nests_too_deeply_is_an_error_and_no_crash():
    assert "not valid YAML" in only_problem("commands: " + "[" * 5000).message


def test_a_file_of_aliases_that_would_explode_is_an_error_and_no_crash():
    lines = ["commands: [x]", "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 9) + "]" for level in range(1, 30)]
    problems = problems_of("\n".join(lines))
    assert problems[0].field == "a0"


def test_objects_of_pythons_own_are_refused():
    assert "cannot be read" in only_problem("commands: [!!python/object/apply:os.system [id]]\n").message


def test_a_file_that_is_too_large_is_refused():
    assert "larger than" in only_problem("# " + "x" * (1 << 20)).message

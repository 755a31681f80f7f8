"""The command table, errors as exit codes, and that starting is cheap."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from pydantic import ValidationError

from dantegpu.cli.commands import COMMANDS
from dantegpu.cli.errors import CliError
from dantegpu.cli.framework import Entry, Group, LazyGroup, Table, build_cli, failure_of, merge, run, walk
from dantegpu.contracts.rest.base import Problem
from dantegpu.contracts.rest.spec import JobSpec
from dantegpu.sdk import ConnectionProblem, DanteError, NotFound, Unauthenticated, Unavailable

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("pydantic", "httpx", "rich", "yaml", "numpy", "grpc", "google.protobuf", "dantegpu.sdk._sync", "asyncio")


@click.command("echo")
@click.option("--json", "as_json", is_flag=True)
@click.argument("words", nargs=-1)
def echo(as_json: bool, words: tuple[str, ...]) -> int:
    """Fails as its words say."""
    match words:
        case ("cli-error",):
            raise CliError("no such thing", code="thing-not-found", exit_code=3, details=[{"text": "a.yaml:1: what"}])
        case ("interrupt",):
            raise KeyboardInterrupt
        case ("disk-full",):
            raise OSError(28, "No space left on device", "out.bin")
        case ("bug",):
            raise ZeroDivisionError
        case ("code", code):
            return int(code)
        case _:
            click.echo(" ".join(words) + (" as json" if as_json else ""))
            return 0


TABLE: Table = {
    "echo": Entry(f"{__name__}:echo", "Echo."),
    "group": Group("A group.", {"echo": Entry(f"{__name__}:echo", "Echo.")}, default="echo"),
    "missing": Entry("no_such_module:command", "Never imported by --help."),
}


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str, table: Table = TABLE) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line."""
    with pytest.raises(SystemExit) as ended:
        run(build_cli(table), arguments)
    told = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, told.out, told.err


def test_help_imports_no_command_and_nothing_heavy():
    probe = (
        "import sys\n"
        "from dantegpu.apps.main import PLATFORM_COMMANDS\n"
        "from dantegpu.cli.commands import COMMANDS\n"
        "from dantegpu.cli.framework import build_cli, merge\n"
        "try: build_cli(merge(COMMANDS, PLATFORM_COMMANDS)).main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_the_sdk_loads_none_of_its_parts():
    probe = "import dantegpu.sdk, sys; print('httpx' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False False"


@pytest.mark.parametrize(("name", "entry"), list(walk(COMMANDS)))
def test_every_command_of_the_table_exists_under_its_name_and_has_json(name: str, entry: Entry):
    context = click.Context(build_cli(COMMANDS))
    command: click.Command = context.command
    for part in name.split():
        assert isinstance(command, LazyGroup)
        found = command.get_command(context, part)
        assert found is not None
        command = found
    assert command.name == name.rsplit(maxsplit=1)[-1]
    assert command.help
    assert "--json" in [option for parameter in command.params for option in parameter.opts]


def test_every_command_is_described_for_programs():
    text = (REPOSITORY / "docs" / "json.md").read_text(encoding="utf-8")
    assert [name for name, _ in walk(COMMANDS) if f"| `dante {name}`" not in text] == []


def test_groups_of_two_tables_become_one():
    merged = merge(
        {"provider": Group("Machines.", {"a": Entry("m:a", "A")})}, {"provider": Group("", {"b": Entry("m:b", "B")})}
    )
    group = merged["provider"]
    assert isinstance(group, Group)
    assert (group.help, list(group.commands)) == ("Machines.", ["a", "b"])


def test_an_unknown_command_is_told_with_the_nearest_known_one(capsys: pytest.CaptureFixture[str]):
    status, out, err = outcome(capsys, "ehco")
    assert (status, out) == (2, "")
    assert "did you mean 'echo'?" in err


def test_a_group_without_a_word_runs_its_default(capsys: pytest.CaptureFixture[str]):
    assert outcome(capsys, "group", "--json") == (0, " as json\n", "")


def test_what_a_command_returns_is_the_exit_code(capsys: pytest.CaptureFixture[str]):
    assert outcome(capsys, "echo", "code", "7")[0] == 7


def test_an_expected_error_is_told_on_stderr_with_its_code(capsys: pytest.CaptureFixture[str]):
    assert outcome(capsys, "echo", "cli-error") == (3, "", "a.yaml:1: what\ndante: no such thing\n")


def test_with_json_an_error_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]):
    status, out, err = outcome(capsys, "echo", "--json", "cli-error")
    assert (status, err) == (3, "")
    assert json.loads(out) == {
        "error": {"code": "thing-not-found", "message": "no such thing", "details": [{"text": "a.yaml:1: what"}]}
    }


def test_wrong_options_are_one_object_too(capsys: pytest.CaptureFixture[str]):
    status, out, _ = outcome(capsys, "echo", "--json", "--nonsense")
    assert (status, json.loads(out)["error"]["code"]) == (2, "usage")


def test_the_json_of_a_jobs_own_command_is_not_ours(capsys: pytest.CaptureFixture[str]):
    status, out, err = outcome(capsys, "ehco", "--", "--json")
    assert (status, out) == (2, "")
    assert "did you mean" in err


def test_an_interruption_ends_with_130(capsys: pytest.CaptureFixture[str]):
    status, out, err = outcome(capsys, "echo", "interrupt")
    assert (status, out, err.strip()) == (130, "", "dante: interrupted")


def test_a_full_disk_is_told_with_the_file(capsys: pytest.CaptureFixture[str]):
    assert outcome(capsys, "echo", "disk-full") == (1, "", "dante: out.bin: No space left on device\n")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(build_cli(TABLE), ["echo", "bug"])


def a_problem(status: int, **fields: str) -> Problem:
    return Problem(type="t", code="some-code", title="T", status=status, detail="what happened", **fields)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (ConnectionProblem("http://x", "refused"), 5, "unreachable"),
        (Unauthenticated(a_problem(401)), 4, "some-code"),
        (NotFound(a_problem(404)), 3, "some-code"),
        (Unavailable(a_problem(503)), 5, "some-code"),
        (DanteError("odd"), 1, "error"),
    ],
)
def test_the_sdks_errors_have_exit_codes(error: Exception, exit_code: int, code: str):
    failure = failure_of(error)
    assert failure is not None
    assert (failure.exit_code, failure.code) == (exit_code, code)


def test_an_error_of_the_platform_names_its_request():
    failure = failure_of(Unavailable(a_problem(503, request_id="req_1")))
    assert failure is not None
    assert "req_1" in failure.message


def test_what_the_model_refuses_is_told_field_by_field():
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({"command": ["x"], "resources": {"gpu": "?"}})
    failure = failure_of(caught.value)
    assert failure is not None
    assert failure.exit_code == 2
    assert failure.details[0]["field"] == "resources.gpu"

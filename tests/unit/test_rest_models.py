"""The job file and the other bodies of the REST API."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dantegpu.contracts.rest.base import FieldProblem, field_problems
from dantegpu.contracts.rest.convert import SpecReader, spec_from_proto, spec_to_proto
from dantegpu.contracts.rest.spec import JobList, JobSpec, fill_env
from dantegpu.domain.ids import JobId


def a_document(**fields: Any) -> dict[str, Any]:
    return {"commands": ["python train.py"]} | fields


def problems_of(document: dict[str, Any]) -> dict[str, FieldProblem]:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(document)
    return {problem.field: problem for problem in field_problems(caught.value.errors())}


def test_a_job_file_in_the_words_of_the_peers_is_read_and_made_canonical():
    spec = JobSpec.model_validate(
        {
            "type": "task",
            "name": "train",
            "image": "ghcr.io/acme/train",
            "env": ["HF_TOKEN=abc", "LR=0.1"],
            "files": [".:/work"],
            "commands": ["pip install -r requirements.txt", "python train.py"],
            "resources": {
                "gpu": "A100:40GB..80GB:2",
                "cpu": "16..",
                "memory": "64GB..",
                "disk": "100GB",
                "shm_size": "16GB",
            },
            "max_price": 2.50,
            "max_duration": "8h",
            "retry": {"on_events": ["no-capacity", "interruption", "error"], "duration": "1h"},
            "priority": 50,
        }
    )
    assert spec.env == {"HF_TOKEN": "abc", "LR": "0.1"}
    assert spec.resources.model_dump() == {
        "gpu": "A100:40GB..80GB:2",
        "cpu": "16",
        "memory": "64GB",
        "disk": "100GB",
    } | {"shm_size": "16GB"}
    assert (spec.max_price, spec.max_duration) == ("2.50", "8h")


def test_a_spec_becomes_protobuf_with_milli_cores_bytes_seconds_and_micro_money():
    proto = spec_to_proto(
        JobSpec.model_validate(
            a_document(
                resources={"gpu": "rtx4090:2", "cpu": 0.5, "memory": "1.5GB"},
                max_price="2.5",
                max_duration="90m",
                retry=True,
                input={"sha256": "a" * 64, "size_bytes": 7},
            )
        )
    )
    assert proto.resources.gpu == "RTX 4090:2"
    assert (proto.resources.cpu_milli, proto.resources.memory_bytes) == (500, 3 << 29)
    assert (proto.max_price_udgpu_per_gpu_hour, proto.max_duration_seconds) == (2_500_000, 5400)
    assert list(proto.retry.on_events) == ["no-capacity", "interruption", "error"]
    assert (proto.input_sha256, proto.input_size_bytes) == ("a" * 64, 7)


def test_what_was_not_asked_for_stays_unset_in_protobuf():
    proto = spec_to_proto(JobSpec.model_validate(a_document()))
    assert not proto.HasField("retry")
    assert not proto.HasField("max_price_udgpu_per_gpu_hour")
    assert proto.resources.gpu == ""


specs: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"commands": st.lists(st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text), min_size=1)},
    optional={
        "env": st.dictionaries(
            st.from_regex(r"[A-Z_][A-Z0-9_]{0,9}", fullmatch=True), st.sampled_from(["", "a=b", "é"])
        ),
        "resources": st.fixed_dictionaries(
            {},
            optional={
                "gpu": st.sampled_from(["H100:8", "24GB", "0.5", "A100,H100:40GB..80GB:2", None]),
                "cpu": st.decimals("0.001", "4096", places=3).map(str),
                "memory": st.integers(1 << 20, 1 << 45).map(lambda size: f"{size}B"),
            },
        ),
        "max_price": st.decimals(0, 1000, places=6).map(str),
        "max_duration": st.integers(1, 10**6),
        "retry": st.sampled_from([True, False, {"on_events": ["error"], "duration": "5m"}]),
        "priority": st.integers(0, 100),
        "network": st.booleans(),
        "nodes": st.integers(1, 64),
        "array": st.sampled_from([3, {"lr": [0.1, "a"], "seed": "-1..9"}]),
        "after": st.sampled_from([[], [str(JobId.new())]]),
        "deadline": st.sampled_from([None, "8h", "2026-12-01T18:00:00+02:00"]),
        "schedule": st.sampled_from([None, {"cron": "15 23 * * 1-5"}, {"cron": "0 0 1 1 *", "timezone": "Asia/Tokyo"}]),
        "labels": st.dictionaries(st.sampled_from(["a", "b/c"]), st.text(max_size=5)),
    },
)


@given(specs)
def test_a_spec_survives_json_and_protobuf_unchanged(document: dict[str, Any]):
    spec = JobSpec.model_validate(document)
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec_from_proto(spec_to_proto(spec)).model_dump() == spec.model_dump()


def test_an_unknown_field_is_named_with_its_path_and_the_nearest_known_one():
    problems = problems_of(a_document(resorces={}, resources={"gpus_": 1, "memori": "1GB"}, priority=101))
    assert problems["resorces"].nearest == "resources"
    assert problems["resources.memori"].nearest == "memory"
    assert problems["priority"].message.endswith("less than or equal to 100")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("volumes", []), ("budget", 25), ("regions", ["eu"]), ("python", "3.12"),
        ("files", ["data:/data"]), ("type", "service"), ("type", "dev-environment"),
    ],
)  # fmt: skip
def test_a_field_of_the_peers_that_does_not_work_yet_is_refused_by_name(field: str, value: Any):
    assert "not supported yet" in problems_of(a_document(**{field: value}))[field].message


@pytest.mark.parametrize(
    ("field", "checkpoint"),
    [
        ("checkpoint.path", {"path": "/work"}), ("checkpoint.path", {"path": "/etc/x"}),
        ("checkpoint.path", {"path": "a/../../b"}), ("checkpoint.signal", {"path": "c", "signal": "SIGKILL"}),
        ("checkpoint.grace", {"path": "c", "grace": "6m"}), ("checkpoint.interval", {"path": "c", "interval": "1s"}),
    ],
)  # fmt: skip
def test_a_checkpoint_lies_below_work_and_its_times_are_bounded(field: str, checkpoint: dict[str, str]):
    assert "expected" in problems_of(a_document(checkpoint=checkpoint))[field].message


def test_a_spot_job_and_its_checkpoint_come_back_as_they_were_sent_in_one_spelling():
    checkpoint = {"path": "ckpt//best.pt", "signal": "usr1", "interval": "90s"}
    spec = JobSpec.model_validate(a_document(spot_policy="auto", checkpoint=checkpoint))
    again = spec_from_proto(spec_to_proto(spec))
    assert again == spec
    assert again.checkpoint is not None
    assert (again.checkpoint.path, again.checkpoint.signal) == ("/work/ckpt/best.pt", "SIGUSR1")
    assert (again.checkpoint.grace, again.checkpoint.interval) == ("30s", "1m30s")
    assert spec_from_proto(spec_to_proto(JobSpec.model_validate(a_document()))).spot_policy == "on-demand"


def test_an_image_alone_runs_its_own_program_and_what_belongs_to_it_needs_it():
    assert JobSpec.model_validate({"image": "acme/train"}).command == []
    assert "registry_auth" in problems_of(a_document(registry_auth={"username": "u"}))[""].message
    assert "entrypoint" in problems_of(a_document(image="acme/train", entrypoint=["x"]))[""].message
    assert JobSpec.model_validate({"image": "acme/train", "entrypoint": "sh -c 'a b'"}).entrypoint == [
        "sh",
        "-c",
        "a b",
    ]
    assert "no name of an image" in problems_of(a_document(image="ghcr.io/Acme/train"))["image"].message
    assert "without '..'" in problems_of(a_document(working_dir="../x"))["working_dir"].message


def test_ports_are_written_as_docker_and_dstack_write_them_and_come_back_in_one_spelling():
    spec = JobSpec.model_validate(
        a_document(image="acme/serve", network=True, ports=[8080, "9000:9001", "*:80", "443/tcp"])
    )
    assert spec.ports == ["8080", "9000:9001", "80", "443"]
    proto = spec_to_proto(spec)
    assert [(port.number, port.wished) for port in proto.ports] == [(8080, 0), (9001, 9000), (80, 0), (443, 0)]
    assert spec_from_proto(proto) == spec


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        (["8000-8010"], "expected a port"), ([0], "from 1 to 65535"), (["1.2.3.4:80:80"], "expected a port"),
        (["53/udp"], "only TCP"), ([80, "9000:80"], "port 80 comes twice"), (["80:80"], "leave 80 out"),
        (["9000:80", "9000:81"], "9000 comes twice"), (list(range(1, 18)), "at most 16"), ([True], "expected a port"),
    ],
)  # fmt: skip
def test_ports_that_cannot_be_published_are_refused_with_what_would_be_right(ports: list[Any], said: str):
    assert said in problems_of(a_document(image="acme/serve", network=True, ports=ports))["ports"].message


def test_ports_need_an_image_and_a_network():
    assert "'ports' needs an 'image'" in problems_of(a_document(network=True, ports=[80]))[""].message
    assert "add 'network: true'" in problems_of(a_document(image="acme/serve", ports=[80]))[""].message


def test_the_password_of_a_registry_is_shown_in_no_answer():
    auth = {"username": "me", "password": "hunter2"}
    spec = JobSpec.model_validate(a_document(image="acme/train", registry_auth=auth))
    assert "hunter2" not in repr(spec)
    proto = spec_to_proto(spec)
    assert proto.registry_auth.password == "hunter2"
    assert "hunter2" not in spec_from_proto(proto).model_dump_json()


def test_a_gpu_nobody_knows_is_answered_with_the_nearest_name():
    problem = problems_of(a_document(resources={"gpu": "RTX4900:2"}))["resources.gpu"]
    assert problem.nearest
    assert "character 1" in problem.message
    assert not problem.message.startswith("Value error")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("resources.memory", {"resources": {"memory": 16}}),
        ("resources.cpu", {"resources": {"cpu": 0}}),
        ("max_duration", {"max_duration": "soon"}),
        ("max_duration", {"max_duration": 0}),
        ("max_price", {"max_price": -1}),
        ("env", {"env": ["HF_TOKEN"]}),
        ("env", {"env": {"1A": "x"}}),
        ("env", {"env": {"A": None}}),
        ("name", {"name": "../x"}),
        ("labels", {"labels": {"": "x"}}),
        ("command", {"commands": [], "command": "python train.py"}),
        ("commands", {"commands": ["a\0b"]}),
        ("input.sha256", {"input": {"sha256": "xyz", "size_bytes": 1}}),
        ("retry.on_events.0", {"retry": {"on_events": ["preempted"]}}),
    ],
)
def test_a_wrong_value_is_reported_at_its_field(path: str, fields: dict[str, Any]):
    assert path in problems_of(a_document(**fields))


@pytest.mark.parametrize("document", [{}, {"commands": ["a"], "command": ["a"]}])
def test_a_job_has_either_commands_or_a_command(document: dict[str, Any]):
    [problem] = problems_of(document).values()
    assert "'commands'" in problem.message


def test_the_words_of_other_tools_are_understood():
    spec = JobSpec.model_validate(
        {"run": "python a.py\n", "envs": {"A": 1}, "resources": {"accelerators": "H100:8", "cpus": "4+"}}
    )
    assert (spec.commands, spec.env, spec.resources.gpu, spec.resources.cpu) == (
        ["python a.py\n"],
        {"A": "1"},
        "H100:8",
        "4",
    )
    assert "mean the same" in problems_of({"run": "a", "commands": ["b"]})[""].message


def test_numbers_in_a_command_that_yaml_read_as_numbers_are_texts():
    assert JobSpec.model_validate({"command": ["sleep", 1]}).command == ["sleep", "1"]


def test_a_bare_name_in_env_is_filled_from_the_clients_environment():
    document = a_document(env=["HF_TOKEN", "LR=0.1"])
    assert fill_env(document, {"HF_TOKEN": "s=1"})["env"] == ["HF_TOKEN=s=1", "LR=0.1"]
    with pytest.raises(KeyError, match="HF_TOKEN"):
        fill_env(document, {})


def test_problems_of_many_jobs_carry_the_place_in_the_list():
    with pytest.raises(ValidationError) as caught:
        JobList.model_validate({"jobs": [a_document(), a_document(nam="x")]})
    [problem] = field_problems(caught.value.errors())
    assert (problem.field, problem.nearest) == ("jobs.1.nam", "name")


# --- many at once -----------------------------------------------------------------------------------------------------

MANY: list[dict[str, Any]] = [
    {"command": ["echo", "1"], "resources": {"cpu": 0.5, "memory": "64MB"}},
    {"command": ["echo", "2"], "resources": {"cpu": 0.5, "memory": "64MB"}, "name": "second"},
    {"command": ["echo", "2"], "resources": {"cpu": "0.5", "memory": "64MB"}, "env": {"A": "ü"}},
    {"commands": ["echo 3"], "resources": {"cpu": 0.5, "memory": "64MB"}},
    {"commands": "echo 4"},
    {"run": ["echo 5"], "envs": ["A=1"]},
    {"command": ["sleep", 1], "env": {"N": 1}},
    {"command": ["x"], "image": "busybox", "registry_auth": {"username": "a", "password": "b"}},
    {"image": "busybox", "commands": ["a"], "labels": {"x": "y"}, "array": {"lr": ["1", "2"]}},
]
WRONG: list[dict[str, Any]] = [
    {"command": []},
    {"command": ["a\0b"]},
    {"command": ["a"], "commands": ["b"]},
    {"command": ["a"], "name": "-"},
    {"command": ["a"], "env": {"1": "2"}},
    {"command": ["a"], "priority": 101},
    {"command": ["a"], "entrypoint": ["b"]},
    {"command": ["a"], "comand": "b"},
    {"command": ["a" * 200_000]},
    {"command": [["a"]]},
]


def test_many_specs_are_read_as_each_would_be_alone():
    reader = SpecReader()
    alone = [spec_to_proto(JobSpec.model_validate(document)) for document in MANY]
    assert reader.read_many({"jobs": MANY}) == alone
    assert [reader.read(document) for document in reversed(MANY)] == alone[::-1]


@pytest.mark.parametrize("document", WRONG)
def test_one_wrong_spec_among_many_is_refused_at_its_place(document: dict[str, Any]):
    reader = SpecReader()
    reader.read_many({"jobs": MANY})
    with pytest.raises(ValidationError) as alone:
        JobSpec.model_validate(document)
    with pytest.raises(ValidationError) as caught:
        reader.read_many({"jobs": [*MANY, document]})
    expected = [(("jobs", len(MANY), *line["loc"]), line["msg"]) for line in alone.value.errors()]
    assert [(line["loc"], line["msg"]) for line in caught.value.errors()] == expected


def test_a_list_of_no_or_too_many_jobs_is_refused():
    documents: list[dict[str, Any]] = [
        {"jobs": []},
        {"jobs": MANY[:1] * 10_001},
        {"jobs": {}},
        {"jobs": MANY, "more": 1},
    ]
    for document in documents:
        with pytest.raises(ValidationError):
            SpecReader().read_many(document)

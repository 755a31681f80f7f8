"""Arrays as people type them: one line in lists, tasks by `:N`, one receipt, one stop."""

from pathlib import Path

import pytest

from tests.acceptance.test_cli import IMPOSSIBLE, SMALL, Typist, a_typist
from tests.fixtures.cluster import wait_until
from tests.fixtures.platform import UpPlatform

pytestmark = pytest.mark.needs("bubblewrap")


@pytest.fixture(scope="module")
def ann(platform: UpPlatform, tmp_path_factory: pytest.TempPathFactory) -> Typist:
    return a_typist(platform, tmp_path_factory.mktemp("ann"))


def test_a_sweep_runs_each_combination_and_its_tasks_are_told_apart(ann: Typist, tmp_path: Path):
    script = 'echo "$DANTE_ARRAY_INDEX of $DANTE_ARRAY_SIZE: $lr $seed"; echo $lr > $DANTE_OUTPUT/lr; test $seed != 8'
    done = ann.dante("run", *SMALL, "--no-files", "--array", "lr=0.1,0.01", "--array", "seed=7..8", "--", "sh", "-c",
                     script)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "has 4 tasks" in done.stderr
    assert "FAILED: 2 of 4 tasks succeeded, 2 failed" in done.stderr
    assert ann.dante("logs", "last:2").stdout == "2 of 4: 0.01 7\n"
    assert ann.dante("logs", "last", "--task", "1").stdout == "1 of 4: 0.1 8\n"
    failed = ann.json("show", "last", "--tasks", "--state", "failed")["tasks"]
    assert [(task["array_index"], task["exit_code"]) for task in failed] == [(1, 1), (3, 1)]
    assert ann.json("show", "last:3")["job"]["id"] == failed[1]["id"]
    fetched = ann.dante("results", "last", "-o", str(tmp_path / "out"))
    assert fetched.returncode == 0, fetched.stderr
    assert [(tmp_path / "out" / str(index) / "lr").read_text() for index in (0, 2)] == ["0.1\n", "0.01\n"]
    job = ann.json("show", "last")["job"]
    assert (job["spec"]["array"], job["array"]["failed"]) == ({"lr": ["0.1", "0.01"], "seed": "7..8"}, 2)
    receipt = ann.json("receipt", "last")["receipt"]
    assert (receipt["total_udgpu"], len(receipt["lines"])) == (job["cost_udgpu"], 4)
    assert len(ann.json("receipt", "last:1")["receipt"]["lines"]) == 1


def test_an_array_of_ten_thousand_is_one_line_and_stops_at_once(ann: Typist):
    done = ann.dante("run", *IMPOSSIBLE, "--no-files", "--detach", "--array", "10000", "--", "true")
    assert done.returncode == 0, done.stderr
    array_id = done.stdout.strip()
    wait_until(lambda: ann.json("show", array_id)["job"]["array"]["created"], "tasks are created")
    listed = ann.dante("ps").stdout.splitlines()
    assert len([line for line in listed if array_id in line and "0/10000 ended" in line]) == 1
    assert len(listed) == 2
    for command in ("logs", "results"):
        refused = ann.dante(command, array_id, "--json")
        assert (refused.returncode, "array-of-tasks" in refused.stdout) == (
            (1, True) if command == "logs" else (0, False)
        )
    assert "QUEUED" in ann.dante("show", array_id, "--tasks", "-n", "2").stdout
    assert ann.dante("why", array_id).returncode == 0
    assert ann.dante("stop", array_id).returncode == 0
    job = ann.wait(array_id, "CANCELLED")
    assert job["array"]["cancelled"] == 10_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--array", "10000000"), "MAX_ARRAY_TASKS"),
        (("--array", "lr"), "NAME=VALUE"),
        (("--array", "a=1", "--array", "a=2"), "comes twice"),
        (("--array", "a=9..1"), "smaller number"),
        (("--max-parallel", "2"), "no 'array'"),
    ],
)
def test_an_array_that_is_none_is_refused_before_anything_is_sent(ann: Typist, words: tuple[str, ...], says: str):
    done = ann.dante("run", "--no-files", *words, "--", "true")
    assert done.returncode == 2
    assert says in done.stderr

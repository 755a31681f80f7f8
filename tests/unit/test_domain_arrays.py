"""Arrays: which tasks a sweep has, and what the end of the last one means."""

import pytest

from dantegpu.domain.arrays import MAX_ARRAY_TASKS, Array, Axis, InvalidArray, ending
from dantegpu.domain.job import JobState, Outcome


def test_a_sweep_is_every_combination_with_the_last_variable_fastest():
    array = Array.of([Axis.parse("lr", [0.1, 0.01]), Axis.parse("seed", "7..9")])
    assert array.size == 6
    assert [(e["lr"], e["seed"]) for e in map(array.environment, range(6))] == [
        ("0.1", "7"), ("0.1", "8"), ("0.1", "9"), ("0.01", "7"), ("0.01", "8"), ("0.01", "9"),
    ]  # fmt: skip
    assert array.environment(4) == {"DANTE_ARRAY_INDEX": "4", "DANTE_ARRAY_SIZE": "6", "lr": "0.01", "seed": "8"}


def test_a_plain_array_tells_each_task_its_index_only():
    assert Array.plain(3).environment(2) == {"DANTE_ARRAY_INDEX": "2", "DANTE_ARRAY_SIZE": "3"}
    with pytest.raises(IndexError):
        Array.plain(3).environment(3)


def test_a_range_costs_nothing_however_long_and_ten_million_tasks_are_refused_by_a_named_bound():
    axis = Axis.parse("seed", "-5..999999994")
    assert (len(axis), axis[0], axis[len(axis) - 1]) == (1_000_000_000, "-5", "999999994")
    with pytest.raises(InvalidArray, match=r"1000000000 tasks.*MAX_ARRAY_TASKS"):
        Array.of([axis])
    with pytest.raises(InvalidArray, match="MAX_ARRAY_TASKS"):
        Array.plain(10_000_000)
    assert Array.plain(MAX_ARRAY_TASKS).size == MAX_ARRAY_TASKS


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("a b", [1], "cannot be a task's variable"),
        ("DANTE_ARRAY_INDEX", [1], "not beginning with DANTE_"),
        ("x", [], "0 values"),
        ("x", [True], "texts or numbers"),
        ("x", [[1]], "texts or numbers"),
        ("x", {"a": 1}, "texts or numbers"),
        ("x", ["a\0"], "NUL"),
        ("x", "9..0", "smaller number"),
        ("x", list(range(10_001)), "may be listed"),
    ],
)
def test_what_is_no_sweep_is_refused_with_what_is_wrong(name: str, value: object, says: str):
    with pytest.raises(InvalidArray, match=says):
        Axis.parse(name, value)


def test_no_axes_and_no_tasks_are_refused():
    for make in (lambda: Array.of([]), lambda: Array.plain(0), lambda: Array.plain(-1)):
        with pytest.raises(InvalidArray):
            make()


@pytest.mark.parametrize(
    ("succeeded", "failed", "stopped", "state", "outcome", "message"),
    [
        (10, 0, None, JobState.SUCCEEDED, Outcome.SUCCEEDED, "10 of 10 tasks succeeded"),
        (10, 0, Outcome.CANCELLED, JobState.SUCCEEDED, Outcome.SUCCEEDED, "10 of 10 tasks succeeded"),
        (8, 2, None, JobState.FAILED, Outcome.FAILED, "8 of 10 tasks succeeded, 2 failed"),
        (8, 0, None, JobState.FAILED, Outcome.FAILED, "8 of 10 tasks succeeded, 2 were cancelled"),
        (5, 1, Outcome.CANCELLED, JobState.CANCELLED, Outcome.CANCELLED,
         "5 of 10 tasks succeeded, 1 failed, 4 were cancelled"),
        (5, 5, Outcome.TIMED_OUT, JobState.FAILED, Outcome.TIMED_OUT, "5 of 10 tasks succeeded, 5 failed"),
    ],
)  # fmt: skip
def test_an_array_ends_as_its_tasks_did(
    succeeded: int, failed: int, stopped: Outcome | None, state: JobState, outcome: Outcome, message: str
):
    end = ending(10, {JobState.SUCCEEDED: succeeded, JobState.FAILED: failed}, stopped)
    assert (end.state, end.outcome, end.message) == (state, outcome, message)

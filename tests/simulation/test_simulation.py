"""The real scheduler, billing and daemons in simulated worlds: I1 to I6 hold under every order of events that is tried.

A failure names its seed; `dante sim --seed N --trace` prints what happened.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.simulation.bugs import BUGS, Put, planted
from tests.simulation.coverage import Outcome
from tests.simulation.run import run_seeds, simulated
from tests.simulation.scenario import Fault

SEEDS = 2000
CHUNK = 200
FEWEST_OF_A_FAULT = 8
RARE = {
    Outcome.ATTEMPT_PREEMPTED, Outcome.ATTEMPT_PROVIDER_FAULT, Outcome.ADOPTED, Outcome.RESTORED, Outcome.LATE_PUSH,
}  # fmt: skip
FEWEST_OF_AN_OUTCOME = 8
SEEDS_TO_FIND_A_BUG = 60
SEARCHED_FROM: dict[str, int] = {}
"""Bugs that need a rare turn of events: the suite does not go through all the seeds before it each time."""
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("first", range(1, SEEDS + 1, CHUNK))
def test_no_order_of_events_breaks_an_invariant(first: int):
    happened: Counter[str] = Counter()
    violations: list[object] = []
    for result in run_seeds(range(first, first + CHUNK)):
        happened += result.happened
        violations += [(result.seed, violation) for violation in result.violations]
    assert violations == []
    # Runs in which nothing goes wrong break no invariant either.
    assert {fault: happened[fault] for fault in Fault if happened[fault] < FEWEST_OF_A_FAULT} == {}
    fewest = {outcome: 1 if outcome in RARE else FEWEST_OF_AN_OUTCOME for outcome in Outcome}
    assert {outcome: happened[outcome] for outcome in Outcome if happened[outcome] < fewest[outcome]} == {}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found_soon(bug: Callable[[Put], None]):
    first = SEARCHED_FROM.get(bug.__name__, 1)
    seeds = range(first, first + SEEDS_TO_FIND_A_BUG)
    with planted(bug):
        found = next((result for result in run_seeds(seeds) if result.violations), None)
    assert found is not None, f"{bug.__doc__} Nobody noticed in the seeds {first} to {seeds[-1]}."


def _traced(seed: int, hash_seed: str) -> list[dict[str, object]]:
    command = [sys.executable, "-P", "-m", "dantegpu.apps.main", "sim", "--seed", str(seed), "--trace", "--json"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["events"]


def test_a_seed_is_the_same_run_in_every_process():
    first, second = _traced(7, "1"), _traced(7, "2")
    assert len(first) > 50
    assert first == second


def test_production_code_is_as_it_was_after_a_simulation():
    from dantegpu.daemon import agent
    from dantegpu.kit import bus, lifecycle
    from dantegpu.services.scheduler import module

    def parts() -> tuple[object, ...]:
        return agent.boottime, bus.Client, lifecycle.time, lifecycle.log, module.Database

    before = parts()
    with simulated():
        assert all(now is not then for now, then in zip(parts(), before, strict=True))
    assert parts() == before

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
FIRST_SEEDS = range(1, SEEDS + 1, CHUNK)
FEWEST = 100
FEWEST_OF: dict[Fault | Outcome, int] = {
    Outcome.ATTEMPT_PREEMPTED: 20, Outcome.ATTEMPT_PROVIDER_FAULT: 10, Outcome.ADOPTED: 20, Outcome.RESTORED: 8,
    Outcome.LATE_PUSH: 25,
}  # fmt: skip
"""What takes several things that come together is rarer than the rest."""
SEEDS_TO_FIND_A_BUG = 60
SEARCHED_FROM = {"ack_before_commit": 131, "lease_renewed_after_expiry": 101, "leader_without_epoch_check": 61,
                 "device_freed_before_the_process_died": 61, "killed_too_late": 271}  # fmt: skip
"""Bugs that need a rare turn of events: the suite does not go through all the seeds before it each time."""
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def counts(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """What each chunk of seeds came to, by whichever worker ran it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "simulation"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("first", FIRST_SEEDS)
def test_no_order_of_events_breaks_an_invariant_and_every_one_of_them_occurs(first: int, counts: Path):
    happened: Counter[str] = Counter()
    violations: list[object] = []
    for result in run_seeds(range(first, first + CHUNK)):
        happened += result.happened
        violations += [(result.seed, violation) for violation in result.violations]
    assert violations == []
    fresh = counts / f"{first}.new"
    fresh.write_text(json.dumps(happened))
    fresh.rename(counts / f"{first}.json")
    if len(told := list(counts.glob("*.json"))) == len(FIRST_SEEDS):
        _every_fault_and_outcome_occurs(told)


def _every_fault_and_outcome_occurs(told: list[Path]) -> None:
    """Runs in which nothing happens break no invariant either. Looked at by whoever ran the last of all seeds."""
    total = sum((Counter[str](json.loads(path.read_text())) for path in told), Counter[str]())
    fewest = {name: FEWEST_OF.get(name, FEWEST) for name in (*Fault, *Outcome)}
    assert {name: total[name] for name in fewest if total[name] < fewest[name]} == {}


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
    first, second = _traced(199, "1"), _traced(199, "2")
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

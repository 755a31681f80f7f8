"""Runs seeds: one world each, faults, repair, the end. What `dante sim` and the tests call."""

import asyncio
import gc
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.simulation import patches
from tests.simulation.chaos import Chaos
from tests.simulation.checks import Checks
from tests.simulation.loop import Stuck
from tests.simulation.scenario import Scenario, scenario_of
from tests.simulation.world import TraceLine, Violation, World

END_SECONDS = 400.0
"""After the repair everything must be over within so long (virtual)."""
LOOK_SECONDS = 1.0
COLLECT_EVERY = 5


@dataclass(frozen=True, slots=True)
class SeedResult:
    """What one seed did. `virtual_seconds` passed in the world, `cpu_seconds` here."""

    seed: int
    steps: int
    virtual_seconds: float
    cpu_seconds: float
    violations: list[Violation]
    happened: Counter[str]
    """How often each Fault and each Outcome was there."""
    trace: list[TraceLine] = field(default_factory=list[TraceLine])


async def _live(world: World, checks: Checks) -> None:
    chaos = Chaos(world)
    world.build()
    tasks = [world.user.spawn(_submit(world, number)) for number in range(len(world.scenario.jobs))]
    tasks.append(world.user.spawn(chaos.begin()))
    await chaos.run()
    repairing = asyncio.ensure_future(chaos.repair())
    over_at = world.loop.time() + END_SECONDS
    while not world.stopped:
        await asyncio.sleep(LOOK_SECONDS)
        if repairing.done() and not checks.unfinished():
            checks.at_the_end()
            break
        if world.loop.time() > over_at:
            world.violate("end", f"{END_SECONDS:.0f} s after the repair: {checks.unfinished()}")
    if world.database.deadlocks:
        world.violate("crash", f"{world.database.deadlocks} deadlocks: rows are locked in id order, always")
    for crash in world.loop.crashes:
        world.violate("crash", repr(crash))


async def _submit(world: World, number: int) -> None:
    plan = world.scenario.jobs[number]
    await asyncio.sleep(plan.at_seconds)
    await world.submit(plan, number + 1)


def run_scenario(scenario: Scenario, folder: Path, *, tracing: bool = False) -> SeedResult:
    """One run. Production code must be patched: inside of `simulated`."""
    began = time.process_time()
    world = World(scenario, folder / f"seed-{scenario.seed}", tracing=tracing)
    patches.enter(world)
    try:
        world.prepare()
        try:
            world.loop.run_until_complete(_live(world, Checks(world)))
        except Stuck as error:
            world.violate("end", str(error))
    finally:
        world.forget()
        patches.enter(None)
    spent = time.process_time() - began
    return SeedResult(
        scenario.seed, world.loop.steps, world.loop.time(), spent, world.violations, world.happened, world.trace
    )


@contextmanager
def simulated() -> Generator[Path]:
    """Production code runs in worlds while this is open; the folder is for their disks."""
    hook = sys.unraisablehook
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    collecting = gc.isenabled()
    with (
        tempfile.TemporaryDirectory(prefix="dante-sim-", dir=base) as folder,
        patches.installed(),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
    ):
        # Worlds end in the middle of everything: what their coroutines do when they are thrown away means nothing.
        sys.unraisablehook = lambda unraisable: None
        gc.disable()
        gc.freeze()
        try:
            yield Path(folder)
        finally:
            gc.collect()
            gc.unfreeze()
            sys.unraisablehook = hook
            if collecting:
                gc.enable()


def run_seeds(
    seeds: Iterable[int], *, tracing: bool = False, change: Callable[[Scenario], Scenario] = lambda scenario: scenario
) -> Generator[SeedResult]:
    """Each seed's result, as it comes."""
    with simulated() as folder:
        for number, seed in enumerate(seeds, 1):
            yield run_scenario(change(scenario_of(seed)), folder, tracing=tracing)
            if number % COLLECT_EVERY == 0:
                gc.collect()

"""`dante sim`: the simulation of a clone. Runs seeds, or one of them with everything that happened in it."""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import click

REPOSITORY = Path(__file__).resolve().parents[4]
MAX_SEEDS = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@click.command("sim")
@click.option("--seed", type=click.IntRange(0), help="One seed.")
@click.option("--seeds", "seeds_text", metavar="A..B", help="All seeds from A to B.")
@click.option("--trace", is_flag=True, help="Print what happens, in order. Needs --seed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def sim(seed: int | None, seeds_text: str | None, trace: bool, as_json: bool) -> None:
    """Run the real scheduler, billing and daemon on a virtual clock with faults, and check that nothing goes wrong."""
    seeds = _seeds(seed, seeds_text)
    if trace and seed is None:
        raise click.UsageError("--trace prints the events of one seed: give it with --seed N")
    results: list[Any] = []
    for result in _simulation().run_seeds(seeds, tracing=trace):
        results.append(result)
        if not as_json:
            _print(result, trace)
    figures = _figures(results)
    if as_json:
        events = {"events": [asdict(line) for line in results[0].trace]} if trace else {}
        click.echo(json.dumps(figures | events))
    else:
        click.echo(
            f"{figures['seeds']} seeds, {figures['steps']} steps, {len(figures['violations'])} violations, "
            f"{figures['cpu_seconds']:.1f} s of CPU"
        )
    sys.exit(1 if figures["violations"] else 0)


def _seeds(seed: int | None, text: str | None) -> range:
    if (seed is None) == (text is None):
        raise click.UsageError("give either --seed N or --seeds A..B")
    if seed is not None:
        return range(seed, seed + 1)
    found = _RANGE.fullmatch(text or "")
    if found is None or int(found[1]) > int(found[2]):
        raise click.UsageError(f"--seeds {text}: expected A..B with A <= B, for example --seeds 1..2000")
    seeds = range(int(found[1]), int(found[2]) + 1)
    if len(seeds) > MAX_SEEDS:
        raise click.UsageError(f"--seeds {text}: {len(seeds)} seeds, at most {MAX_SEEDS} in one run")
    return seeds


def _simulation() -> Any:
    if not (REPOSITORY / "tests" / "simulation").is_dir():
        raise click.ClickException("the simulation runs from a clone: there is no tests/simulation/ folder here")
    sys.path.insert(0, str(REPOSITORY))
    return import_module("tests.simulation.run")


def _figures(results: Iterable[Any]) -> dict[str, Any]:
    done = list(results)
    return {
        "seeds": len(done),
        "steps": sum(result.steps for result in done),
        "virtual_seconds": round(sum(result.virtual_seconds for result in done), 1),
        "cpu_seconds": round(sum(result.cpu_seconds for result in done), 3),
        "happened": dict(sorted(sum((result.happened for result in done), Counter[str]()).items())),
        "violations": [{"seed": result.seed} | asdict(violation) for result in done for violation in result.violations],
    }


def _print(result: Any, trace: bool) -> None:
    for line in result.trace:
        click.echo(f"{line.at_seconds:9.3f}  {line.who:12} {line.what}")
    for violation in result.violations:
        click.echo(f"seed {result.seed}: {violation.invariant} at {violation.at_seconds:.3f} s: {violation.what}")
        if not trace:
            click.echo(f"    replay it: dante sim --seed {result.seed} --trace")

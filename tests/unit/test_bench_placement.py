import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.placement import InvalidTrace, Request, measure, read_machines, read_requests, replay, sample
from dantegpu.apps.commands.bench import placement
from dantegpu.domain.scheduling import Objective

MACHINES = """sn,cpu_milli,memory_mib,gpu,model
big,96000,393216,8,G2
small,16000,65536,2,T4
"""
REQUESTS = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec
a,8000,1024,8,1000,
b,4000,1024,1,500,T4
c,4000,1024,1,500,T4|G2
d,4000,1024,0,0,
e,4000,1024,1,1000,T4
f,1000,1024,2,1000,
"""


@pytest.fixture
def trace(tmp_path: Path) -> tuple[Path, Path]:
    machines, requests = tmp_path / "machines.csv", tmp_path / "requests.csv"
    machines.write_text(MACHINES)
    requests.write_text(REQUESTS)
    return machines, requests


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_trace_is_placed_as_far_as_it_fits(trace: tuple[Path, Path], batch: int):
    outcome = replay(read_machines(trace[0]), read_requests(trace[1]), batch=batch)
    places = [None if it is None else (outcome.serials[it.machine_index], it.gpu_milli) for it in outcome.placements]
    assert places[:3] == [("big", 8000), ("small", 500), ("small", 500)]
    assert places[4:] == [("small", 1000), None]
    assert outcome.result.allocation_at_end == 100.0
    assert outcome.result.allocation_at_100 == 100.0
    assert outcome.result.placed == 5


def test_the_figure_of_merit_counts_milli_gpus(trace: tuple[Path, Path]):
    requests = [Request(1000, 1, 1, 250, "G2"), Request(1000, 1, 4, 1000, "G2")]
    result = replay(read_machines(trace[0]), requests).result
    assert (result.allocation_at_end, result.allocation_at_100, result.gpus) == (42.5, None, 10)


def test_samples_ask_for_the_given_share_and_are_the_same_for_the_same_seed(trace: tuple[Path, Path]):
    requests = read_requests(trace[1])
    first, again, other = (sample(requests, 100_000, 1.3, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sum(it.total_milli for it in first) >= 130_000 > sum(it.total_milli for it in first[:-1])
    # The file comes once, shuffled, before anything comes twice.
    assert sorted(map(repr, first[: len(requests)])) == sorted(map(repr, requests))


def test_sampled_arrivals_are_written_so_that_they_can_be_replayed(trace: tuple[Path, Path], tmp_path: Path):
    def run(requests: Path, ratio: float | None, name: str) -> str:
        measure(
            trace[0],
            requests,
            batch=1,
            objective="fragmentation",
            sample_ratio=ratio,
            seed=3,
            arrivals_out=tmp_path / f"{name}.arrivals",
            out=tmp_path / name,
        )
        return (tmp_path / name).read_text()

    drawn = run(trace[1], 2.0, "drawn")
    assert run(tmp_path / "drawn.arrivals", None, "replayed") == drawn


def test_every_written_placement_is_within_the_machines(trace: tuple[Path, Path], tmp_path: Path):
    result = CliRunner().invoke(
        placement,
        ["--machines", str(trace[0]), "--requests", str(trace[1]), "--out", str(tmp_path / "out.csv"), "--json"],
    )
    assert result.exit_code == 0, result.output
    assert {"requests", "placed", "allocation_at_100", "allocation_at_end", "per_s"} <= json.loads(result.output).keys()
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[:2] == ["request,machine,devices,milli", "0,big,0;1;2;3;4;5;6;7,1000"]
    assert lines[-1] == "4,small,1,1000"
    assert next(line for line in lines if line.startswith("3,")).endswith(",,0")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        (1, "cpu_milli,num_gpu\n1,1\n", "memory_mib, gpu_milli"),
        (1, "cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,1,2000\n", "line 2"),
        (1, "cpu_milli,memory_mib,num_gpu,gpu_milli\n1,x,1,1000\n", "memory_mib is a whole number"),
        (0, "sn,cpu_milli,memory_mib,gpu,model\n", "no machines"),
    ],
)
def test_a_file_in_another_format_is_refused_with_its_line(trace: tuple[Path, Path], file: int, text: str, said: str):
    trace[file].write_text(text)
    with pytest.raises(InvalidTrace, match=said):
        replay(read_machines(trace[0]), read_requests(trace[1]))


def test_every_objective_places_the_trace(trace: tuple[Path, Path]):
    machines, requests = read_machines(trace[0]), read_requests(trace[1])
    for objective in Objective:
        assert replay(machines, requests, objective=objective).result.placed >= 4

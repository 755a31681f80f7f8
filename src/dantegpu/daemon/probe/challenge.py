"""`python -m dantegpu.daemon.probe.challenge FOLDER SEED`: measures this machine, checks what it computed, prints JSON.

A process of its own, so that its memory is gone afterwards and it can be killed the moment a job comes. The CPU is
measured by NumPy; GPUs by PyTorch where that is installed, which the daemon does not bring. The matrices come from a
seed, and each product C = A x B is checked with a random vector r: C r = A (B r) (Freivalds), which a processor or a
memory that makes mistakes does not pass.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

CPU_SIDE = 1536
GPU_SIDE = 8192
MEASURE_SECONDS = 0.5
MEMORY_BYTES = 128 << 20
DISK_BYTES = 64 << 20
FILL_CHUNK_BYTES = 1 << 30
FILL_RESERVE_BYTES = 1 << 30
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


class WrongResult(Exception):
    """The machine computed something else than it should have."""


def rate(work: Callable[[], object], done: Callable[[], object], amount: float) -> float:
    """`amount` per second of `work`, once warm; `done` waits for what was only queued."""
    work()
    done()
    began = time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - began < MEASURE_SECONDS:
        work()
        rounds += 1
        if rounds % 4 == 0:
            done()
    done()
    return amount * rounds / (time.perf_counter() - began)


def check_product(a: Any, b: Any, c: Any, r: Any, kind: str) -> None:
    """Raises WrongResult unless C r = A (B r), to within what the precision allows."""
    left = np.asarray(c @ r, dtype=np.float64)
    right = np.asarray(a @ (b @ r), dtype=np.float64)
    error = float(np.linalg.norm(left - right) / max(1e-30, float(np.linalg.norm(right))))
    if not error < TOLERANCE[kind]:
        raise WrongResult(f"a {kind} matrix product is wrong: relative error {error:.2g}")


def measure_cpu(seed: int) -> dict[str, float]:
    """GFLOPS (FP32) and GB/s (a copy reads and writes). Raises WrongResult."""
    random = np.random.default_rng(seed)
    a, b = (random.standard_normal((CPU_SIDE, CPU_SIDE), dtype=np.float32) for _ in range(2))
    c = np.empty_like(a)
    gflops = rate(lambda: np.matmul(a, b, out=c), lambda: None, 2 * CPU_SIDE**3 / 1e9)
    check_product(a, b, c, random.standard_normal(CPU_SIDE, dtype=np.float32), "fp32")
    source = np.ones(MEMORY_BYTES // 8)
    target = np.empty_like(source)
    return {
        "cpu_gflops": gflops,
        "memory_gbps": rate(lambda: np.copyto(target, source), lambda: None, 2 * MEMORY_BYTES / 1e9),
    }


def measure_disk(folder: Path, seed: int) -> dict[str, float]:
    """MB/s of writing until it is on the disk, and of reading it back from there. Raises WrongResult, OSError."""
    payload = np.random.default_rng(seed).bytes(DISK_BYTES)
    path = folder / "benchmark.tmp"
    try:
        began = time.perf_counter()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(payload)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            written_seconds = time.perf_counter() - began
            # Else the answer would come from memory.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            again = _read(descriptor)
            read_seconds = time.perf_counter() - began
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)
    if again != payload:
        raise WrongResult("the disk gave back something else than was written")
    return {
        "disk_write_mbps": DISK_BYTES / 1e6 / written_seconds,
        "disk_read_mbps": DISK_BYTES / 1e6 / read_seconds,
    }


def _read(descriptor: int) -> bytes:
    pieces: list[bytes] = []
    offset = 0
    while piece := os.pread(descriptor, 1 << 20, offset):
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)


def measure_gpu(torch: Any, index: int, seed: int) -> dict[str, Any]:
    """One GPU's figures by PyTorch. A wrong result stands under `problem` instead of an exception: others go on."""
    device = torch.device("cuda", index)
    found: dict[str, Any] = {"uuid": f"GPU-{torch.cuda.get_device_properties(index).uuid}"}
    generator = torch.Generator(device=device).manual_seed(seed)
    try:
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            found[f"{kind}_tflops"] = _gpu_product(torch, device, generator, kind, dtype)
        found |= _gpu_memory(torch, device)
        found["vram_checked_bytes"] = fill(torch, device, seed)
    except WrongResult as error:
        found["problem"] = str(error)
    torch.cuda.empty_cache()
    return found


def _gpu_product(torch: Any, device: Any, generator: Any, kind: str, dtype: Any) -> float:
    """TFLOPS. Raises WrongResult."""
    a, b = (torch.randn((GPU_SIDE, GPU_SIDE), generator=generator, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    tflops = rate(lambda: torch.matmul(a, b, out=c), lambda: torch.cuda.synchronize(device), 2 * GPU_SIDE**3 / 1e12)
    r = torch.randn(GPU_SIDE, generator=generator, device=device)
    check_product(_Host(a.float()), _Host(b.float()), _Host(c.float()), _Host(r), kind)
    return tflops


def _gpu_memory(torch: Any, device: Any) -> dict[str, float]:
    """GB/s within the GPU (a copy reads and writes) and from the machine's memory to it."""
    source = torch.ones(FILL_CHUNK_BYTES // 4, device=device)
    target = torch.empty_like(source)
    host = torch.ones(FILL_CHUNK_BYTES // 16, pin_memory=True)
    part = target[: host.numel()]

    def done() -> None:
        torch.cuda.synchronize(device)

    return {
        "memory_gbps": rate(lambda: target.copy_(source), done, 2 * FILL_CHUNK_BYTES / 1e9),
        "pcie_gbps": rate(lambda: part.copy_(host, non_blocking=True), done, FILL_CHUNK_BYTES / 4 / 1e9),
    }


class _Host:
    """A tensor whose products with others come back as NumPy arrays, but only when they are compared."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __matmul__(self, other: "_Host") -> "_Host":
        return _Host(self.tensor @ other.tensor)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.tensor.cpu().numpy(), dtype=dtype, copy=copy)


def fill(torch: Any, device: Any, seed: int) -> int:
    """Fill what is free of the GPU's memory with different numbers and read all of it back. Raises WrongResult."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    count = max(0, free_bytes - FILL_RESERVE_BYTES) // FILL_CHUNK_BYTES
    length = FILL_CHUNK_BYTES // 4
    chunks = [
        torch.full((length,), (seed + number) % 65_521, dtype=torch.int32, device=device) for number in range(count)
    ]
    for number, chunk in enumerate(chunks):
        if not bool((chunk == (seed + number) % 65_521).all()):
            raise WrongResult(f"GPU memory gave back something else than was written, near byte {number << 30}")
    return count * FILL_CHUNK_BYTES


def measure_gpus(seed: int) -> list[dict[str, Any]]:
    """Nothing without PyTorch, or without a GPU that it can use."""
    try:
        torch: Any = import_module("torch")
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    return [measure_gpu(torch, index, seed) for index in range(torch.cuda.device_count())]


def main(folder: Path, seed: int) -> dict[str, Any]:
    """All figures; `problem` when the machine computes wrongly."""
    found: dict[str, Any] = {"seed": seed}
    try:
        found |= measure_cpu(seed) | measure_disk(folder, seed)
    except WrongResult as error:
        found["problem"] = str(error)
    found["gpus"] = measure_gpus(seed)
    return found


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1]), int(sys.argv[2])), sys.stdout)

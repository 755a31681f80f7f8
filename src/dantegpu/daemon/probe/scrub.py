"""`python -m dantegpu.daemon.probe.scrub`: overwrite all memory of the one GPU that CUDA_VISIBLE_DEVICES names.

A process of its own, so that its memory on the GPU is free again when it ends, and a driver that hangs takes nobody
with it. It takes all memory that is free, sets it to zero and gives it back. It relies on nothing that a driver may do
by itself: cuMemAlloc's documentation says that memory is not cleared, and that a program could read what another had
left was shown more than once (Di Pietro, Lombardi, Villani: "CUDA Leaks", ACM TECS 2016).

Exit code 0: done, with the number of bytes as output; 1: not done, with the reason.
Source of the calls: NVIDIA CUDA Driver API, docs.nvidia.com/cuda/cuda-driver-api.
"""

import ctypes
import sys
from typing import Final

LIBRARY: Final = "libcuda.so.1"
LARGEST_CHUNK_BYTES: Final = 1 << 30
SMALLEST_CHUNK_BYTES: Final = 2 << 20
"""The driver's own page: what is free in smaller pieces, it keeps for itself."""
LEFT_OVER_BYTES: Final = 64 << 20


class CannotScrub(Exception):
    """Why the memory may not be clean."""


def scrub(library: str = LIBRARY) -> int:
    """Bytes that were overwritten. Raises CannotScrub."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        raise CannotScrub(f"{library} of its driver is missing") from error

    def call(name: str, *arguments: object) -> None:
        code = getattr(cuda, name)(*arguments)
        if code:
            raise CannotScrub(f"{name} failed with CUDA error {code}")

    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDeviceGetCount", ctypes.byref(count))
    if count.value != 1:
        raise CannotScrub(f"CUDA sees {count.value} devices instead of this one")
    call("cuDeviceGet", ctypes.byref(device), 0)
    call("cuCtxCreate_v2", ctypes.byref(context), 0, device)

    def free_bytes() -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    done_bytes, chunk_bytes = 0, LARGEST_CHUNK_BYTES
    while chunk_bytes >= SMALLEST_CHUNK_BYTES:
        address = ctypes.c_uint64()
        if cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(chunk_bytes)):
            chunk_bytes //= 2
            continue
        call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(chunk_bytes))
        done_bytes += chunk_bytes
    call("cuCtxSynchronize")
    if (left_bytes := free_bytes()) > LEFT_OVER_BYTES:
        raise CannotScrub(f"{left_bytes} bytes could not be reached")
    call("cuCtxDestroy_v2", context)
    return done_bytes


if __name__ == "__main__":
    try:
        print(scrub())
    except CannotScrub as error:
        print(error)
        sys.exit(1)

"""Whether a maker's driver shows on this machine. Imports nothing, so it can be asked first of all."""

import os

NVIDIA_SIGNS = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg")
"""On Linux and in WSL."""


def nvidia_shows() -> bool:
    """Without a sign of it, NVIDIA's library is not even looked for."""
    return any(os.path.exists(path) for path in NVIDIA_SIGNS)

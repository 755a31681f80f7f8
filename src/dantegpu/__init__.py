"""DanteGPU: a GPU-as-a-Service platform and marketplace that anyone can host."""

__version__ = "0.1.0"

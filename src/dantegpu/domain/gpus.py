"""Known GPU models, and how names are compared: `rtx4090`, `RTX 4090` and `NVIDIA GeForce RTX 4090` are one.

Memory sizes are what the vendor's driver reports, a little below the nominal size where the driver or ECC keeps some.
Compute capability is major * 10 + minor (8.9 is 89), 0 where it does not apply.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from dantegpu.domain.units import MIB

_WORD = re.compile(r"[a-z0-9]+")
_VENDORS = re.compile(r"^(?:nvidia|geforce|tesla|quadro|amd|radeon|instinct|intel)+")
_FORM_FACTOR = re.compile(r"\d+gb|sxm\d?|pcie|pci|nvl|nvl\d+|hbm\d?e?|oam|nvlink")
_IGNORED = frozenset({"gpu", "generation", "edition", "graphics", "series"})


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """`name` is what people type, `model` what the driver says."""

    name: str
    model: str
    vram_bytes: int
    compute_capability: int


@dataclass(frozen=True, slots=True)
class ModelKey:
    """A GPU's name taken apart: the model itself, and form factors that a request may leave out."""

    base: str
    extras: frozenset[str]


@lru_cache(maxsize=4096)
def model_key(name: str) -> ModelKey:
    """`"NVIDIA A100-SXM4-80GB"` -> base `a100`, extras `{sxm4, 80gb}`."""
    words = _WORD.findall(name.lower())
    extras = frozenset(word for word in words[1:] if _FORM_FACTOR.fullmatch(word))
    base = "".join(word for word in words if word not in extras and word not in _IGNORED)
    stripped = _VENDORS.sub("", base)
    # The workstation cards of Ampere are sold as "RTX A6000" and asked for as "A6000".
    if re.match(r"rtxa\d", stripped):
        stripped = stripped.removeprefix("rtx")
    return ModelKey(stripped, extras)


@lru_cache(maxsize=65536)
def matches_model(requested: str, model: str) -> bool:
    """Does a device that calls itself `model` satisfy a request for `requested`?

    `A100` takes every A100; `A100-80GB` and `A100 SXM4` only those; `A10` takes no A100, `RTX 3090` no `RTX 3090 Ti`.
    """
    wanted, offered = model_key(requested), model_key(model)
    return wanted.base == offered.base and wanted.extras <= offered.extras


def _table() -> dict[str, KnownGpu]:
    rows: list[tuple[str, str, int, int]] = [
        ("B200", "NVIDIA B200", 183_359, 100),
        ("H200", "NVIDIA H200", 143_771, 90),
        ("H100 NVL", "NVIDIA H100 NVL", 95_830, 90),
        ("H100", "NVIDIA H100 80GB HBM3", 81_559, 90),
        ("GH200", "NVIDIA GH200 480GB", 97_871, 90),
        ("H20", "NVIDIA H20", 97_871, 90),
        ("A100", "NVIDIA A100-SXM4-80GB", 81_920, 80),
        ("A100-40GB", "NVIDIA A100-SXM4-40GB", 40_960, 80),
        ("A40", "NVIDIA A40", 46_068, 86),
        ("A30", "NVIDIA A30", 24_576, 80),
        ("A16", "NVIDIA A16", 15_356, 86),
        ("A10", "NVIDIA A10", 23_028, 86),
        ("A10G", "NVIDIA A10G", 23_028, 86),
        ("A2", "NVIDIA A2", 15_356, 86),
        ("L40S", "NVIDIA L40S", 46_068, 89),
        ("L40", "NVIDIA L40", 46_068, 89),
        ("L4", "NVIDIA L4", 23_034, 89),
        ("T4", "Tesla T4", 15_360, 75),
        ("V100", "Tesla V100-SXM2-32GB", 32_768, 70),
        ("V100-16GB", "Tesla V100-SXM2-16GB", 16_384, 70),
        ("P100", "Tesla P100-PCIE-16GB", 16_384, 60),
        ("P40", "Tesla P40", 23_040, 61),
        ("P4", "Tesla P4", 7_680, 61),
        ("RTX PRO 6000", "NVIDIA RTX PRO 6000", 97_887, 120),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", 49_140, 89),
        ("RTX 5000 Ada", "NVIDIA RTX 5000 Ada Generation", 32_760, 89),
        ("RTX 4000 Ada", "NVIDIA RTX 4000 Ada Generation", 20_475, 89),
        ("RTX A6000", "NVIDIA RTX A6000", 49_140, 86),
        ("RTX A5000", "NVIDIA RTX A5000", 24_564, 86),
        ("RTX A4000", "NVIDIA RTX A4000", 16_376, 86),
        ("RTX 5090", "NVIDIA GeForce RTX 5090", 32_607, 120),
        ("RTX 5080", "NVIDIA GeForce RTX 5080", 16_303, 120),
        ("RTX 5070 Ti", "NVIDIA GeForce RTX 5070 Ti", 16_303, 120),
        ("RTX 5070", "NVIDIA GeForce RTX 5070", 12_227, 120),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", 24_564, 89),
        ("RTX 4090 D", "NVIDIA GeForce RTX 4090 D", 24_564, 89),
        ("RTX 4080 Super", "NVIDIA GeForce RTX 4080 SUPER", 16_376, 89),
        ("RTX 4080", "NVIDIA GeForce RTX 4080", 16_376, 89),
        ("RTX 4070 Ti", "NVIDIA GeForce RTX 4070 Ti", 12_282, 89),
        ("RTX 4070", "NVIDIA GeForce RTX 4070", 12_282, 89),
        ("RTX 4060 Ti", "NVIDIA GeForce RTX 4060 Ti", 16_380, 89),
        ("RTX 4060", "NVIDIA GeForce RTX 4060", 8_188, 89),
        ("RTX 3090 Ti", "NVIDIA GeForce RTX 3090 Ti", 24_564, 86),
        ("RTX 3090", "NVIDIA GeForce RTX 3090", 24_576, 86),
        ("RTX 3080 Ti", "NVIDIA GeForce RTX 3080 Ti", 12_288, 86),
        ("RTX 3080", "NVIDIA GeForce RTX 3080", 10_240, 86),
        ("RTX 3070", "NVIDIA GeForce RTX 3070", 8_192, 86),
        ("RTX 3060", "NVIDIA GeForce RTX 3060", 12_288, 86),
        ("RTX 2080 Ti", "NVIDIA GeForce RTX 2080 Ti", 11_264, 75),
        ("RTX 2080", "NVIDIA GeForce RTX 2080", 8_192, 75),
        ("GTX 1080 Ti", "NVIDIA GeForce GTX 1080 Ti", 11_264, 61),
        ("MI325X", "AMD Instinct MI325X", 262_128, 0),
        ("MI300X", "AMD Instinct MI300X", 196_592, 0),
        ("MI250X", "AMD Instinct MI250X", 65_536, 0),
        ("MI210", "AMD Instinct MI210", 65_536, 0),
        ("RX 7900 XTX", "AMD Radeon RX 7900 XTX", 24_560, 0),
    ]
    return {name: KnownGpu(name, model, vram_mib * MIB, capability) for name, model, vram_mib, capability in rows}


KNOWN_GPUS = MappingProxyType(_table())
"""By the name that people type. Also what a simulated GPU of that name looks like."""


def find_known_gpu(name: str) -> KnownGpu | None:
    """The known GPU that `name` means, in any spelling; None when there is none."""
    key = model_key(name)
    exact = [gpu for gpu in KNOWN_GPUS.values() if model_key(gpu.name) == key]
    if exact:
        return exact[0]
    return next((gpu for gpu in KNOWN_GPUS.values() if matches_model(name, gpu.model)), None)


def nearest_gpu_name(name: str, also: Iterable[str] = ()) -> str | None:
    """The known name that was probably meant, or None when nothing is close."""
    by_base = {model_key(known).base: known for known in [*also, *KNOWN_GPUS]}
    wanted = model_key(name).base
    close = difflib.get_close_matches(wanted, by_base, n=1, cutoff=0.6)
    if not close:
        # "4090" alone is close to nothing, but ends a name.
        close = [base for base in by_base if len(wanted) >= 3 and base.endswith(wanted)][:1]
    return by_base[close[0]] if close else None

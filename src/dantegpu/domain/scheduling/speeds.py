"""How fast GPU models are, for the objective `fastest`.

In TFLOPS of dense 16-bit matrix products (with 32-bit sums where the vendor tells them apart), rounded, by the vendors'
data sheets: the work that most jobs here do. It orders models; it promises nobody a duration.
"""

from functools import lru_cache
from types import MappingProxyType

from dantegpu.domain.gpus import find_known_gpu

TFLOPS = MappingProxyType({
    "B200": 2250, "H200": 989, "H100": 989, "H100 NVL": 835, "GH200": 989, "H20": 148, "A100": 312, "A100-40GB": 312,
    "A40": 150, "A30": 165, "A16": 72, "A10": 125, "A10G": 70, "A2": 18, "L40S": 362, "L40": 181, "L4": 121, "T4": 65,
    "V100": 125, "V100-16GB": 125, "P100": 19, "P40": 12, "P4": 6, "RTX PRO 6000": 504, "RTX 6000 Ada": 364,
    "RTX 5000 Ada": 261, "RTX 4000 Ada": 107, "RTX A6000": 155, "RTX A5000": 111, "RTX A4000": 77, "RTX 5090": 210,
    "RTX 5080": 113, "RTX 5070 Ti": 88, "RTX 5070": 62, "RTX 4090": 165, "RTX 4090 D": 147, "RTX 4080 Super": 104,
    "RTX 4080": 97, "RTX 4070 Ti": 80, "RTX 4070": 58, "RTX 4060 Ti": 44, "RTX 4060": 30, "RTX 3090 Ti": 80,
    "RTX 3090": 71, "RTX 3080 Ti": 68, "RTX 3080": 60, "RTX 3070": 41, "RTX 3060": 26, "RTX 2080 Ti": 54,
    "RTX 2080": 40, "GTX 1080 Ti": 11, "MI325X": 1307, "MI300X": 1307, "MI250X": 383, "MI210": 181,
    "RX 7900 XTX": 123,
})  # fmt: skip


@lru_cache(maxsize=4096)
def speed_of(model: str) -> int:
    """TFLOPS of a GPU that calls itself `model`; 0 when it is not known, so that it comes last."""
    known = find_known_gpu(model)
    return TFLOPS.get(known.name, 0) if known is not None else 0

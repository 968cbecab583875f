"""What devices could compute at most, by their names: what a run's FLOP/s are measured against."""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """TFLOP/s of a device, of dense matrices, as its maker states them; 0 for what it has no units for."""

    half: float
    """In 16 bits, added up in 32."""
    tf32: float
    fp32: float
    has_bf16: bool = True


_PEAKS: list[tuple[str, Peak]] = [
    (r"\bB200\b", Peak(2250, 1125, 75)),
    (r"\bH200 NVL\b", Peak(835.5, 417.5, 60)),
    (r"\bH200\b", Peak(989.4, 494.7, 67)),
    (r"\bH100 PCIe\b", Peak(756, 378, 51)),
    (r"\bH100 NVL\b", Peak(835.5, 417.5, 60)),
    (r"\bH100 80GB HBM3|\bGH200\b", Peak(989.4, 494.7, 67)),
    (r"\bA100\b", Peak(312, 156, 19.5)),
    (r"\bL40S\b", Peak(362, 183, 91.6)),
    (r"\bL4\b", Peak(121, 60, 30.3)),
    (r"\bA10G\b", Peak(70, 35, 35)),
    (r"\bA10\b", Peak(125, 62.5, 31.2)),
    (r"\bT4\b", Peak(65, 0, 8.1, has_bf16=False)),
    (r"\bV100.*PCIE", Peak(112, 0, 14, has_bf16=False)),
    (r"\bV100.*SXM2", Peak(125, 0, 15.7, has_bf16=False)),
    (r"\bRTX 3090$", Peak(71, 35.6, 35.6)),
    (r"\bRTX 4090$", Peak(165.2, 82.6, 82.6)),
]
"""By a pattern of the name that CUDA tells, the first that matches. See the data sheets of the devices: half of what
they have with sparsity."""
_PARTS = re.compile(r"\bMIG\b|Laptop|Max-Q", re.IGNORECASE)
"""Of names whose devices are less than the whole."""


def peak_flops(device: str, precision: str, *, tf32: bool = False) -> float | None:
    """FLOP/s that a device of that name reaches at most in that precision; None where it is not known.

    ``tf32`` says whether products of fp32 numbers are computed in TF32.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", "bf16")
        312000000000000.0
        >>> peak_flops("cpu", "fp32") is None
        True
    """
    if _PARTS.search(device):
        return None
    peak = next((peak for pattern, peak in _PEAKS if re.search(pattern, device)), None)
    if peak is None or (precision == "bf16" and not peak.has_bf16):
        return None
    if precision in ("bf16", "fp16"):
        return peak.half * 1e12
    return ((peak.tf32 if tf32 else 0) or peak.fp32) * 1e12

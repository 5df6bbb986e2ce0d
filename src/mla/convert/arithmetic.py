"""bf16 products in training, where this machine multiplies them faster than fp32."""

from __future__ import annotations

import time

import torch
from torch import Tensor

# Of the products that are timed; a training step's are of such sizes.
_ROWS, _WIDTH = 512, 1024
_TRIES = 3
# bf16 costs accuracy and casts: below this share of fp32's time it is worth them.
_WORTH = 0.8


def mixed(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Products in ``dtype`` while inside, sums and weights as they are; with float32 all is as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its products take clearly less time than float32's, else float32: measured, in 50 ms.

    No flag of the processor tells: AVX512-BF16 multiplies twice as fast as fp32 on Zen 4, and on an Intel
    processor whose AMX is hidden by a virtual machine torch's bf16 is slower than fp32.
    """
    x = torch.ones(_ROWS, _WIDTH, device=device)
    weight = torch.ones(_WIDTH, _WIDTH, device=device)
    full = _seconds(x, weight)
    half = _seconds(x.bfloat16(), weight.bfloat16())
    return torch.bfloat16 if half < _WORTH * full else torch.float32


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Of the fastest product, after one that warms up."""
    best = float("inf")
    for _ in range(_TRIES + 1):
        begun = time.perf_counter()
        float((x @ weight)[0, 0])  # a GPU has finished when the number is there
        best = min(best, time.perf_counter() - begun)
    return best

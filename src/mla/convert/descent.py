"""Gradient descent in steps relative to each matrix's size, so that matrices of every scale learn alike."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def relative_adam(matrices: Iterable[Tensor]) -> torch.optim.Adam:
    """Adam over ``matrices``, whose root mean squares as they are now become the units of its rates."""
    groups = [{"params": [x], "unit": float(x.detach().square().mean().sqrt())} for x in matrices]
    return torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.98))


def set_rate(optimiser: torch.optim.Adam, rate: float, done: float, *, warm_up: float) -> None:
    """A linear rise to ``rate`` of each unit, under half a cosine down to zero.

    Args:
        optimiser: of :func:`relative_adam`.
        rate: of the largest steps, in units.
        done: share of the whole descent that is over, 0 to 1.
        warm_up: share of it in which the rate rises.
    """
    shape = min(1.0, done / warm_up) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    for group in optimiser.param_groups:
        group["lr"] = rate * group["unit"] * shape

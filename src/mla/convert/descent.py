"""Gradient descent for stacks of matrices: orthogonalised momentum, in steps relative to each matrix's size.

Muon (K. Jordan et al., 2024): a step is the orthogonal matrix nearest to the momentum, so directions in which
gradients are small learn as fast as those in which they are large. In the refit it needs half of Adam's
steps (docs/conversion-experiments.md). torch.optim.Muon takes whole two-dimensional parameters and computes
in bf16, which most CPUs emulate; a projection of attention is a stack of one matrix per head, each with its
own scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.9
# An odd polynomial that drives singular values towards 1, five times: they end between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5

Views = Callable[[Tensor], Sequence[Tensor]]


class Muon:
    """Descent over parameters that hold matrices.

    Args:
        parameters: leaf tensors with gradients; changed in place by :meth:`step`.
        views: for each parameter, a function from a tensor of its shape to views [..., a, b] of the matrices
            in it, which cover it once. The unit of a matrix's steps is its root mean square as it is now.
    """

    def __init__(self, parameters: Sequence[Tensor], views: Sequence[Views]) -> None:
        self.parameters, self.views = list(parameters), list(views)
        self.momentum = [torch.zeros_like(x) for x in self.parameters]
        self.units = [
            [part.square().mean((-2, -1), keepdim=True).sqrt() for part in view(x.detach())]
            for x, view in zip(self.parameters, self.views, strict=True)
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change every matrix by ``rate`` units (root mean square of the change), and drop the gradients."""
        for x, view, momentum, units in zip(
            self.parameters, self.views, self.momentum, self.units, strict=True
        ):
            assert x.grad is not None
            momentum.mul_(_MOMENTUM).add_(x.grad)
            ahead = x.grad.add_(momentum, alpha=_MOMENTUM)
            for part, direction, unit in zip(view(x.data), view(ahead), units, strict=True):
                size = rate * math.sqrt(max(part.shape[-2:]))
                part.sub_(orthogonalise(direction).mul_(size * unit))
            x.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "units": self.units}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, stored in zip(self.momentum, state["momentum"], strict=True):
            own.copy_(stored)
        for units, saved in zip(self.units, state["units"], strict=True):
            for unit, stored in zip(units, saved, strict=True):
                unit.copy_(stored)


def column_apart(stack: Tensor) -> list[Tensor]:
    """Views of matrices [..., a, b] whose last column holds biases: those may be many times as large as the
    rest, which would then take steps that are many times too large.
    """
    return [stack[..., :-1], stack[..., -1:]]


def orthogonalise(x: Tensor) -> Tensor:
    """Every matrix of x [..., a, b] with its singular values near 1, and zero where x is zero."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT).mT
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    # The polynomials of x xᵀ commute: they are multiplied on the small side, x is met twice.
    first, third, fifth = _COEFFICIENTS
    gram = x @ x.mT
    one = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    made = one
    for _ in range(_ITERATIONS):
        factor = first * one + third * gram + fifth * gram @ gram
        made = factor @ made
        gram = factor @ gram @ factor
    return made @ x


def schedule(done: float, *, warm_up: float) -> float:
    """Share of the largest rate: a linear rise, under half a cosine down to zero.

    Args:
        done: share of the whole descent that is over, 0 to 1.
        warm_up: share of it in which the rate rises.
    """
    return min(1.0, done / warm_up) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

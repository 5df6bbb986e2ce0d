"""Refitting a converted layer on what it will really read: the student's own stream.

The factors are found from the teacher's inputs. In the student, earlier layers have erred already, and
attention weighs keys that went through the latent. For these inputs gradient descent lowers the squared error
of the block's output in all factors at once, in windows of text and at tokens that begin one; no gradient
leaves the block. The result is taken only where it lowers the error of windows and first tokens that it did
not see. (Of a single first token there is nothing to hold out.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mla.convert.checkpoint import LayerFactors
from mla.convert.descent import Muon, column_apart, schedule
from mla.convert.fused import fused_attention
from mla.convert.rope_split import ladder
from mla.convert.statistics import Sample, rotate

# Every so many windows, and first tokens, one is held out, or the last where there are fewer.
_HELD_OUT = 8
# Relative squared error of fp32 arithmetic.
_ROUNDING = 1e-10
# Of the descent: rounds over the windows, tokens per step (at least one window), and the largest steps
# relative to each factor's root mean square, where the block's output errs by as much as it holds. A block
# that is close already is shaken by steps that a rough one needs: they go with the fourth root of the error.
_ROUNDS = 3
_TOKENS_PER_STEP = 512
_RATE = 1e-2
_WARM_UP = 0.05  # share of the steps
# What the relative error of first tokens counts, that of windows being 1, and how many are drawn for a step.
_START_SHARE = 0.1
_STARTS_PER_STEP = 512
# The factors that read the block's input: with biases they have one more column.
_READING = {"latent", "key_rope", "query_nope", "query_rope"}


def refit(factors: LayerFactors, own: Sample, output: Sample, *, theta: float) -> LayerFactors:
    """Fit a layer to what the teacher makes of its own inputs.

    Args:
        factors: of this layer.
        own: what the student's block reads (after the norm).
        output: what the teacher's block writes.
        theta: rotary base of the student.
    """
    parts = zip(_parted(len(own.windows)), _parted(len(own.starts)), strict=True)
    fitted, unseen = (_Misfit(own, output, windows, starts, theta) for windows, starts in parts)
    before = unseen.whole(factors)
    if before <= _ROUNDING:
        return factors
    descended = _descend(factors, fitted, _RATE * min(before, 1.0) ** 0.25)
    return descended if unseen.whole(descended) < before else factors


def _parted(count: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` are fitted, and which are not seen; the only one is both."""
    every = min(_HELD_OUT, count)
    unseen = list(range(every - 1, count, every))
    return [index for index in range(count) if index not in unseen] or unseen, unseen


class _Misfit:
    """Relative squared error of a layer's output in some windows, and at some first tokens.

    ``windows`` and ``starts`` are places: a copy of nearly all windows takes as much memory as they do.
    """

    def __init__(
        self, own: Sample, output: Sample, windows: list[int], starts: list[int], theta: float
    ) -> None:
        self.own, self.output, self.windows, self.theta = own.windows, output.windows, windows, theta
        self.own_starts, self.output_starts = own.starts[starts], output.starts[starts]
        # Of a block that writes nothing: more than nothing.
        tiny = torch.finfo(torch.float32).tiny
        energies = [float(self.output[place].square().mean()) for place in windows]
        self.energy = max(sum(energies) / len(energies), tiny)
        self.energy_of_starts = max(float(self.output_starts.square().mean()), tiny)

    def of_window(self, factors: LayerFactors, place: int) -> Tensor:
        """Of one window; the mean over all has the unit of :meth:`whole`."""
        made = student_block(factors, self.own[place], self.theta)
        return (made - self.output[place]).square().mean() / self.energy

    def of_starts(self, factors: LayerFactors, some: Tensor | slice = slice(None)) -> Tensor:
        """What first tokens, or some of them, add to it."""
        made = student_starts(factors, self.own_starts[some])
        return _START_SHARE * (made - self.output_starts[some]).square().mean() / self.energy_of_starts

    def whole(self, factors: LayerFactors) -> float:
        """Of all windows and first tokens."""
        windows = sum(float(self.of_window(factors, place)) for place in self.windows)
        return windows / len(self.windows) + float(self.of_starts(factors))


def student_block(factors: LayerFactors, x: Tensor, theta: float) -> Tensor:
    """What a converted block makes of its normed input: fp32 [t, D] from [t, D], by the narrower way."""
    _, d, r = factors.value.shape
    heads = _expanded(factors, x, theta) if r > d else _absorbed(factors, x, theta)
    return heads @ factors.output.mT.flatten(0, 1).to(heads.dtype)


def student_starts(factors: LayerFactors, x: Tensor) -> Tensor:
    """The same of first tokens, each alone: fp32 [n, D] from [n, D]."""
    latent = x @ factors.latent.to(x.dtype).T
    heads = torch.einsum("nr,hdr->nhd", latent, factors.value.to(x.dtype)).flatten(1)
    return heads @ factors.output.mT.flatten(0, 1).to(x.dtype)


def _absorbed(factors: LayerFactors, x: Tensor, theta: float) -> Tensor:
    """All heads' averages side by side, fp32 [t, h·d] from inputs x [t, D]: one key and one value for all."""
    latent, key_rope, query_nope, query_rope = _projected(factors, x, theta)
    query = torch.cat([query_nope @ factors.key_nope.to(x.dtype), query_rope], -1)
    heads, _, nope = query_nope.shape
    key, value = (each.expand(heads, -1, -1) for each in (torch.cat([latent, key_rope], -1), latent))
    read = fused_attention(query[None], key[None], value[None], scale=1 / math.sqrt(nope))[0]
    return torch.einsum("hdr,htr->thd", factors.value.to(x.dtype), read).flatten(1)


def _expanded(factors: LayerFactors, x: Tensor, theta: float) -> Tensor:
    """The same by every head's own keys and values, which are narrower than a latent of r > d."""
    latent, key_rope, query_nope, query_rope = _projected(factors, x, theta)
    heads, _, nope = query_nope.shape
    query = torch.cat([query_nope, query_rope], -1)
    key_nope = latent @ factors.key_nope.to(x.dtype).mT
    key = torch.cat([key_nope, key_rope.expand(heads, -1, -1)], -1)
    value = latent @ factors.value.to(x.dtype).mT
    made = fused_attention(query[None], key[None], value[None], scale=1 / math.sqrt(nope))[0]
    return made.transpose(0, 1).flatten(1)


def _projected(factors: LayerFactors, x: Tensor, theta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [t, r], rotated keys [t, p], queries [h, t, n] and rotated queries [h, t, p] of x [t, D]."""
    slots = ladder(len(factors.key_rope), theta)
    return (
        x @ factors.latent.to(x.dtype).T,
        rotate(x @ factors.key_rope.to(x.dtype).T, slots, "interleaved"),
        x @ factors.query_nope.to(x.dtype).mT,
        rotate(x @ factors.query_rope.to(x.dtype).mT, slots, "interleaved"),
    )


def _as_it_is(stack: Tensor) -> list[Tensor]:
    """A factor is one matrix, or a stack of one for each head."""
    return [stack]


@torch.enable_grad()
def _descend(factors: LayerFactors, misfit: _Misfit, rate: float) -> LayerFactors:
    """All factors at once, by orthogonalised momentum."""
    moving = {name: value.float().requires_grad_() for name, value in vars(factors).items()}
    student = LayerFactors(**moving)
    biased = misfit.own.shape[-1] > misfit.output.shape[-1]
    views = [column_apart if biased and name in _READING else _as_it_is for name in moving]
    optimiser = Muon(list(moving.values()), views)
    chance = torch.Generator().manual_seed(0)  # on the CPU: the same order on every device
    starts = len(misfit.own_starts)
    rounds = [torch.randperm(len(misfit.windows), generator=chance, device="cpu") for _ in range(_ROUNDS)]
    places = torch.tensor(misfit.windows, device="cpu")[torch.cat(rounds)]
    batches = torch.split(places, max(1, _TOKENS_PER_STEP // misfit.own.shape[1]))
    for step, batch in enumerate(batches, 1):
        for place in batch.tolist():  # one graph at a time: attention weights are large
            torch.autograd.backward(misfit.of_window(student, place) / len(batch))
        some = torch.randint(starts, (min(starts, _STARTS_PER_STEP),), generator=chance, device="cpu")
        torch.autograd.backward(misfit.of_starts(student, some))
        optimiser.step(rate * schedule(step / (len(batches) + 1), warm_up=_WARM_UP))
    return LayerFactors(**{name: value.detach().double() for name, value in moving.items()})

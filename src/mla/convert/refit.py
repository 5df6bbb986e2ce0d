"""Refitting a converted layer on what it will really read: the student's own stream.

The factors are found from the teacher's inputs. In the student, earlier layers have erred already, and
attention weighs keys that went through the latent. For these inputs the value read-outs and the output
projection have closed forms: ridge regressions against the teacher's values and outputs, drawn towards the
factors as they are. From there gradient descent lowers the squared error of the block's output in all factors
at once; no gradient leaves the block. A step is taken only where it lowers the error of windows that it did
not see.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mla.convert.checkpoint import LayerFactors
from mla.convert.descent import Muon, schedule
from mla.convert.fused import fused_attention
from mla.convert.rope_split import ladder
from mla.convert.statistics import AttentionWeights, attend

# Pull towards the factors as they are, as a share of each feature's own power.
_RIDGE = 0.02
# Every so many windows one is held out, or the last where there are fewer.
_HELD_OUT = 8
# Relative squared error of fp32 arithmetic.
_ROUNDING = 1e-10
# Of the descent: rounds over the windows, tokens per step (at least one window), and the largest steps
# relative to each factor's root mean square.
_ROUNDS = 3
_TOKENS_PER_STEP = 512
_RATE = 3e-3
_WARM_UP = 0.05  # share of the steps


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The windows that a layer is fitted on; see :func:`refit`."""

    weights: AttentionWeights
    theirs: Tensor
    own: Tensor
    output: Tensor
    theta: float


def refit(
    factors: LayerFactors,
    weights: AttentionWeights,
    theirs: Tensor,
    own: Tensor,
    output: Tensor,
    *,
    theta: float,
) -> LayerFactors:
    """Fit a layer to what the teacher makes of its own inputs: value read-outs, output projection, then all.

    Args:
        factors: of this layer.
        weights: the teacher's block.
        theirs: fp32 [b, t, D], what the teacher's block reads (after the norm).
        own: fp32 [b, t, D], what the student's block reads.
        output: fp32 [b, t, D], what the teacher's block writes.
        theta: rotary base of the student.
    """
    every = min(_HELD_OUT, len(own))
    unseen = list(range(every - 1, len(own), every))
    fitted = [index for index in range(len(own)) if index not in unseen] or unseen

    def error(candidate: LayerFactors) -> float:
        return sum(
            float((student_block(candidate, own[i], theta) - output[i]).square().sum()) for i in unseen
        )

    best = error(factors)
    if best > _ROUNDING * sum(float(output[i].square().sum()) for i in unseen):
        seen = _Seen(weights, theirs[fitted], own[fitted], output[fitted], theta)
        for step in (_values, _outputs, _descend):
            candidate = step(factors, seen)
            found = error(candidate)
            if found < best:
                factors, best = candidate, found
    return factors


def student_block(factors: LayerFactors, x: Tensor, theta: float) -> Tensor:
    """What a converted block makes of its normed input: fp32 [t, D] from [t, D]."""
    heads = _heads(factors, x, theta)
    return heads @ _stacked(factors.output).to(heads.dtype)


def _heads(factors: LayerFactors, x: Tensor, theta: float) -> Tensor:
    """All heads' average values side by side, fp32 [t, h·d] from inputs x [t, D], by the narrower way."""
    _, d, r = factors.value.shape
    if r > d:
        return _expanded(factors, x, theta)
    return torch.einsum("hdr,htr->thd", factors.value.to(x.dtype), _read_latents(factors, x, theta)).flatten(
        1
    )


def _read_latents(factors: LayerFactors, x: Tensor, theta: float) -> Tensor:
    """What each head's attention averages out of the latents: fp32 [h, t, r] from inputs x [t, D]."""
    latent, key_rope, query_nope, query_rope = _projected(factors, x, theta)
    query = torch.cat([query_nope @ factors.key_nope.to(x.dtype), query_rope], -1)
    heads, _, nope = query_nope.shape
    # One key and one value for all heads.
    key, value = (each.expand(heads, -1, -1) for each in (torch.cat([latent, key_rope], -1), latent))
    return fused_attention(query[None], key[None], value[None], scale=1 / math.sqrt(nope))[0]


def _expanded(factors: LayerFactors, x: Tensor, theta: float) -> Tensor:
    """:func:`_heads` by every head's own keys and values, which are narrower than a latent of r > d."""
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
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), ladder(len(factors.key_rope), theta))
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def turn(pairs: Tensor) -> Tensor:
        even, odd = pairs[..., 0::2], pairs[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    return (
        x @ factors.latent.to(x.dtype).T,
        turn(x @ factors.key_rope.to(x.dtype).T),
        x @ factors.query_nope.to(x.dtype).mT,
        turn(x @ factors.query_rope.to(x.dtype).mT),
    )


def _values(factors: LayerFactors, seen: _Seen) -> LayerFactors:
    """Per head: the teacher head's average value from the student's average latent."""
    H, d, r = factors.value.shape
    gram = torch.zeros(H, r, r, dtype=torch.float64)
    cross = torch.zeros(H, r, d, dtype=torch.float64)
    for x, wanted in zip(seen.own, seen.theirs, strict=True):
        read = _read_latents(factors, x, seen.theta)
        gram += (read.mT @ read).double()
        cross += (read.mT @ attend(seen.weights, wanted)).double()
    return dataclasses.replace(factors, value=_ridge(gram, cross, factors.value.mT).mT.contiguous())


def _outputs(factors: LayerFactors, seen: _Seen) -> LayerFactors:
    """The teacher block's output from all of the student's heads at once."""
    H, D, d = factors.output.shape
    gram = torch.zeros(H * d, H * d, dtype=torch.float64)
    cross = torch.zeros(H * d, D, dtype=torch.float64)
    for x, wanted in zip(seen.own, seen.output, strict=True):
        heads = _heads(factors, x, seen.theta)
        gram += (heads.T @ heads).double()
        cross += (heads.T @ wanted).double()
    fitted = _ridge(gram, cross, _stacked(factors.output))
    return dataclasses.replace(factors, output=fitted.view(H, d, D).mT.contiguous())


@torch.enable_grad()
def _descend(factors: LayerFactors, seen: _Seen) -> LayerFactors:
    """All factors at once, by orthogonalised momentum on the squared error of the block's output."""
    energy = float(seen.output.square().sum())
    moving = {name: value.float().requires_grad_() for name, value in vars(factors).items()}
    student = LayerFactors(**moving)
    # A factor is one matrix, or a stack of one for each head.
    optimiser = Muon(list(moving.values()), [lambda stack: [stack]] * len(moving))
    chance = torch.Generator().manual_seed(0)  # on the CPU: the same order on every device
    places = torch.cat(
        [torch.randperm(len(seen.own), generator=chance, device="cpu") for _ in range(_ROUNDS)]
    )
    batches = torch.split(places, max(1, _TOKENS_PER_STEP // seen.own.shape[1]))
    for step, batch in enumerate(batches, 1):
        for place in batch:  # one graph at a time: attention weights are large
            made = student_block(student, seen.own[place], seen.theta)
            torch.autograd.backward((made - seen.output[place]).square().sum() / energy)
        optimiser.step(_RATE * schedule(step / (len(batches) + 1), warm_up=_WARM_UP))
    return LayerFactors(**{name: value.detach().double() for name, value in moving.items()})


def _stacked(output: Tensor) -> Tensor:
    """[h, D, d] as one matrix [h·d, D]."""
    return output.mT.flatten(0, 1)


def _ridge(gram: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """argmin over X of the squared error, plus a share of each feature's power times ‖X − prior‖²."""
    power = gram.diagonal(dim1=-2, dim2=-1)
    # The floor keeps features that never moved where they are.
    pull = _RIDGE * power + 1e-6 * power.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    solved: Tensor = torch.linalg.solve(gram + torch.diag_embed(pull), cross + pull[..., None] * prior)
    return solved

"""Which part of the keys keeps RoPE, in the few rotary slots that all heads share, and what becomes of the
rest.

A Llama head sees logit(t, s) = Re Σ_j q_j(t) k_j(s)* e^{iω_j(t−s)} / sqrt(d), one complex number per rotary
pair. An MLA checkpoint has n = p/2 slots on its own ladder θ'^(−2i/p). A slot holds one complex mixture of
the groups' pairs at one frequency, every head reads it with a factor of its own. What no slot holds loses its
rotation: the best constant in its place is the mean of e^{iω_j(t−s)} over the lags that attention looks at,
which is near 0 for fast pairs (they then cost no rank) and near 1 for slow ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mla.convert.statistics import LayerStatistics, group_of_heads, to_complex

# Share of lags that are drawn evenly from the whole window, so that a head that looks nearby in the
# calibration text is still sane at long range.
_UNIFORM = 0.05


@dataclass(frozen=True)
class RopeSplit:
    """The split of one layer. n slots, h heads, g groups, j = d/2 pairs; complex128.

    Attributes:
        pair: int64 [n], the teacher's pair that a slot serves; −1 for an unused slot.
        key_mix: [n, g], slot = Σ_g key_mix[g] · k_g (position-free pairs).
        read: [n, h], factor on the head's query pair for that slot; 0 where unused.
        residual: [j, g, g], what the slots leave of the groups' pairs, as a map of the pairs.
        rotation: [h, j], constant in place of e^{iω_j(t−s)} for the residual.
    """

    pair: Tensor
    key_mix: Tensor
    read: Tensor
    residual: Tensor
    rotation: Tensor


def ladder(rope: int, theta: float) -> Tensor:
    """Inverse frequencies θ^(−2i/p) of a stock model with ``rope`` = p rotary dimensions, fp64 [p/2]."""
    return theta ** -(torch.arange(0, rope, 2, dtype=torch.float64) / rope)


def mean_rotation(statistics: LayerStatistics, frequency: Tensor) -> Tensor:
    """Mean of e^{iω(t−s)} over each head's lags, complex [h, *frequency.shape]."""
    heads, T = statistics.lags.shape
    lags = (1 - _UNIFORM) * statistics.lags + _UNIFORM / T
    angles = frequency.flatten()[:, None] * torch.arange(T, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    return ((lags + 0j) @ turn.T).view(heads, *frequency.shape)


def split_rope(statistics: LayerStatistics, inv_freq: Tensor, slots: Tensor) -> RopeSplit:
    """Fill the rotary slots greedily by how much output error each saves.

    For slot frequency ω' and pair j the saving is the largest eigenvalue of D^½ Σ D^½: Σ second moments of
    the groups' pairs, D each group's query power times |α|² − |ρ|² with α the mean of e^{i(ω_j − ω')(t−s)} (1
    where the frequencies are equal) and ρ that of e^{iω_j(t−s)}. A frequency may fill several slots.

    Args:
        statistics: of this layer.
        inv_freq: the teacher's frequencies, fp64 [j].
        slots: the student's frequencies, fp64 [n].

    Returns:
        The split.
    """
    H, J, G, _ = statistics.pair_moment.shape
    n = slots.shape[0]
    group = group_of_heads(H, G)
    T = statistics.lags.shape[1]
    flat = torch.polar(
        torch.ones(J, T, dtype=torch.float64), inv_freq[:, None] * torch.arange(T, dtype=torch.float64)
    ).mean(1)
    rotation = (1 - _UNIFORM) * statistics.rotation + _UNIFORM * flat
    alpha = mean_rotation(statistics, inv_freq[None, :] - slots[:, None])  # [h, n, j]
    saved = (alpha.abs().square() - rotation.abs().square()[:, None, :]).clamp(min=0)

    moment = statistics.pair_moment.clone()
    residual = torch.eye(G, dtype=torch.complex128).repeat(J, 1, 1)
    pair = torch.full((n,), -1, dtype=torch.int64)
    key_mix = torch.zeros(n, G, dtype=torch.complex128)
    read = torch.zeros(n, H, dtype=torch.complex128)
    gain = torch.zeros(n, J, dtype=torch.float64)
    vector = torch.zeros(n, J, G, dtype=torch.complex128)
    member = torch.nn.functional.one_hot(group, G).double()  # [h, g]

    def rate(j: int) -> None:
        pooled = moment[:, j].sum(0)  # [g, g]
        own = moment[:, j].diagonal(dim1=-2, dim2=-1).real  # [h, g]
        power = pooled.diagonal().real.clamp(min=torch.finfo(torch.float64).tiny)
        weight = torch.einsum("hn,hg,hg->ng", saved[:, :, j], own, member) / power
        root = weight.clamp(min=0).sqrt() + 0j
        values, vectors = torch.linalg.eigh(root[:, :, None] * pooled * root[:, None, :])
        gain[:, j] = values[:, -1]
        vector[:, j] = root * vectors[:, :, -1]

    free = torch.ones(n, dtype=torch.bool)
    if G == 1:
        # One group fills one slot per frequency: where the ladders agree this is exact, whatever was
        # measured.
        for i, j in torch.isclose(slots[:, None], inv_freq[None, :], rtol=1e-9, atol=0).nonzero().tolist():
            free[i] = False
            pair[i], key_mix[i], read[i] = j, 1.0, 1.0
            residual[j] = 0.0
            moment[:, j] = 0.0
    for j in range(J):
        rate(j)
    for _ in range(n):
        best = int(gain.masked_fill(~free[:, None], -1.0).argmax())
        i, j = divmod(best, J)
        if gain[i, j] <= 0:
            break
        free[i] = False
        pooled = moment[:, j].sum(0)
        a = vector[i, j]  # slot = aᴴ k
        slot_power = (a.conj() @ pooled @ a).real
        back = (pooled @ a) / slot_power  # best k ≈ back · slot
        keep = torch.eye(G, dtype=torch.complex128) - torch.outer(back, a.conj())
        pair[i] = j
        key_mix[i] = a.conj() @ residual[j]
        read[i] = alpha[:, i, j] * back.conj()[group]
        residual[j] = keep @ residual[j]
        moment[:, j] = keep @ moment[:, j] @ keep.mH
        rate(j)

    return RopeSplit(pair, key_mix, read, residual, rotation)


def mix_pairs(factor: Tensor, weights: Tensor) -> Tensor:
    """Multiply pairs (j, j + d/2) of the rows of ``weights`` [..., d, D] by complex ``factor`` [..., j]."""
    as_pairs = to_complex(weights, -2) * factor[..., None]
    return torch.cat([as_pairs.real, as_pairs.imag], dim=-2)


def residual_keys(split: RopeSplit, keys: Tensor) -> Tensor:
    """The keys without what the slots hold: real fp64 [g, d, m] from [g, d, m]."""
    left = torch.einsum("jgf,fjm->gjm", split.residual, to_complex(keys, 1))
    return torch.cat([left.real, left.imag], dim=1)


def rotary_keys(split: RopeSplit, keys: Tensor) -> Tensor:
    """Rows of the shared rotary key in the interleaved order of the target: fp64 [2n, D] from keys [g, d,
    D]."""
    source = to_complex(keys, 1)[:, split.pair.clamp(min=0)]  # [g, n, D]
    slot = torch.einsum("ng,gnD->nD", split.key_mix, source)
    return torch.stack([slot.real, slot.imag], dim=1).flatten(0, 1)


def rotary_queries(split: RopeSplit, queries: Tensor) -> Tensor:
    """Rows of every head's rotary query, interleaved: fp64 [h, 2n, D] from queries [h, d, D]."""
    slot = to_complex(queries, 1)[:, split.pair.clamp(min=0)] * split.read.T[:, :, None]  # [h, n, D]
    return torch.stack([slot.real, slot.imag], dim=2).flatten(1, 2)


def balance(key_rows: Tensor, query_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give every slot the same gain on both sides, so that low precision rounds neither badly.

    A real factor per slot moves between key [2n, D] and queries [h, 2n, D]; logits do not change.
    """
    n = key_rows.shape[0] // 2
    key_power = key_rows.view(n, -1).square().mean(1)
    query_power = query_rows.view(query_rows.shape[0], n, -1).square().mean((0, 2))
    usable = (key_power > 0) & (query_power > 0)
    ratio = torch.where(usable, query_power / key_power.clamp(min=math.ulp(0.0)), torch.ones_like(key_power))
    factor = ratio.pow(0.25).repeat_interleave(2)[:, None]
    return key_rows * factor, query_rows / factor

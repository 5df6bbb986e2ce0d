"""What the attention of one layer really reads, measured on calibration text.

One call looks at one layer only, so the memory beside the model is bounded by one layer's statistics. Sums
are kept in fp64. Notation: b windows, t and s query and key positions, h heads, g key-value groups, d head
width, j = d/2 rotary pairs, m width of the basis in which the layer's keys and values are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mla.ops.rope import apply_rope

# Numbers of one [heads, T, T] matrix that are held at a time.
_LOGITS = 2**20


@dataclass(frozen=True)
class AttentionWeights:
    """One Llama attention block as plain fp32 matrices, and its inverse frequencies.

    Shapes: ``q`` [h, d, D], ``k`` and ``v`` [g, d, D], ``o`` [h, D, d], ``inv_freq`` fp64 [j]; D is the
    model width. Keys rotate by pairs (j, j + d/2). Where queries and keys have biases, these are one more
    column of ``q``, ``k`` and ``v``, and the block's input has one more number, 1 (:meth:`inputs`). The
    biases of values and output add up to ``constant`` [D], which the block writes at every token: it is no
    part of what the functions here call the block's output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    inv_freq: Tensor
    constant: Tensor

    def inputs(self, normed: Tensor) -> Tensor:
        """What the projections read [..., D or D + 1], from the layer's normed input [..., D]."""
        extra = self.q.shape[-1] - normed.shape[-1]
        return torch.nn.functional.pad(normed, (0, extra), value=1.0) if extra else normed

    @property
    def biased(self) -> bool:
        return self.q.shape[-1] > self.o.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def groups(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        return self.q.shape[1]

    @property
    def group(self) -> Tensor:
        return group_of_heads(self.heads, self.groups)


# How many tokens are followed as the first of a text: as long a stream as two windows'.
MOST_STARTS = 2048


@dataclass(frozen=True)
class Sample:
    """Rows for the tokens of the calibration windows, and for single tokens that begin a text: what a block
    reads or writes there, or hands on.

    A first token attends to itself alone. In most models the first layers turn it into an attention sink, a
    row a hundred times as long as any other (massive activations, arXiv 2402.17762), which all later heads
    look at; where they fail to, the whole text goes wrong. A window holds only one, and which token will
    begin a text is not known: ``starts`` are many of them, each alone.

    Attributes:
        windows: fp32 [b, t, D or D + 1].
        starts: fp32 [n, D or D + 1].
    """

    windows: Tensor
    starts: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of one layer (fp64; complex128 where said), every one a mean over query tokens.

    With attention a_ts, w_ts = a_ts² ‖O_h (v_s − v̄_t)‖² is the squared change of the block's output per unit
    of squared change of the logit (t, s), to first order. z = basis · x holds everything that keys and values
    can see of the input.

    Attributes:
        basis: [m, D], orthonormal rows that span the rows of the key and value weights.
        key_cov: [h, m, m], E Σ_s w_ts (z_s − z̄_t)(z_s − z̄_t)ᵀ; z̄_t = Σ_s a_ts z_s. Centred, because the
            softmax ignores what is constant over s.
        value_cov: [h, m, m], E z̄_t z̄_tᵀ.
        start_cov: [m, m], E z zᵀ of first tokens, whose z̄ is their own z in every head.
        plain_cov: [m, m], E z_s z_sᵀ.
        key_plain_cov: [m, m], the same for keys. Where there are biases, and z holds a constant that is as
            large as they are, it is centred, because the softmax ignores that constant.
        query_moment: [h, d, d], q qᵀ weighted by w, over w.
        pair_moment: complex [h, j, g, g], E Σ_s w_ts |q_hj(t)|² k_gj(s) k_fj(s)*.
        rotation: complex [h, j], weighted mean of e^{iω_j(t−s)}, weight w_ts |q_hj|² |k_gj|².
        lags: [h, T], weight w_ts by lag t − s, sums to one.
    """

    basis: Tensor
    key_cov: Tensor
    value_cov: Tensor
    start_cov: Tensor
    plain_cov: Tensor
    key_plain_cov: Tensor
    query_moment: Tensor
    pair_moment: Tensor
    rotation: Tensor
    lags: Tensor


def joint_basis(weights: AttentionWeights) -> Tensor:
    """Orthonormal basis [m, D] (fp64) of what keys and values read; the identity where that is everything."""
    stack = torch.cat([weights.k.flatten(0, 1), weights.v.flatten(0, 1)]).double()
    width = stack.shape[1]
    if stack.shape[0] >= width:
        return torch.eye(width, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(stack.T).Q.T.contiguous()
    return basis


def group_of_heads(heads: int, groups: int) -> Tensor:
    """Which key-value head each head reads: int64 [h]."""
    return torch.arange(heads) * groups // heads


def rotate(x: Tensor, inv_freq: Tensor, layout: str = "half") -> Tensor:
    """RoPE of x [..., t, p] at positions 0 .. t-1, by fp64 angles; Llama pairs (j, j + p/2)."""
    angles = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), inv_freq)
    return apply_rope(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), layout)


def causal(length: int) -> Tensor:
    """True where a query may look: bool [length, length], lower triangular."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def teacher_block(weights: AttentionWeights, x: Tensor) -> Tensor:
    """What the teacher's block makes of its normed input: fp32 [t, D] from [t, D]."""
    group = weights.group
    q = rotate(torch.einsum("hdD,tD->htd", weights.q, x), weights.inv_freq)
    k = rotate(torch.einsum("gdD,tD->gtd", weights.k, x), weights.inv_freq)
    v = torch.einsum("gdD,tD->gtd", weights.v, x)
    heads = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[group][None], v[group][None], is_causal=True
    )[0]
    return torch.einsum("htd,hDd->tD", heads, weights.o)


def teacher_starts(weights: AttentionWeights, x: Tensor) -> Tensor:
    """The same of first tokens, each alone: fp32 [n, D] from [n, D]."""
    v = torch.einsum("gdD,nD->gnd", weights.v, x)
    return torch.einsum("hnd,hDd->nD", v[weights.group], weights.o)


def to_complex(x: Tensor, dim: int = -1) -> Tensor:
    """[..., d] to complex [..., j]: pair (j, j + d/2) as one number."""
    return torch.complex(*x.chunk(2, dim))


def _portions(count: int, size: int) -> list[Tensor]:
    """0 .. count-1 in portions of ``size``."""
    return [torch.arange(first, min(first + size, count)) for first in range(0, count, size)]


def _sum_by_lag(w: Tensor) -> Tensor:
    """Σ over the diagonals of a lower triangular w [T, T]: entry n is the sum over t − s = n."""
    T = w.shape[0]
    # Row t shifted left by t in a flat buffer of row length T + 1: lag n is in column n of the flipped row.
    skewed = torch.nn.functional.pad(w.flip(1), (0, T)).flatten()[: T * (2 * T - 1)].view(T, 2 * T - 1)
    return skewed.sum(0)[T - 1 :].clone() if T > 1 else w.sum(0)


def collect(weights: AttentionWeights, inputs: Sample) -> LayerStatistics:
    """Run one attention block over calibration windows and measure what it attends to.

    Args:
        weights: the block.
        inputs: of :meth:`AttentionWeights.inputs`.
    """
    H, G, d = weights.heads, weights.groups, weights.head_dim
    windows, T, _ = inputs.windows.shape
    basis = joint_basis(weights)
    project = basis.float()
    m = basis.shape[0]
    f64 = torch.float64
    key_cov = torch.zeros(H, m, m, dtype=f64)
    value_cov = torch.zeros(H, m, m, dtype=f64)
    plain_cov = torch.zeros(m, m, dtype=f64)
    total = torch.zeros(m, dtype=f64)
    query_moment = torch.zeros(H, d, d, dtype=f64)
    pair_moment = torch.zeros(H, d // 2, G, G, dtype=torch.complex128)
    turned = torch.zeros(H, d // 2, dtype=torch.complex128)
    unturned = torch.zeros(H, d // 2, dtype=f64)
    lags = torch.zeros(H, T, dtype=f64)
    output_metric = torch.einsum("hDd,hDe->hde", weights.o, weights.o)
    phase = torch.polar(
        torch.ones(T, d // 2, dtype=f64), torch.outer(torch.arange(T, dtype=f64), weights.inv_freq)
    ).to(torch.complex64)
    hidden_keys = ~causal(T)

    group = weights.group
    for b in range(windows):
        x = inputs.windows[b]
        z = x @ project.T
        plain_cov += (z.T @ z).double()
        total += z.sum(0).double()
        q = torch.einsum("hdD,tD->htd", weights.q, x)
        k = torch.einsum("gdD,tD->gtd", weights.k, x)
        v = torch.einsum("gdD,tD->gtd", weights.v, x)
        q_turned, k_turned = rotate(q, weights.inv_freq) / math.sqrt(d), rotate(k, weights.inv_freq)
        k_pairs = to_complex(k)  # [g, t, j]
        k_powers = k_pairs.abs().square()
        # A few heads at a time: a head's [T, T] matrices are the largest thing here.
        for heads in _portions(H, max(1, _LOGITS // T**2)):
            own = group[heads]
            logits = q_turned[heads] @ k_turned[own].mT
            a = logits.masked_fill_(hidden_keys, -math.inf).softmax(-1)
            # The square of a tiny probability is a denormal number, which many CPUs multiply in software.
            a = torch.threshold_(a, 1e-12, 0.0)
            metric = output_metric[heads]
            v_mean = a @ v[own]
            v_metric = v[own] @ metric
            distance = (v_metric * v[own]).sum(-1)[:, None, :] - 2 * (v_mean @ v_metric.mT)
            distance += ((v_mean @ metric) * v_mean).sum(-1)[:, :, None]
            w = a.square().mul_(distance.clamp_(min=0))
            by_query, by_key = w.sum(2)[..., None], w.sum(1)[..., None]

            z_mean, wz = a @ z, w @ z
            # Σ w (z_s − z̄_t)(z_s − z̄_t)ᵀ with two products instead of three: the cross terms take half of the
            # square each.
            cross = z_mean.mT @ (wz - 0.5 * by_query * z_mean)
            key_cov[heads] += ((z * by_key).mT @ z - cross - cross.mT).double()
            value_cov[heads] += (z_mean.mT @ z_mean).double()
            query_moment[heads] += ((q[heads] * by_query).mT @ q[heads]).double()
            lags[heads] += torch.stack([_sum_by_lag(each) for each in w]).double()

            q_power = to_complex(q[heads]).abs().square()  # [h, t, j]
            k_power = k_powers[own]
            k_phase = phase.conj() * k_power
            wk = torch.complex(w @ k_phase.real, w @ k_phase.imag)
            turned[heads] += (q_power * phase * wk).sum(1)
            unturned[heads] += (q_power * (w @ k_power)).sum(1)
            pair_weight = w.mT @ q_power  # [h, s, j]
            pair_moment[heads] += torch.einsum("hsj,gsj,fsj->hjgf", pair_weight + 0j, k_pairs, k_pairs.conj())

    tokens = windows * T
    plain_cov /= tokens
    # Without biases the mean of z is a small part of it, and every figure is of conversions that leave it in.
    mean = total / tokens
    key_plain_cov = plain_cov - torch.outer(mean, mean) if weights.biased else plain_cov
    starts = (inputs.starts @ project.T).double()
    weight = lags.sum(1)
    tiny = torch.finfo(f64).tiny
    return LayerStatistics(
        basis=basis,
        key_cov=key_cov.div_(tokens),  # the largest of all: in place
        value_cov=value_cov.div_(tokens),
        start_cov=starts.T @ starts / len(starts),
        plain_cov=plain_cov,
        key_plain_cov=key_plain_cov,
        query_moment=query_moment / weight.clamp(min=tiny)[:, None, None],
        pair_moment=pair_moment / tokens,
        rotation=turned / unturned.clamp(min=tiny),
        lags=lags / weight.clamp(min=tiny)[:, None],
    )

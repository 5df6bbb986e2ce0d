"""Attention on whole keys and values of one sequence, in tiles of queries; torch alone, gradients included.

Shapes: s queries, t keys, h query heads on h_k key heads, d and v the widths of a key and of a value.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Scores that are computed at once (64 MiB; a few such tensors exist), but at least one query's.
_AT_ONCE = 2**24


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention, computed in fp32.

    Where gradients are wanted no tile keeps its scores: they are computed again.

    Args:
        q: [s, h, d], floating.
        k: [t, h_k, d], h_k a divisor of h.
        v: [t, h_k, v].
        scale: factor on the scores.
        causal: the queries are the last s keys, and none sees a key after itself.

    Returns:
        out [s, h, v] in the dtype of ``q``, and lse [s, h] in fp32, the natural log-sum-exp of the scaled
        scores. A query that sees no key gives out = 0 and lse = +inf.
    """
    s, h, _ = q.shape
    t, _, width = v.shape
    blind = s if t == 0 else max(s - t, 0) if causal else 0  # the first queries, which see no key
    zero = q[:0].sum() + k[:0].sum() + v[:0].sum()  # for a backward pass where all are blind
    out = [q.new_zeros(blind, h, width) + zero]
    lse = [torch.full((blind, h), torch.inf, dtype=torch.float32, device=q.device)]
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    run = partial(checkpoint, _tile, use_reentrant=False) if torch.is_grad_enabled() else _tile
    size = max(1, _AT_ONCE // max(h * t, 1))
    for start in range(blind, s, size):
        part = run(q[start : start + size], keys, values, scale, t - s + start if causal else None)
        out.append(part[0])
        lse.append(part[1])
    return torch.cat(out), torch.cat(lse)


def _tile(q: Tensor, keys: Tensor, values: Tensor, scale: float, first: int | None) -> tuple[Tensor, Tensor]:
    """out [n, h, v] and lse [n, h] of n queries; keys [h_k, d, t], values [h_k, t, v].

    Query i sees the keys up to the one at ``first`` + i; with None all.
    """
    n, h, d = q.shape
    t, width = values.shape[1:]
    # The query heads of one key head, and their tokens, are the rows of one product.
    rows = q.float().transpose(0, 1).reshape(len(keys), -1, d)
    scores = (rows @ keys * scale).view(h, n, t)
    if first is not None:
        seen = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(first)
        scores = scores.masked_fill(~seen, -torch.inf)
    made = scores.softmax(-1).view(len(keys), -1, t) @ values
    return made.view(h, n, width).transpose(0, 1).to(q.dtype), scores.logsumexp(-1).T

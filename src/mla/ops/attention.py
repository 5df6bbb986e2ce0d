"""Choose a path for MLA, then run it: ``make_plan``, ``decode`` and ``prefill``.

Shapes are in the alphabet of ``mla.ops.reference``: b batch, s query tokens, t key tokens, h heads, n nope
dim, r latent rank, p rope dim, v value dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mla.ops import portable

Path = Literal["absorbed", "expanded"]


@dataclass(frozen=True)
class Plan:
    """Which path one call takes, and why.

    Attributes:
        path: "absorbed" or "expanded".
        absorbed_ops: multiply-adds × 2 of the absorbed path, for one sequence of the batch and all heads.
        expanded_ops: the same for the expanded path.
        reason: one line for people.
    """

    path: Path
    absorbed_ops: int
    expanded_ops: int
    reason: str


def make_plan(
    *,
    s: int,
    t: int,
    h: int,
    n: int,
    r: int,
    p: int,
    v: int,
    causal: bool = True,
    path: Path | Literal["auto"] = "auto",
) -> Plan:
    """Compare both paths by operation count and pick the cheaper one, or the one asked for by name.

    Absorbed, the queries and outputs pass through the up-projections, and every score and every weighted sum
    has the width of the latent; expanded, the t keys pass through them, and scores have the width of a head.
    At 512/64/128/128 and t keys expanded is cheaper above 170.7·t / (t + 170.7) queries.

    Args:
        s, t, h, n, r, p, v: the sizes of one sequence, in the module's alphabet.
        causal: the s queries are the last of the t keys, so that about s²/2 pairs fall away.
        path: "auto", or a path by name.

    Raises:
        ValueError: a path that does not exist.
    """
    pairs = s * t - (s * (s - 1) // 2 if causal and s <= t else 0)
    absorbed_ops = 2 * h * (pairs * (2 * r + p) + s * r * (n + v))
    expanded_ops = 2 * h * (pairs * (n + p + v) + t * r * (n + v))
    if path == "auto":
        path = "absorbed" if absorbed_ops <= expanded_ops else "expanded"
        cheaper, dearer = sorted((absorbed_ops, expanded_ops))
        reason = f"{path} needs {dearer / max(cheaper, 1):.1f} times fewer operations"
    elif path in ("absorbed", "expanded"):
        reason = f"{path} was asked for"
    else:
        raise ValueError(f'expected path "auto", "absorbed" or "expanded", got {path!r}')
    return Plan(path, absorbed_ops, expanded_ops, reason)


def prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    causal: bool = True,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of s queries over t keys that every sequence of the batch has; chunks on a prefix included.

    Args:
        q_nope: [b, s, h, n] queries without position; any floating dtype, the same for all tensors.
        q_rope: [b, s, h, p] rotated queries.
        c_kv: [b, t, r] latents (any strides: a slice of a cache is fine).
        k_rope: [b, t, p] the rotated key that all heads share.
        w_uk: [h, n, r] up-projection of keys.
        w_uv: [h, v, r] up-projection of values.
        scale: factor on the scores; ``MLAConfig.softmax_scale`` knows it.
        causal: the s queries are the last s of the t keys, and each sees no key after itself.
        mask: broadcastable to [b, h, s, t]; bool (True attends) or floating (added to the scaled scores).
        sinks: [h] one more logit per head in the softmax, without a value.
        dropout: probability with which an attention weight is dropped (training).
        plan: from :func:`make_plan`; made here when None.

    Returns:
        out [b, s, h, v] in the dtype of ``q_nope``, and lse [b, s, h] in fp32: the natural log-sum-exp of
        the scaled, masked scores without the sink. A query that sees no key gives out = 0, lse = -inf.

    Raises:
        ValueError: shapes that do not fit together: which tensor, what was expected, what came.
    """
    _check(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, mask, sinks)
    if plan is None:
        plan = plan_for(q_nope, c_kv, k_rope, w_uv, causal=causal)
    run = portable.absorbed if plan.path == "absorbed" else portable.expanded
    return run(
        q_nope,
        q_rope,
        c_kv,
        k_rope,
        w_uk,
        w_uv,
        scale=scale,
        causal=causal,
        mask=mask,
        sinks=sinks,
        dropout=dropout,
    )


def decode(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    lengths: Sequence[int] | Tensor,
    causal: bool = True,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a ragged cache: sequence i sees its first ``lengths[i]`` keys only.

    The s queries of sequence i are its last s tokens, ``lengths[i] - s`` to ``lengths[i] - 1``. Cache rows
    from ``lengths[i]`` on are never read, whatever they hold. A length of 0 gives out = 0 and lse = -inf.

    Args:
        lengths: b numbers from 0 to t, a sequence or an integer tensor [b].
        Others and results: as for :func:`prefill`.

    Raises:
        ValueError: shapes that do not fit together, or a length outside 0..t.
    """
    _check(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, mask, sinks)
    b, t = c_kv.shape[:2]
    sizes = [int(length) for length in lengths]
    if len(sizes) != b or any(not 0 <= size <= t for size in sizes):
        raise ValueError(f"lengths: expected {b} numbers from 0 to {t}, got {sizes}")
    out, lse = [], []
    for i, size in enumerate(sizes):
        row_mask = None
        if mask is not None:
            full = mask.expand(b, mask.shape[1], mask.shape[2], t)
            row_mask = full[i : i + 1, :, :, :size]
        row_out, row_lse = prefill(
            q_nope[i : i + 1],
            q_rope[i : i + 1],
            c_kv[i : i + 1, :size],
            k_rope[i : i + 1, :size],
            w_uk,
            w_uv,
            scale=scale,
            causal=causal,
            mask=row_mask,
            sinks=sinks,
            plan=plan,
        )
        out.append(row_out)
        lse.append(row_lse)
    return torch.cat(out), torch.cat(lse)


def plan_for(
    q_nope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uv: Tensor,
    *,
    causal: bool = True,
    path: Path | Literal["auto"] = "auto",
) -> Plan:
    """:func:`make_plan` with the sizes read off the tensors."""
    return make_plan(
        s=q_nope.shape[1],
        t=c_kv.shape[1],
        h=q_nope.shape[2],
        n=q_nope.shape[3],
        r=c_kv.shape[2],
        p=k_rope.shape[2],
        v=w_uv.shape[1],
        causal=causal,
        path=path,
    )


def _check(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
) -> None:
    if q_nope.ndim != 4:
        raise ValueError(f"q_nope: expected 4 dimensions [b, s, h, n], got shape {tuple(q_nope.shape)}")
    if c_kv.ndim != 3:
        raise ValueError(f"c_kv: expected 3 dimensions [b, t, r], got shape {tuple(c_kv.shape)}")
    b, s, h, n = q_nope.shape
    t, r = c_kv.shape[1:]
    p, v = k_rope.shape[-1], w_uv.shape[1] if w_uv.ndim == 3 else -1
    expected = {
        "q_rope [b, s, h, p]": (q_rope, (b, s, h, p)),
        "c_kv [b, t, r]": (c_kv, (b, t, r)),
        "k_rope [b, t, p]": (k_rope, (b, t, p)),
        "w_uk [h, n, r]": (w_uk, (h, n, r)),
        "w_uv [h, v, r]": (w_uv, (h, v, r)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if sinks is not None and tuple(sinks.shape) != (h,):
        raise ValueError(f"sinks [h]: expected shape {(h,)}, got {tuple(sinks.shape)}")
    if mask is not None:
        fits = mask.ndim == 4 and all(
            have in (1, want) for have, want in zip(mask.shape, (b, h, s, t), strict=True)
        )
        if not fits:
            raise ValueError(
                f"mask: expected a shape that broadcasts to [b, h, s, t] = {(b, h, s, t)}, "
                f"got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"mask: expected bool or a floating dtype, got {mask.dtype}")

"""Choose a path for MLA, then run it: ``make_plan``, ``decode`` and ``prefill``.

Shapes are in the alphabet of ``mla.ops.reference``: b batch, s query tokens, t key tokens, h heads, n nope
dim, r latent rank, p rope dim, v value dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mla.ops import arguments, native, portable

Path = Literal["absorbed", "expanded"]

# Numbers of a mask that are compared at once.
_COMPARED = 2**24


@dataclass(frozen=True)
class Plan:
    """Which path one call takes, and why.

    Attributes:
        path: "absorbed" or "expanded".
        absorbed_ops: multiply-adds × 2 of the absorbed path, for one sequence of the batch and all heads.
        expanded_ops: the same for the expanded path.
        asked: the path was asked for by name.
    """

    path: Path
    absorbed_ops: int
    expanded_ops: int
    asked: bool

    @property
    def reason(self) -> str:
        """One line for people. (No field: torch.compile would put the sizes it says into the graph.)"""
        if self.asked:
            return f"{self.path} was asked for"
        cheaper, dearer = sorted((self.absorbed_ops, self.expanded_ops))
        return f"{self.path} needs {dearer / max(cheaper, 1):.1f} times fewer operations"


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
    At 512/64/128/128, t keys and not causal, expanded is cheaper above 170.7·t / (t + 170.7) queries.

    Args:
        s, t, h, n, r, p, v: the sizes of one sequence, in the module's alphabet.
        causal: the s queries are the last of the t keys, so that about s²/2 pairs fall away.
        path: "auto", or a path by name.

    Raises:
        ValueError: a path that does not exist.
    """
    check_path(path)
    pairs = s * t - (s * (s - 1) // 2 if causal and s <= t else 0)
    absorbed_ops = 2 * h * (pairs * (2 * r + p) + s * r * (n + v))
    expanded_ops = 2 * h * (pairs * (n + p + v) + t * r * (n + v))
    if path == "auto":
        cheaper: Path = "absorbed" if arguments.holds(absorbed_ops <= expanded_ops) else "expanded"
        return Plan(cheaper, absorbed_ops, expanded_ops, asked=False)
    return Plan(path, absorbed_ops, expanded_ops, asked=True)


def check_path(path: str) -> None:
    """Refuse, by a ValueError, a path that does not exist."""
    if path not in ("auto", "absorbed", "expanded"):
        raise ValueError(f'expected path "auto", "absorbed" or "expanded", got {path!r}')


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
    latent_scale: Tensor | None = None,
    dropout: float = 0.0,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of s queries over t keys that every sequence of the batch has; chunks on a prefix included.

    CPU tensors without gradients run in the C++ kernels (``ops.native``); with gradients or dropout, in
    fp16 or fp64, under a mask that is neither one of keys nor the causal one on top of it (in a compiled
    graph: one with a row for every query), or on another device, in torch (``ops.portable``).

    Args:
        q_nope: [b, s, h, n] queries without position; any floating dtype.
        q_rope: [b, s, h, p] rotated queries.
        c_kv: [b, t, r] latents (any strides: a slice of a cache is fine), floating, or int8.
        k_rope: [b, t, p] the rotated key that all heads share.
        w_uk: [h, n, r] up-projection of keys.
        w_uv: [h, v, r] up-projection of values.
        scale: factor on the scores, finite; ``MLAConfig.softmax_scale`` knows it.
        causal: the s queries are the last s of the t keys, and each sees no key after itself.
        mask: broadcastable to [b, h, s, t]; bool (True attends) or floating (added to the scaled scores).
        sinks: [h] one more logit per head in the softmax, without a value.
        latent_scale: [b, t] fp32, the factors of int8 latents (``ops.latent``), beside them only.
        dropout: probability with which an attention weight is dropped (training).
        plan: from :func:`make_plan`; made here when None.

    Returns:
        out [b, s, h, v] in the dtype of ``q_nope``, and lse [b, s, h] in fp32 (fp64 beside fp64): the natural
        log-sum-exp of the scaled, masked scores without the sink. A query that sees no key gives out = 0, lse
        = -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together: which tensor, what was expected, what
            came.
    """
    arguments.check_scale(scale)
    _check(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, mask, sinks, latent_scale)
    if plan is None:
        plan = plan_for(q_nope, c_kv, k_rope, w_uv, causal=causal)
    if _kernels_take(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, sinks, latent_scale, dropout):
        simple = _simple_mask(mask, causal, q_nope.shape[1], c_kv.shape[1])
        if simple is not None:
            b, t = c_kv.shape[:2]
            lengths = torch.full((b,), t, dtype=torch.int32, device=c_kv.device)
            tensors = (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, sinks, latent_scale)
            return _native(*tensors, lengths, scale, *simple, plan)
    run = portable.absorbed if plan.path == "absorbed" else portable.expanded
    with portable.no_autocast(q_nope.device.type):
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
            latent_scale=latent_scale,
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
    page_table: Tensor | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    latent_scale: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a ragged cache: sequence i sees its first ``lengths[i]`` keys only.

    The s queries of sequence i are its last s tokens, ``lengths[i] - s`` to ``lengths[i] - 1``. Cache rows
    from ``lengths[i]`` on are never read, whatever they hold. A length of 0 gives out = 0 and lse = -inf.

    Args:
        lengths: b numbers from 0 to t, a sequence or an integer tensor [b].
        page_table: [b, pages of a sequence] int32 or int64: the cache is in pages, which sequences may share.
            ``c_kv`` is [pages, page size, r] then, ``k_rope`` [pages, page size, p], ``latent_scale`` [pages,
            page size], and t what the pages of a sequence hold. Entries behind a length are never read.
        Others and results: as for :func:`prefill`.

    Raises:
        ValueError: as for :func:`prefill`, or a length outside 0..t, or a page that is not there.
    """
    arguments.check_scale(scale)
    _check(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, mask, sinks, latent_scale, page_table)
    b = len(q_nope)
    page_size = c_kv.shape[1]
    t = page_size if page_table is None else page_table.shape[1] * page_size
    given = lengths.flatten().tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(given) != b or any(not 0 <= length <= t or length != int(length) for length in given):
        raise ValueError(f"lengths: expected {b} whole numbers from 0 to {t}, got {given}")
    sizes = [int(length) for length in given]
    ends = torch.tensor(sizes, dtype=torch.int32, device=c_kv.device)
    if page_table is not None:
        page_table, _ = arguments.used_pages("page_table", page_table, ends, *c_kv.shape[:2])
    # A mask with a row per query counts them from the end of each sequence: it stays with its sequence.
    if _kernels_take(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, sinks, latent_scale, 0.0) and (
        mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))
    ):
        if plan is None:
            plan = plan_for(q_nope, c_kv, k_rope, w_uv, t=max(sizes, default=t), causal=causal)
        key_mask = None if mask is None else mask[:, 0, 0]
        tensors = (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, sinks, latent_scale)
        return _native(*tensors, ends, scale, key_mask, causal, plan, page_table)
    out, lse = [], []
    for i, size in enumerate(sizes or [t]):  # no sequences: one part of none
        row = slice(i, i + 1)

        def held(x: Tensor, row: slice = row, size: int = size) -> Tensor:
            """The rows [1, size, ...] of this sequence."""
            if page_table is None:
                return x[row, :size]
            return x[page_table[row, : -(-size // max(page_size, 1))]].flatten(1, 2)[:, :size]

        row_mask = None
        if mask is not None:
            row_mask = mask.expand(b, mask.shape[1], mask.shape[2], t)[row, :, :, :size]
        row_out, row_lse = prefill(
            q_nope[row],
            q_rope[row],
            held(c_kv),
            held(k_rope),
            w_uk,
            w_uv,
            scale=scale,
            causal=causal,
            mask=row_mask,
            sinks=sinks,
            latent_scale=None if latent_scale is None else held(latent_scale),
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
    t: int | None = None,
    causal: bool = True,
    path: Path | Literal["auto"] = "auto",
) -> Plan:
    """:func:`make_plan` with the sizes read off the tensors; ``t`` where the latents are in pages."""
    return make_plan(
        s=q_nope.shape[1],
        t=c_kv.shape[1] if t is None else t,
        h=q_nope.shape[2],
        n=q_nope.shape[3],
        r=c_kv.shape[2],
        p=k_rope.shape[2],
        v=w_uv.shape[1],
        causal=causal,
        path=path,
    )


def _kernels_take(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    sinks: Tensor | None,
    latent_scale: Tensor | None,
    dropout: float,
) -> bool:
    """Whether the C++ kernels can run a call, its mask aside."""
    given = (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, sinks, latent_scale)
    tensors = [x for x in given if x is not None]
    computed = {q_nope.dtype, q_rope.dtype, w_uk.dtype, w_uv.dtype}
    return (
        native.best() is not None
        and dropout == 0.0
        and all(x.device.type == "cpu" for x in tensors)
        and computed <= arguments.QUERY_DTYPES
        and len(computed) == 1
        and c_kv.dtype in arguments.CACHE_DTYPES
        and k_rope.dtype == arguments.rope_dtype(c_kv.dtype)
        and arguments.has_rows(c_kv)
        and arguments.has_rows(k_rope)
        and not arguments.needs_grad(*tensors)
    )


def _simple_mask(mask: Tensor | None, causal: bool, s: int, t: int) -> tuple[Tensor | None, bool] | None:
    """(mask of keys [b or 1, t or 1], causal) that says the same, or None if there is none."""
    if mask is None or s == 0:
        return None, causal
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    if mask.shape[2] == 1:
        return mask[:, 0, 0], causal
    if not arguments.has_values(mask):
        return None
    # Transformers writes padding and the causal limit into one mask, whose last query sees every key that is
    # not padding. Comparing costs one byte per score, next to nothing beside the score.
    mask = mask.expand(-1, -1, -1, t)
    if _says(mask, causal=True):
        return mask[:, 0, -1], True
    if _says(mask, causal=False):  # a mask of keys, written out for every query
        return mask[:, 0, -1], causal
    return None


def _says(mask: Tensor, *, causal: bool) -> bool:
    """Whether a mask [b, 1, s, t] says no more than its last row, and a causal limit."""
    b, _, s, t = mask.shape
    keys, size = mask[:, :, -1:], max(1, _COMPARED // max(1, b * t))
    for first in range(0, s, size):
        part = mask[:, :, first : first + size]
        wanted = keys.expand_as(part)
        if causal:
            seen = torch.ones(part.shape[2:], dtype=torch.bool, device=mask.device)
            wanted = wanted & seen.tril(t - s + first)
        if not torch.equal(part, wanted):
            return False
    return True


def _native(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    sinks: Tensor | None,
    latent_scale: Tensor | None,
    lengths: Tensor,
    scale: float,
    key_mask: Tensor | None,
    causal: bool,
    plan: Plan,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if key_mask is not None:
        t = c_kv.shape[1] * (1 if page_table is None else page_table.shape[1])
        key_mask = key_mask.expand(q_nope.shape[0], t).contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    attend = native.prefill if plan.path == "expanded" else native.absorbed
    return attend(
        q_nope,
        q_rope,
        c_kv,
        k_rope,
        w_uk,
        w_uv,
        lengths,
        scale=scale,
        causal=causal,
        latent_scale=latent_scale,
        page_table=page_table,
        key_mask=key_mask,
        sinks=sinks,
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
    latent_scale: Tensor | None,
    page_table: Tensor | None = None,
) -> None:
    if q_nope.ndim != 4:
        raise ValueError(f"q_nope: expected 4 dimensions [b, s, h, n], got shape {tuple(q_nope.shape)}")
    rows = "b, t" if page_table is None else "pages, page size"
    for name, tensor, sizes in (
        ("c_kv", c_kv, f"[{rows}, r]"),
        ("k_rope", k_rope, f"[{rows}, p]"),
        ("w_uv", w_uv, "[h, v, r]"),
    ):
        if tensor.ndim != 3:
            raise ValueError(f"{name}: expected 3 dimensions {sizes}, got shape {tuple(tensor.shape)}")
    b, s, h, n = q_nope.shape
    held, r = (b, c_kv.shape[1]), c_kv.shape[2]
    t, p, v = c_kv.shape[1], k_rope.shape[2], w_uv.shape[1]
    if page_table is not None:
        _check_device("page_table", page_table, q_nope)
        fits = page_table.ndim == 2 and len(page_table) == b
        if not fits or page_table.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"page_table: expected int32 or int64 [b, pages of a sequence] with b = {b}, "
                f"got {page_table.dtype} {tuple(page_table.shape)}"
            )
        held, t = (c_kv.shape[0], c_kv.shape[1]), page_table.shape[1] * c_kv.shape[1]
    expected = {
        "q_nope [b, s, h, n]": (q_nope, (b, s, h, n)),
        "q_rope [b, s, h, p]": (q_rope, (b, s, h, p)),
        f"c_kv [{rows}, r]": (c_kv, (*held, r)),
        f"k_rope [{rows}, p]": (k_rope, (*held, p)),
        "w_uk [h, n, r]": (w_uk, (h, n, r)),
        "w_uv [h, v, r]": (w_uv, (h, v, r)),
    }
    if (c_kv.dtype == torch.int8) != (latent_scale is not None):
        wanted, came = ("a tensor", "None") if latent_scale is None else ("None", "a tensor")
        raise ValueError(f"latent_scale: expected {wanted} beside {c_kv.dtype} latents, got {came}")
    if latent_scale is not None:
        expected[f"latent_scale [{rows}]"] = (latent_scale, held)
    if sinks is not None:
        expected["sinks [h]"] = (sinks, (h,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point() and (tensor is not c_kv or latent_scale is None):
            raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        _check_device(name, tensor, q_nope)
    if mask is not None:
        _check_device("mask", mask, q_nope)
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


def _check_device(name: str, x: Tensor, q_nope: Tensor) -> None:
    if x.device != q_nope.device:
        raise ValueError(f"{name}: expected a tensor on {q_nope.device}, as q_nope, got one on {x.device}")

"""The C++ kernels as torch operators ``mla::decode`` and ``mla::prefill``: CPU tensors, no gradients.

The operators are registered when this module is imported, with shape functions, so that ``torch.compile`` and
``torch.export`` see them. ``instruction_sets()`` says what runs here; it is empty where the package was built
without a compiler. Shapes are in the alphabet of ``mla.ops.reference``.
"""

import logging
import math
import os
from typing import Any

import torch
from torch import Tensor

from mla.errors import MLAError

try:
    from mla import _kernels as _built
except ImportError:
    _built = None
_kernels: Any = _built

_log = logging.getLogger(__name__)

# The numbers of csrc/attention.h.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

CACHE_DTYPES = frozenset(_TYPES)
QUERY_DTYPES = frozenset({torch.float32, torch.bfloat16})


def instruction_sets() -> tuple[str, ...]:
    """Names of the kernels that run on this machine, best first: of "avx512_bf16",
    "avx512_vnni", "avx2" and "generic"."""
    return _AVAILABLE


def best() -> str | None:
    """The instruction set that is used when none is named, None without kernels.

    The environment variable ``MLA_ISA``, read when this module is imported, names another one.
    """
    return _BEST


def rope_dtype(latents: torch.dtype) -> torch.dtype:
    """The dtype of rotary keys beside latents of a dtype that the kernels take."""
    return torch.float32 if latents == torch.float32 else torch.bfloat16


def check_scale(scale: float, name: str = "scale") -> None:
    """Refuse a factor that makes every score NaN. A negative one is a number like any other."""
    if not abs(scale) < math.inf:  # math.isfinite would break the graph of torch.compile
        raise ValueError(f"{name}: expected a finite number, got {scale}")


def has_rows(x: Tensor) -> bool:
    """Whether the numbers of the last dimension lie side by side, as the kernels read them."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def decode(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    causal: bool = True,
    latent_scale: Tensor | None = None,
    page_table: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention over a ragged, contiguous or paged latent cache.

    Args:
        q_latent: [b, s, h, r] absorbed queries (q_nope · w_uk), fp32 or bf16.
        q_rope: [b, s, h, p] rotated queries, of the same dtype.
        c_kv: [b, t, r] latents; with ``page_table`` [pages, page size, r]. fp32, bf16, or int8 with
            ``latent_scale``. Any strides, but the last dimension must be contiguous.
        k_rope: [b, t, p] (or in pages) the rotary key: fp32 beside fp32 latents, else bf16.
        lengths: [b] int32, the keys of each sequence, from 0 to t (or to what the table's pages hold). Rows
            from there on are never read. The s queries are the last s of them.
        scale: factor on the scores, finite.
        causal: no query sees a key after itself.
        latent_scale: [b, t] (or in pages) fp32, the factor of each token's int8 latent. It is data and not
            checked: NaN gives NaN to the queries that see it.
        page_table: [b, pages per sequence] int32. Entries beyond a length are never read; -1 stands for keys
            that do not exist. With pages of one token the table is a list of tokens: sparse attention.
        key_mask: [b, t] bool, True where a key may be seen.
        sinks: [h] fp32, one more logit per head in the softmax, without a value.
        isa: an instruction set by name; :func:`best` when None.

    Returns:
        out [b, s, h, r] in the dtype of ``q_latent``, and lse [b, s, h] in fp32: the natural log-sum-exp of
        the scaled, masked scores without the sink. A query that sees no key gives out = 0, lse = -inf.

    Raises:
        ValueError: shapes, dtypes, devices, lengths or pages that do not fit: which, what was expected, what
            came; an instruction set that is not available.
    """
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.mla.decode.default(
        q_latent,
        q_rope,
        c_kv,
        k_rope,
        lengths,
        latent_scale,
        page_table,
        key_mask,
        sinks,
        scale,
        causal,
        isa,
    )
    return out, lse


def prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    causal: bool = True,
    latent_scale: Tensor | None = None,
    page_table: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Expanded attention; keys and values are rebuilt from the latents for one head and tile at a time.

    Args:
        q_nope: [b, s, h, n] queries without position, fp32 or bf16.
        q_rope: [b, s, h, p] rotated queries, of the same dtype.
        w_uk: [h, n, r] up-projection of keys, fp32 or bf16.
        w_uv: [h, v, r] up-projection of values, of the same dtype.
        Others, results and errors: as for :func:`decode`, with out [b, s, h, v].
    """
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.mla.prefill.default(
        q_nope,
        q_rope,
        c_kv,
        k_rope,
        w_uk,
        w_uv,
        lengths,
        latent_scale,
        page_table,
        key_mask,
        sinks,
        scale,
        causal,
        isa,
    )
    return out, lse


def ceiling(isa: str, rounds: int) -> float:
    """Run the instruction that carries the products of ``isa`` on one thread, out of registers.

    Returns the operations done, two per multiply-add: divided by the time taken they are the bound of the
    kernels on this machine.
    """
    done: float = _kernels.ceiling(_choose(isa), rounds)
    return done


def _decode(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    page_table: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    isa: str | None,
) -> tuple[Tensor, Tensor]:
    isa = _choose(isa)
    check_scale(scale)
    _check_queries(q_latent, q_rope, c_kv, "q_latent [b, s, h, r]", absorbed=True)
    _check_cache(q_latent, c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks)
    b, s, h, _ = q_latent.shape
    _expect("q_rope [b, s, h, p]", q_rope, (b, s, h, k_rope.shape[-1]))
    q_latent, q_rope = _rows(q_latent), _rows(q_rope)
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    lse = torch.empty((b, s, h), dtype=torch.float32)
    if b * s * h:
        cache, sizes = _arguments(c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks, lse)
        queries = (_heads(q_latent), _heads(q_rope), _heads(out))
        _kernels.decode(isa, cache, sizes, scale, causal, torch.get_num_threads(), *queries)
    return out, lse


def _prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    page_table: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    isa: str | None,
) -> tuple[Tensor, Tensor]:
    isa = _choose(isa)
    check_scale(scale)
    _check_queries(q_nope, q_rope, c_kv, "q_nope [b, s, h, n]", absorbed=False)
    _check_cache(q_nope, c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks)
    b, s, h, n = q_nope.shape
    r, p = c_kv.shape[-1], k_rope.shape[-1]
    _expect("q_rope [b, s, h, p]", q_rope, (b, s, h, p))
    _expect("w_uk [h, n, r]", w_uk, (h, n, r))
    v = w_uv.shape[1] if w_uv.ndim == 3 else -1
    _expect("w_uv [h, v, r]", w_uv, (h, v, r))
    if w_uk.dtype not in QUERY_DTYPES or w_uv.dtype != w_uk.dtype:
        raise ValueError(f"w_uk and w_uv: expected both fp32 or both bf16, got {w_uk.dtype} and {w_uv.dtype}")
    q_nope, q_rope, w_uk, w_uv = _rows(q_nope), _rows(q_rope), _rows(w_uk), _rows(w_uv)
    out = torch.empty((b, s, h, v), dtype=q_nope.dtype)
    lse = torch.empty((b, s, h), dtype=torch.float32)
    if b * s * h:
        cache, sizes = _arguments(c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks, lse)
        tensors = (_heads(q_nope), _heads(q_rope), _weight(w_uk), _weight(w_uv), _heads(out))
        _kernels.prefill(isa, cache, sizes, scale, causal, torch.get_num_threads(), *tensors, n, v)
    return out, lse


def _choose(isa: str | None) -> str:
    if isa is None:
        isa = _BEST
    if isa not in _AVAILABLE:
        raise ValueError(f"isa: {_expected(_AVAILABLE)}, got {isa}")
    return isa


def _expected(available: tuple[str, ...]) -> str:
    have = ", ".join(available) or "none: mla was installed without its C++ kernels"
    return f"expected an instruction set of this machine ({have})"


def _check_queries(q: Tensor, q_rope: Tensor, c_kv: Tensor, name: str, *, absorbed: bool) -> None:
    if c_kv.ndim != 3:
        raise ValueError(f"c_kv: expected [b, t, r] or [pages, page size, r], got {tuple(c_kv.shape)}")
    if q.ndim != 4 or (absorbed and q.shape[3] != c_kv.shape[2]):
        wanted = f"4 dimensions, the last of {c_kv.shape[2]}" if absorbed else "4 dimensions"
        raise ValueError(f"{name}: expected {wanted}, got shape {tuple(q.shape)}")
    if q.dtype not in QUERY_DTYPES or q_rope.dtype != q.dtype:
        raise ValueError(f"queries: expected both fp32 or both bf16, got {q.dtype} and {q_rope.dtype}")


def _check_cache(
    q: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    page_table: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
) -> None:
    b, _, h, _ = q.shape
    pages, size, _ = c_kv.shape
    latents = c_kv.dtype
    if latents not in CACHE_DTYPES:
        raise ValueError(f"c_kv: expected fp32, bf16 or int8, got {latents}")
    if k_rope.dtype != rope_dtype(latents):
        wanted = f"{rope_dtype(latents)} beside {latents} latents"
        raise ValueError(f"k_rope: expected {wanted}, got {k_rope.dtype}")
    if page_table is None:
        if pages != b:
            _expect("c_kv [b, t, r]", c_kv, (b, *c_kv.shape[1:]))
    elif page_table.dtype != torch.int32 or page_table.ndim != 2 or page_table.shape[0] != b:
        raise ValueError(
            f"page_table: expected int32 [{b}, pages], got {page_table.dtype} {tuple(page_table.shape)}"
        )
    if k_rope.ndim != 3:
        raise ValueError(f"k_rope: expected 3 dimensions, as c_kv, got shape {tuple(k_rope.shape)}")
    _expect("k_rope", k_rope, (pages, size, k_rope.shape[2]))
    for name, tensor in (("c_kv", c_kv), ("k_rope", k_rope)):
        if not has_rows(tensor):
            raise ValueError(f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}")
    if (latents == torch.int8) != (latent_scale is not None):
        wanted, came = ("a tensor", "None") if latent_scale is None else ("None", "a tensor")
        raise ValueError(f"latent_scale: expected {wanted} beside {latents} latents, got {came}")
    if latent_scale is not None:
        _expect("latent_scale", latent_scale, (pages, size), torch.float32)
    _expect("lengths [b]", lengths, (b,), torch.int32)
    if key_mask is not None:
        room = size * (1 if page_table is None else page_table.shape[1])
        _expect("key_mask [b, t]", key_mask, (b, room), torch.bool)
    if sinks is not None:
        _expect("sinks [h]", sinks, (h,), torch.float32)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype):
        wanted = f"{dtype} {shape}" if dtype else f"shape {shape}"
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous."""
    return x if has_rows(x) else x.contiguous()


def _arguments(
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    page_table: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    lse: Tensor,
) -> tuple[tuple[object, ...], tuple[int, ...]]:
    """Cache and sizes in the form of csrc/binding.cpp; the tensors must outlive the call."""
    for name, tensor in (("page_table", page_table), ("key_mask", key_mask)):
        if tensor is not None and not has_rows(tensor):
            raise ValueError(f"{name}: expected contiguous rows, got strides {tensor.stride()}")
    for name, tensor in (("lengths", lengths), ("sinks", sinks)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    pages, size, r = c_kv.shape
    cache = (
        _pages(c_kv),
        _pages(k_rope),
        (0, 0, 0) if latent_scale is None else _pages(latent_scale),
        _TYPES[c_kv.dtype],
        0 if page_table is None else page_table.data_ptr(),
        0 if page_table is None else page_table.stride(0),
        0 if page_table is None else page_table.shape[1],
        pages,
        max(size, 1),
        r,
        k_rope.shape[2],
    )
    sizes = (
        *lse.shape,
        lengths.data_ptr(),
        0 if key_mask is None else key_mask.data_ptr(),
        0 if key_mask is None else key_mask.stride(0),
        0 if sinks is None else sinks.data_ptr(),
        lse.data_ptr(),
    )
    return cache, sizes


# Every look at a tensor costs 0.1 to 0.3 microseconds, and a short decode takes thirty: few are taken twice.


def _pages(x: Tensor) -> tuple[int, int, int]:
    size, strides = x.element_size(), x.stride()
    return x.data_ptr(), strides[0] * size, strides[1] * size


def _heads(x: Tensor) -> tuple[int, ...]:
    size, (b, s, h, _) = x.element_size(), x.stride()
    return x.data_ptr(), _TYPES[x.dtype], b * size, s * size, h * size


def _weight(x: Tensor) -> tuple[int, ...]:
    size, (h, row, _) = x.element_size(), x.stride()
    return x.data_ptr(), _TYPES[x.dtype], h * size, row * size


def _check_devices(**tensors: Tensor | None) -> None:
    """A single tensor on "meta" makes torch run the shape function, whose results hold nothing."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        name, device = next((name, device) for name, device in devices.items() if device.type != "cpu")
        raise ValueError(f"{name}: expected a CPU tensor, got one on {device}")


def _decode_shapes(
    q_latent: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    page_table: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor]:
    _check_devices(
        q_latent=q_latent,
        q_rope=q_rope,
        c_kv=c_kv,
        k_rope=k_rope,
        lengths=lengths,
        latent_scale=latent_scale,
        page_table=page_table,
        key_mask=key_mask,
        sinks=sinks,
    )
    return q_latent.new_empty(q_latent.shape), q_latent.new_empty(q_latent.shape[:3], dtype=torch.float32)


def _prefill_shapes(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    page_table: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    *options: object,
) -> tuple[Tensor, Tensor]:
    _check_devices(
        q_nope=q_nope,
        q_rope=q_rope,
        c_kv=c_kv,
        k_rope=k_rope,
        w_uk=w_uk,
        w_uv=w_uv,
        lengths=lengths,
        latent_scale=latent_scale,
        page_table=page_table,
        key_mask=key_mask,
        sinks=sinks,
    )
    b, s, h, _ = q_nope.shape
    return q_nope.new_empty((b, s, h, w_uv.shape[1])), q_nope.new_empty((b, s, h), dtype=torch.float32)


def _find_best(available: tuple[str, ...]) -> str | None:
    wanted = os.environ.get("MLA_ISA")
    if wanted and wanted not in available:
        remedy = "name one of them or unset the variable" if available else "unset the variable"
        raise MLAError(f"environment variable MLA_ISA: {_expected(available)}, got {wanted}; {remedy}")
    if not available:
        _log.warning(
            "mla was installed without its C++ kernels: attention runs on torch alone; "
            "for the kernels install a C++ compiler and Python's headers, then mla again"
        )
    return wanted or next(iter(available), None)


_AVAILABLE: tuple[str, ...] = () if _kernels is None else tuple(_kernels.instruction_sets())
_BEST = _find_best(_AVAILABLE)

_OPTIONS = (
    "Tensor lengths, Tensor? latent_scale, Tensor? page_table, Tensor? key_mask, Tensor? sinks, "
    "float scale, bool causal, str? isa"
)
_DECODE = f"decode(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope, {_OPTIONS})"
_PREFILL = (
    f"prefill(Tensor q_nope, Tensor q_rope, Tensor c_kv, Tensor k_rope, Tensor w_uk, Tensor w_uv, {_OPTIONS})"
)
_library: Any = torch.library.Library("mla", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"{_DECODE} -> (Tensor, Tensor)")
_library.define(f"{_PREFILL} -> (Tensor, Tensor)")
_library.impl("decode", _decode, "CPU")
_library.impl("prefill", _prefill, "CPU")
torch.library.register_fake("mla::decode", _decode_shapes)
torch.library.register_fake("mla::prefill", _prefill_shapes)

"""The C++ kernels as torch operators ``mla::decode``, ``absorbed``, ``prefill`` and ``linear``.

CPU tensors, no gradients. The operators are registered when this module is imported, with shape functions, so
that ``torch.compile`` and ``torch.export`` see them. ``instruction_sets()`` says what runs here; it is empty
where the package was built without a compiler. Shapes are in the alphabet of ``mla.ops.reference``.
"""

import functools
import importlib
import logging
import os
from typing import Any

import torch
from torch import Tensor

from mla.errors import MLAError
from mla.ops import arguments

_kernels: Any = None
_why_not = "mla was installed without its C++ kernels"
try:
    _kernels = importlib.import_module("mla._kernels")
except ModuleNotFoundError:
    pass
except ImportError as error:  # built for another libstdc++ than the one that is loaded, for one
    _why_not = f"mla's C++ kernels do not load ({error})"

_log = logging.getLogger(__name__)

# Bytes of absorbed queries that exist at once, and at most of their sums: the C library keeps pieces of up to
# that size for the next call.
_AT_ONCE = 2**25


def instruction_sets() -> tuple[str, ...]:
    """Names of the kernels that run on this machine, best first: of "amx",
    "avx512_bf16", "avx512_vnni", "avx2" and "generic"."""
    return _AVAILABLE


def best() -> str | None:
    """The instruction set that is used when none is named, None without kernels.

    The environment variable ``MLA_ISA``, read when this module is imported, names another one.
    """
    return _BEST


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
            came; an instruction set that is not available; a tensor that requires a gradient, where those
            are recorded.
    """
    tensors = (q_latent, q_rope, c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks)
    made: tuple[Tensor, Tensor] = torch.ops.mla.decode.default(*tensors, scale, causal, isa)
    return made


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
    tensors = (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, lengths, latent_scale, page_table, key_mask, sinks)
    made: tuple[Tensor, Tensor] = torch.ops.mla.prefill.default(*tensors, scale, causal, isa)
    return made


def absorbed(
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
    """Absorbed attention from queries to outputs: :func:`decode` and the products with the weights around it.

    Meant for few queries: queries and sums in the latent space take 4·b·s·h·(2r + p) bytes for the time of
    the call, up to 64 MiB: more queries are served part by part. They are stored in fp32, whatever the dtype
    of queries and weights, and rounded where they are multiplied, as in :func:`decode`; by "amx" and
    "avx512_bf16" to bf16, for products with weights in bf16, too.

    Args, results and errors: as for :func:`prefill`, which computes the same.
    """
    tensors = (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, lengths, latent_scale, page_table, key_mask, sinks)
    made: tuple[Tensor, Tensor] = torch.ops.mla.absorbed.default(*tensors, scale, causal, isa)
    return made


def linear(x: Tensor, weight: Tensor, *, isa: str | None = None) -> Tensor:
    """A linear layer: x · weightᵀ, summed in fp32. Meant for up to a hundred rows, on the weight as it lies.

    Args:
        x: [..., k], fp32 or bf16.
        weight: [n, k] of the same dtype, the last dimension contiguous.
        isa: an instruction set by name; :func:`best` when None.

    Returns:
        [..., n] in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an instruction set that is not available; a
            tensor that requires a gradient, where those are recorded.
    """
    out: Tensor = torch.ops.mla.linear.default(x, weight, isa)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, isa: str | None = None) -> Tensor:
    """RMSNorm of rows, as :func:`mla.ops.norm.rms_norm`; no operator.

    Args:
        x: [..., k], fp32 or bf16.
        weight: [k] of the same dtype, contiguous.
        eps: added to the mean square.
        isa: an instruction set by name; :func:`best` when None.

    Returns:
        [..., k] in the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an instruction set that is not available; a
            tensor that requires a gradient, where those are recorded.
    """
    isa = _choose(isa)
    arguments.check_no_grad(x, weight)
    arguments.check_norm(x, weight)
    width = x.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        flat = arguments.rows(x.reshape(-1, width))
        _kernels.norm(isa, *arguments.norm(flat, weight, out), eps, torch.get_num_threads())
    return out


def append(
    c_kv: Tensor,
    k_rope: Tensor,
    to_c_kv: Tensor,
    to_k_rope: Tensor,
    to_scale: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    isa: str | None = None,
) -> None:
    """Write new tokens into a cache, in its format; no operator.

    Args:
        c_kv: [b, s, r] latents, fp32 or bf16.
        k_rope: [b, s, p] rotary keys, fp32 or bf16.
        to_c_kv: [b, s, r], or with ``slots`` [pages, page size, r]: fp32, bf16, or int8 with ``to_scale``.
        to_k_rope: likewise with p: fp32 beside fp32 latents, else bf16.
        to_scale: [b, s] or [pages, page size] fp32, what the int8 latents are to be multiplied by.
        slots: [b · s] int64, page · page size + offset of each token; what is negative goes nowhere.
        isa: an instruction set by name; :func:`best` when None.

    Raises:
        ValueError: shapes, dtypes, devices or slots that do not fit; an instruction set that is not
            available.
    """
    isa = _choose(isa)
    arguments.check_append(c_kv, k_rope, to_c_kv, to_k_rope, to_scale, slots)
    c_kv, k_rope = arguments.rows(c_kv), arguments.rows(k_rope)
    if c_kv.shape[0] * c_kv.shape[1]:
        described = arguments.append(c_kv, k_rope, to_c_kv, to_k_rope, to_scale, slots)
        _kernels.append(isa, *described, torch.get_num_threads())


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
    arguments.check_no_grad(q_latent, q_rope, c_kv, k_rope, latent_scale, sinks)
    cached = (c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks)
    arguments.check_decode(q_latent, q_rope, *cached, scale)
    b, s, h, _ = q_latent.shape
    q_latent, q_rope = arguments.rows(q_latent), arguments.rows(q_rope)
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    lse = q_latent.new_empty((b, s, h), dtype=torch.float32)
    if b * s * h:
        cache, sizes = arguments.cache_and_sizes(*cached, lse)
        queries = (arguments.heads(q_latent), arguments.heads(q_rope), arguments.heads(out))
        _kernels.decode(isa, cache, sizes, scale, causal, torch.get_num_threads(), *queries)
    return out, lse


def _projected(
    kernel: str,
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
    arguments.check_no_grad(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, latent_scale, sinks)
    others = (lengths, latent_scale, page_table, key_mask, sinks)
    arguments.check_projected(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, *others, scale)
    b, s, h, n = q_nope.shape
    r, p, v = c_kv.shape[2], k_rope.shape[2], w_uv.shape[1]
    q_nope, q_rope, w_uk, w_uv = (
        arguments.rows(q_nope),
        arguments.rows(q_rope),
        arguments.rows(w_uk),
        arguments.rows(w_uv),
    )
    out = q_nope.new_empty((b, s, h, v))
    lse = q_nope.new_empty((b, s, h), dtype=torch.float32)

    if not b * s * h:
        return out, lse
    sequences, tokens = b, s  # that are served at once
    if kernel == "absorbed":
        queries = max(1, _AT_ONCE // max(1, h * (r + p) * 4))
        sequences = min(b, queries)
        tokens = min(s, max(1, queries // sequences))
    if (sequences, tokens) == (b, s):
        cache, sizes = arguments.cache_and_sizes(c_kv, k_rope, *others, lse)
        tensors = (
            arguments.heads(q_nope),
            arguments.heads(q_rope),
            arguments.weight(w_uk),
            arguments.weight(w_uv),
            arguments.heads(out),
        )
        getattr(_kernels, kernel)(isa, cache, sizes, scale, causal, torch.get_num_threads(), *tensors, n, v)
        return out, lse
    size = -(-s // -(-s // tokens))  # parts of about one size
    for first in range(0, b, sequences):
        some = slice(first, first + sequences)
        own = slice(None) if page_table is not None else some  # pages belong to all
        held = c_kv[own], k_rope[own], w_uk, w_uv
        extra = _part(latent_scale, own), _part(page_table, some), _part(key_mask, some), sinks
        # The last queries first: they have the lengths as they were given, which are checked on the way.
        for end in range(s, 0, -size):
            of = slice(max(end - size, 0), end)
            seen = (lengths[some] - (s - end)).clamp_min(0) if causal and end < s else lengths[some]
            mine = q_nope[some, of], q_rope[some, of]
            out[some, of], lse[some, of] = _projected(kernel, *mine, *held, seen, *extra, scale, causal, isa)
    return out, lse


def _part(x: Tensor | None, some: slice) -> Tensor | None:
    return None if x is None else x[some]


def compute_linear(x: Tensor, weight: Tensor, isa: str | None = None) -> Tensor:
    """What the operator behind :func:`linear` runs for CPU tensors.

    Called by itself it spares torch's dispatcher, and nobody who traces or profiles operators sees it.
    """
    isa = _choose(isa)
    arguments.check_no_grad(x, weight)
    arguments.check_linear(x, weight)
    n, k = weight.shape
    out = x.new_empty((*x.shape[:-1], n))
    if k == 0:
        return out.zero_()
    if out.numel():
        flat = arguments.rows(x.reshape(-1, k))
        _kernels.linear(isa, *arguments.linear(flat, weight, out), torch.get_num_threads())
    return out


def _choose(isa: str | None) -> str:
    if isa is None:
        isa = _BEST
    if isa not in _AVAILABLE:
        raise ValueError(f"isa: {_expected(_AVAILABLE)}, got {isa}")
    return isa


def _expected(available: tuple[str, ...]) -> str:
    have = ", ".join(available) or f"none: {_why_not}"
    return f"expected an instruction set of this machine ({have})"


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
    scale: float,
    causal: bool,
    isa: str | None,
) -> tuple[Tensor, Tensor]:
    tensors = (q_latent, q_rope, c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks)
    arguments.check_devices(f"q_latent q_rope c_kv k_rope {_OTHERS}", *tensors)
    arguments.check_decode(*tensors, scale)
    return q_latent.new_empty(q_latent.shape), q_latent.new_empty(q_latent.shape[:3], dtype=torch.float32)


def _projected_shapes(
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
    tensors = (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, lengths, latent_scale, page_table, key_mask, sinks)
    arguments.check_devices(f"q_nope q_rope c_kv k_rope w_uk w_uv {_OTHERS}", *tensors)
    arguments.check_projected(*tensors, scale)
    b, s, h, _ = q_nope.shape
    return q_nope.new_empty((b, s, h, w_uv.shape[1])), q_nope.new_empty((b, s, h), dtype=torch.float32)


def _linear_shapes(x: Tensor, weight: Tensor, isa: str | None) -> Tensor:
    arguments.check_devices("x weight", x, weight)
    arguments.check_linear(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _find_best(available: tuple[str, ...]) -> str | None:
    wanted = os.environ.get("MLA_ISA")
    if wanted and wanted not in available:
        remedy = "name one of them or unset the variable" if available else "unset the variable"
        raise MLAError(f"environment variable MLA_ISA: {_expected(available)}, got {wanted}; {remedy}")
    if not available:
        _log.warning(
            "%s: attention runs on torch alone; for the kernels install a C++ compiler and Python's headers, "
            "then mla again",
            _why_not,
        )
    return wanted or next(iter(available), None)


_AVAILABLE: tuple[str, ...] = () if _kernels is None else tuple(_kernels.instruction_sets())
_BEST = _find_best(_AVAILABLE)

_OTHERS = "lengths latent_scale page_table key_mask sinks"
_OPTIONS = (
    "Tensor lengths, Tensor? latent_scale, Tensor? page_table, Tensor? key_mask, Tensor? sinks, "
    "float scale, bool causal, str? isa"
)
_DECODE = f"decode(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope, {_OPTIONS})"
_PROJECTED = f"Tensor q_nope, Tensor q_rope, Tensor c_kv, Tensor k_rope, Tensor w_uk, Tensor w_uv, {_OPTIONS}"
_library: Any = torch.library.Library("mla", "DEF")  # type: ignore[no-untyped-call]
_library.define(f"{_DECODE} -> (Tensor, Tensor)")
_library.impl("decode", _decode, "CPU")
torch.library.register_fake("mla::decode", _decode_shapes)
_library.define("linear(Tensor x, Tensor weight, str? isa) -> Tensor")
_library.impl("linear", compute_linear, "CPU")
torch.library.register_fake("mla::linear", _linear_shapes)
for _kernel in ("prefill", "absorbed"):
    _library.define(f"{_kernel}({_PROJECTED}) -> (Tensor, Tensor)")
    _library.impl(_kernel, functools.partial(_projected, _kernel), "CPU")
    torch.library.register_fake(f"mla::{_kernel}", _projected_shapes)

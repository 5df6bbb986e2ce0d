"""What the C++ kernels take: which tensors, and in what form they reach csrc/binding.cpp.

Shapes are in the alphabet of ``mla.ops.reference``.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The numbers of csrc/attention.h.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

CACHE_DTYPES = frozenset(_TYPES)
QUERY_DTYPES = frozenset({torch.float32, torch.bfloat16})
_LARGEST = torch.finfo(torch.float32).max


def rope_dtype(latents: torch.dtype) -> torch.dtype:
    """The dtype of rotary keys beside latents of a dtype that the kernels take."""
    return torch.float32 if latents == torch.float32 else torch.bfloat16


def check_scale(scale: float, name: str = "scale") -> None:
    """Refuse a factor that makes every score NaN. A negative one is a number like any other."""
    if not abs(scale) * math.log2(math.e) <= _LARGEST:  # the kernels' exponentials have base 2
        raise ValueError(f"{name}: expected a finite number in fp32, got {scale}")


def has_rows(x: Tensor) -> bool:
    """Whether the numbers of the last dimension lie side by side, as the kernels read them."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def forward_mode() -> bool:
    """Whether tensors may carry tangents (torch.func.jvp, dual numbers), which the kernels would drop."""
    return forward_ad._current_level >= 0


def check_decode(
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
) -> None:
    """Refuse arguments of ``mla::decode`` that do not go together (ValueError, as those below).

    For tensors without data as well: what only the data can answer, csrc/binding.cpp checks.
    """
    check_scale(scale)
    _check_queries(q_latent, q_rope, c_kv, "q_latent [b, s, h, r]", absorbed=True)
    _check_cache(q_latent, q_rope, c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks)


def check_projected(
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
) -> None:
    """The same for ``mla::prefill`` and ``mla::absorbed``."""
    check_scale(scale)
    _check_queries(q_nope, q_rope, c_kv, "q_nope [b, s, h, n]", absorbed=False)
    _check_cache(q_nope, q_rope, c_kv, k_rope, lengths, latent_scale, page_table, key_mask, sinks)
    h, n = q_nope.shape[2:]
    r = c_kv.shape[2]
    expect("w_uk [h, n, r]", w_uk, (h, n, r))
    expect("w_uv [h, v, r]", w_uv, (h, w_uv.shape[1] if w_uv.ndim == 3 else -1, r))
    if w_uk.dtype not in QUERY_DTYPES or w_uv.dtype != w_uk.dtype:
        raise ValueError(f"w_uk and w_uv: expected both fp32 or both bf16, got {w_uk.dtype} and {w_uv.dtype}")


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
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    latent_scale: Tensor | None,
    page_table: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
) -> None:
    b, s, h, _ = q.shape
    pages, size, _ = c_kv.shape
    latents = c_kv.dtype
    if latents not in CACHE_DTYPES:
        raise ValueError(f"c_kv: expected fp32, bf16 or int8, got {latents}")
    if k_rope.dtype != rope_dtype(latents):
        wanted = f"{rope_dtype(latents)} beside {latents} latents"
        raise ValueError(f"k_rope: expected {wanted}, got {k_rope.dtype}")
    if page_table is None:
        if pages != b:
            expect("c_kv [b, t, r]", c_kv, (b, *c_kv.shape[1:]))
    elif page_table.dtype != torch.int32 or page_table.ndim != 2 or page_table.shape[0] != b:
        raise ValueError(
            f"page_table: expected int32 [{b}, pages], got {page_table.dtype} {tuple(page_table.shape)}"
        )
    if k_rope.ndim != 3:
        raise ValueError(f"k_rope: expected 3 dimensions, as c_kv, got shape {tuple(k_rope.shape)}")
    expect("k_rope", k_rope, (pages, size, k_rope.shape[2]))
    for name, tensor in (("c_kv", c_kv), ("k_rope", k_rope)):
        if not has_rows(tensor):
            raise ValueError(f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}")
    if (latents == torch.int8) != (latent_scale is not None):
        wanted, came = ("a tensor", "None") if latent_scale is None else ("None", "a tensor")
        raise ValueError(f"latent_scale: expected {wanted} beside {latents} latents, got {came}")
    if latent_scale is not None:
        expect("latent_scale", latent_scale, (pages, size), torch.float32)
    expect("lengths [b]", lengths, (b,), torch.int32)
    if key_mask is not None:
        room = size * (1 if page_table is None else page_table.shape[1])
        expect("key_mask [b, t]", key_mask, (b, room), torch.bool)
    if sinks is not None:
        expect("sinks [h]", sinks, (h,), torch.float32)
    expect("q_rope [b, s, h, p]", q_rope, (b, s, h, k_rope.shape[2]))
    for name, x in (("page_table", page_table), ("key_mask", key_mask)):
        if x is not None and not has_rows(x):
            raise ValueError(f"{name}: expected contiguous rows, got strides {x.stride()}")
    for name, x in (("lengths", lengths), ("sinks", sinks)):
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor of another shape or dtype."""
    if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype):
        wanted = f"{dtype} {shape}" if dtype else f"shape {shape}"
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")


def rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous."""
    return x if has_rows(x) else x.contiguous()


def cache_and_sizes(
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
    pages, size, r = c_kv.shape
    cache = (
        _pages(c_kv),
        _pages(k_rope),
        (0, 0, 0) if latent_scale is None else _pages(latent_scale),
        _TYPES[c_kv.dtype],
        0 if page_table is None else page_table.data_ptr(),
        0 if page_table is None else page_table.stride(0),
        1 if page_table is None else page_table.shape[1],
        pages,
        size,
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


def heads(x: Tensor) -> tuple[int, ...]:
    """A tensor [b, s, h, width]: address, type, strides in bytes."""
    size, (b, s, h, _) = x.element_size(), x.stride()
    return x.data_ptr(), _TYPES[x.dtype], b * size, s * size, h * size


def weight(x: Tensor) -> tuple[int, ...]:
    """A weight [h, rows, r]: address, type, strides in bytes."""
    size, (h, row, _) = x.element_size(), x.stride()
    return x.data_ptr(), _TYPES[x.dtype], h * size, row * size


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd follows any of them, backward or (it may be) forward."""
    followed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return followed or forward_mode()


def has_values(x: Tensor) -> bool:
    """Whether Python may look into a tensor: a trace holds for others, too, and vmap makes it many in one."""
    if x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def holds(comparison: bool) -> bool:
    """A comparison of sizes; in a program exported for sizes of every kind, whether it is true of all."""
    if not torch.compiler.is_exporting():
        return comparison
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # with it comes sympy

    return statically_known_true(comparison)


def used_pages(
    name: str, table: Tensor, lengths: Tensor, pages: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """A page table as the kernels read it, [b, pages of a sequence] int32 without gaps and 0 behind each
    length, and which of its entries lie within the lengths.

    Raises:
        ValueError: a page within the lengths that is not there.
    """
    within = torch.arange(table.shape[1], device=table.device) * page_size < lengths[:, None]
    if has_values(table):
        wrong = (within & ((table < 0) | (table >= pages))).nonzero()
        if len(wrong):
            i, j = wrong[0].tolist()
            wanted = f"0 to {pages - 1} within the lengths" if pages else "none, the cache has no pages"
            raise ValueError(f"{name}[{i}, {j}]: expected {wanted}, got {int(table[i, j])}")
    return torch.where(within, table, 0).to(torch.int32).contiguous(), within


def check_linear(x: Tensor, weight: Tensor) -> None:
    """Refuse what is not rows x [..., k] and a weight [n, k] of one dtype (ValueError)."""
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x [..., k], weight [n, k]: got shapes {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype not in QUERY_DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x and weight: expected both fp32 or both bf16, got {x.dtype} and {weight.dtype}")
    if not has_rows(weight):
        raise ValueError(f"weight: expected a contiguous last dimension, got strides {weight.stride()}")


def linear(x: Tensor, weight: Tensor, out: Tensor) -> tuple[int, ...]:
    """Rows x [rows, k], a weight [n, k], the contiguous result: addresses, strides in bytes, type, sizes."""
    size = x.element_size()
    return (
        x.data_ptr(),
        x.stride(0) * size,
        weight.data_ptr(),
        weight.stride(0) * size,
        out.data_ptr(),
        _TYPES[x.dtype],
        x.shape[0],
        *weight.shape,
    )


def check_norm(x: Tensor, weight: Tensor) -> None:
    """Refuse what is not rows x [..., k] and a contiguous weight [k] of one dtype (ValueError)."""
    check_cpu("x weight", x, weight)
    if not x.ndim or weight.shape != x.shape[-1:] or not weight.is_contiguous():
        came = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x [..., k], weight [k]: expected one k and a contiguous weight, got {came}")
    if x.dtype not in QUERY_DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x and weight: expected both fp32 or both bf16, got {x.dtype} and {weight.dtype}")


def norm(x: Tensor, weight: Tensor, out: Tensor) -> tuple[int, ...]:
    """Rows x [rows, k], a weight [k], the contiguous result: addresses, a stride in bytes, type, sizes."""
    stride = x.stride(0) * x.element_size()
    return x.data_ptr(), stride, weight.data_ptr(), out.data_ptr(), _TYPES[x.dtype], *x.shape


def check_append(
    c_kv: Tensor,
    k_rope: Tensor,
    to_c_kv: Tensor,
    to_k_rope: Tensor,
    to_scale: Tensor | None,
    slots: Tensor | None,
) -> None:
    """Refuse new tokens and a cache that do not go together (ValueError)."""
    tensors = (c_kv, k_rope, to_c_kv, to_k_rope, to_scale, slots)
    check_cpu("c_kv k_rope to_c_kv to_k_rope to_scale slots", *tensors)
    for name, x in (("c_kv", c_kv), ("k_rope", k_rope), ("to_c_kv", to_c_kv), ("to_k_rope", to_k_rope)):
        if x.ndim != 3:
            raise ValueError(f"{name}: expected 3 dimensions, got shape {tuple(x.shape)}")
    b, s, r = c_kv.shape
    expect("k_rope [b, s, p]", k_rope, (b, s, k_rope.shape[-1]))
    for name, x in (("c_kv", c_kv), ("k_rope", k_rope)):
        if x.dtype not in QUERY_DTYPES:
            raise ValueError(f"{name}: expected fp32 or bf16, got {x.dtype}")
    if to_c_kv.dtype not in CACHE_DTYPES:
        raise ValueError(f"to_c_kv: expected fp32, bf16 or int8, got {to_c_kv.dtype}")
    places = (b, s) if slots is None else to_c_kv.shape[:2]
    expect("to_c_kv", to_c_kv, (*places, r))
    expect("to_k_rope", to_k_rope, (*places, k_rope.shape[-1]), rope_dtype(to_c_kv.dtype))
    for name, x in (("to_c_kv", to_c_kv), ("to_k_rope", to_k_rope)):
        if not has_rows(x):
            raise ValueError(f"{name}: expected a contiguous last dimension, got strides {x.stride()}")
    if (to_c_kv.dtype == torch.int8) != (to_scale is not None):
        raise ValueError(f"to_scale: expected a tensor beside int8 latents alone, got {to_c_kv.dtype} ones")
    if to_scale is not None:
        expect("to_scale", to_scale, tuple(places), torch.float32)
    if slots is not None:
        expect("slots [b · s]", slots, (b * s,), torch.int64)
        if not slots.is_contiguous():
            raise ValueError(f"slots: expected a contiguous tensor, got strides {slots.stride()}")


def append(
    c_kv: Tensor,
    k_rope: Tensor,
    to_c_kv: Tensor,
    to_k_rope: Tensor,
    to_scale: Tensor | None,
    slots: Tensor | None,
) -> tuple[object, ...]:
    """New tokens and where they go, in the form of csrc/binding.cpp; the tensors must outlive the call."""
    b, s, r = c_kv.shape
    return (
        _source(c_kv),
        _source(k_rope),
        _pages(to_c_kv),
        _pages(to_k_rope),
        (0, 0, 0) if to_scale is None else _pages(to_scale),
        _TYPES[to_c_kv.dtype],
        0 if slots is None else slots.data_ptr(),
        *to_c_kv.shape[:2],
        b,
        s,
        r,
        k_rope.shape[2],
    )


def _source(x: Tensor) -> tuple[int, ...]:
    size, strides = x.element_size(), x.stride()
    return x.data_ptr(), _TYPES[x.dtype], strides[0] * size, strides[1] * size


def check_devices(names: str, *tensors: Tensor | None) -> None:
    """A single tensor on "meta" makes torch run the shape function, whose results hold nothing."""
    if len({x.device for x in tensors if x is not None}) > 1:
        check_cpu(names, *tensors)


def check_cpu(names: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that are elsewhere, where torch's dispatcher does not (ValueError)."""
    for i, x in enumerate(tensors):
        if x is not None and not x.is_cpu:
            raise ValueError(f"{names.split()[i]}: expected a CPU tensor, got one on {x.device}")


def check_no_grad(*tensors: Tensor | None) -> None:
    """Refuse to be followed: there are no derivatives, and torch would leave them out with a warning."""
    if needs_grad(*tensors):
        raise ValueError(
            "expected tensors that autograd does not follow, got one that requires a gradient: the kernels "
            "have none. Call them under torch.no_grad(); mla.ops.attention computes gradients, as do mla.nn "
            "and absorbed models"
        )

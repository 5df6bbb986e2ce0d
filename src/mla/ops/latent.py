"""The int8 format of latents: pack, unpack, and how far a number may move. docs/cache-format.md has the why.

A token is one row of bytes: its scale (fp32), its rotary key (bf16), its latent (int8), padded to a multiple
of four bytes. Shapes are in the alphabet of ``mla.ops.reference``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mla.formats import CACHE_FORMATS
from mla.ops import arguments, direct, native

#: The dtype of every number in the formats that have one.
FORMAT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Latents:
    """Views of what a cache holds: c_kv [b, t, r], k_rope [b, t, p], and scale [b, t] beside int8 latents."""

    c_kv: Tensor
    k_rope: Tensor
    scale: Tensor | None = None

    def numbers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(c_kv, k_rope) as numbers of ``dtype``."""
        if self.scale is None:
            return self.c_kv.to(dtype), self.k_rope.to(dtype)
        return (self.c_kv * self.scale[..., None]).to(dtype), self.k_rope.to(dtype)


def quantise(c_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [..., r] to (int8 [..., r], scale [...] fp32); each number is the int8 one times the scale.

    The largest number of a token becomes ±127, and no number moves by more than half a step, max|c_kv| / 254.
    NaN or infinity makes the scale of its token NaN or infinite: it is not hidden.
    """
    precise = c_kv.float()
    scale = precise.abs().amax(-1) / 127
    steps = torch.where(scale > 0, scale, 1.0)
    return (precise / steps[..., None]).round_().nan_to_num_(0.0).clamp_(-127, 127).to(torch.int8), scale


def store(into: Latents, c_kv: Tensor, k_rope: Tensor, *, slots: Tensor | None = None) -> None:
    """Write new tokens into a cache, in its format. They become constants there.

    Args:
        into: where they go, [b, s, ·]; with ``slots`` all pages, [pages, page size, ·].
        c_kv: [b, s, r] latents, floating.
        k_rope: [b, s, p] rotary keys, floating.
        slots: [b · s] int64, page · page size + offset of each; what is negative goes nowhere.
    """
    c_kv, k_rope = c_kv.detach(), k_rope.detach()
    if _kernel_takes(into, c_kv, k_rope, slots):
        native.append(c_kv, k_rope, into.c_kv, into.k_rope, into.scale, slots=slots)
        if not into.c_kv.is_inference():
            increment_version(into.c_kv)  # a graph that saved the cache finds it changed
        return
    where: tuple[Any, ...] = (slice(None), slice(None))
    if slots is not None:
        real = slots >= 0
        slots, c_kv, k_rope = slots[real], c_kv.flatten(0, 1)[real], k_rope.flatten(0, 1)[real]
        page_size = into.c_kv.shape[1]
        where = (slots // page_size, slots % page_size)
    into.k_rope[where] = k_rope.to(into.k_rope.dtype)
    if into.scale is None:
        into.c_kv[where] = c_kv.to(into.c_kv.dtype)
    else:
        into.c_kv[where], into.scale[where] = quantise(c_kv)


def _kernel_takes(into: Latents, c_kv: Tensor, k_rope: Tensor, slots: Tensor | None) -> bool:
    return (
        direct.USED
        and not direct.is_followed()
        and not arguments.forward_mode()
        and {c_kv.dtype, k_rope.dtype} <= arguments.QUERY_DTYPES
        and into.c_kv.dtype in arguments.CACHE_DTYPES
        and into.k_rope.dtype == arguments.rope_dtype(into.c_kv.dtype)
        and all(map(direct.is_plain, (into.c_kv, into.k_rope, c_kv, k_rope)))
        and arguments.has_rows(into.c_kv)
        and arguments.has_rows(into.k_rope)
        and (into.scale is None or direct.is_plain(into.scale))
        and (
            slots is None or (slots.dtype == torch.int64 and slots.is_contiguous() and direct.is_plain(slots))
        )
    )


def row_bytes(r: int, p: int) -> int:
    """Width of a row of bytes."""
    return CACHE_FORMATS["int8"].row_bytes(r, p)


def split_rows(rows: Tensor, r: int, p: int) -> Latents:
    """Views into rows of bytes [b, t, row_bytes(r, p)] uint8; writing to them writes the rows.

    Raises:
        ValueError: another width or dtype.
    """
    width = row_bytes(r, p)
    if rows.dtype != torch.uint8 or rows.shape[-1] != width:
        raise ValueError(f"rows: expected uint8 [b, t, {width}], got {rows.dtype} {tuple(rows.shape)}")
    return Latents(
        c_kv=rows[..., 4 + 2 * p : 4 + 2 * p + r].view(torch.int8),
        k_rope=rows[..., 4 : 4 + 2 * p].view(torch.bfloat16),
        scale=rows[..., :4].view(torch.float32).squeeze(-1),
    )

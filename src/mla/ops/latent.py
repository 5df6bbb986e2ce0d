"""The int8 format of latents: pack, unpack, and how far a number may move. docs/cache-format.md has the why.

A token is one row of bytes: its scale (fp32), its rotary key (bf16), its latent (int8), padded to a multiple
of four bytes. Shapes are in the alphabet of ``mla.ops.reference``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mla.formats import CACHE_FORMATS

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

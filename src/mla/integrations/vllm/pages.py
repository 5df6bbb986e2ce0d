"""Attention over vLLM's pages of latents: tensors in, tensors out, nothing of vLLM.

A cache is bytes, [pages, page size, row bytes] uint8; docs/cache-format.md describes the rows. Shapes are in
the alphabet of ``mla.ops.reference``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mla.ops import native
from mla.ops.attention import Plan
from mla.ops.latent import FORMAT_DTYPES, Latents, split_rows


@dataclass(frozen=True)
class Run:
    """Neighbouring requests of one step whose numbers of new tokens are equal: one call of a kernel.

    Attributes:
        tokens: where their b · s new tokens lie among those of the step.
        s: new tokens of each request.
        lengths: [b] int32, keys of each request with the new ones.
        page_table: [b, pages] int32.
        plan: absorbed or expanded.
    """

    tokens: slice
    s: int
    lengths: Tensor
    page_table: Tensor
    plan: Plan


def split(pages: Tensor, cache_format: str, r: int, p: int) -> Latents:
    """Views of latents, rotary keys and scales: c_kv [pages, page size, r] and so on.

    Raises:
        ValueError: rows of another width or dtype than the format has.
    """
    if cache_format == "int8":
        return split_rows(pages, r, p)
    dtype = FORMAT_DTYPES[cache_format]
    width = (r + p) * dtype.itemsize
    if pages.dtype != torch.uint8 or pages.shape[-1] != width:
        raise ValueError(
            f"pages: expected uint8 [pages, page size, {width}], got {pages.dtype} {tuple(pages.shape)}"
        )
    numbers = pages.view(dtype)
    return Latents(c_kv=numbers[..., :r], k_rope=numbers[..., r:])


def attend(
    q: Tensor,
    latents: Latents,
    w_uk: Tensor,
    w_uv: Tensor,
    run: Run,
    *,
    scale: float,
    out: Tensor,
) -> None:
    """Attention of the new tokens of one run, whose latents are in the cache already.

    Args:
        q: [tokens, h, n + p] queries of the whole step, the rotated part last; fp32, bf16 or fp16.
        latents: from :func:`split`.
        w_uk: [h, n, r] up-projection of keys, fp32 or bf16.
        w_uv: [h, v, r] up-projection of values, of the same dtype.
        run: which tokens, and how.
        scale: factor on the scores.
        out: [tokens, h, v], written at the tokens of the run.

    Raises:
        ValueError: as for ``mla.ops.native``.
    """
    h, n, _ = w_uk.shape
    s, v, b = run.s, w_uv.shape[1], len(run.lengths)
    mine = q[run.tokens].view(b, s, h, -1)
    mine = mine.float() if mine.dtype == torch.float16 else mine
    kernel = native.prefill if run.plan.path == "expanded" else native.absorbed
    result, _ = kernel(
        mine[..., :n],
        mine[..., n:],
        latents.c_kv,
        latents.k_rope,
        w_uk,
        w_uv,
        run.lengths,
        scale=scale,
        latent_scale=latents.scale,
        page_table=run.page_table,
    )
    out[run.tokens].view(b, s, h, v).copy_(result)

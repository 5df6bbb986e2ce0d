"""MLA with torch matmuls, in tiles: any device, any floating dtype, autograd.

Both paths walk the keys tile by tile with an online softmax (Milakov and Gimelshein, arXiv:1805.02867), so
that no score matrix, and no expanded key or value, exists for more than one tile. Arguments and results are
those of ``mla.ops.reference``, and ``latent_scale`` [b, t] fp32, the factors of int8 latents; shapes are in
its alphabet.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (first key, end key) -> something of that tile.
Tile = tuple[int, int]


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """What both paths are called in: autocast would round the scores to half precision."""
    if not torch.amp.is_autocast_available(device_type):  # "meta", for one
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def absorbed(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    latent_scale: Tensor | None = None,
    dropout: float = 0.0,
    query_tile: int = 128,
    key_tile: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention; ``dropout`` falls on the probabilities, the tiles bound the scratch memory.

    Scratch, in numbers of fp32: queries and weighted sums in the latent space, b·h·s·r each and twice that at
    times; the scores of two tiles, b·h·query_tile·key_tile, a few times; one tile of the latents.
    """
    b, s, h, n = q_nope.shape
    t, r = c_kv.shape[1:]
    dtype, precision = _compute_dtypes(q_nope)
    # One batched product per head; [h, b·s, n] x [h, n, r].
    flat = q_nope.permute(2, 0, 1, 3).reshape(h, b * s, n)
    q_latent = torch.matmul(flat, w_uk.to(flat.dtype)).view(h, b, s, r)
    # Wider first: a scaled number is rounded no more than the number was.
    q_latent = q_latent.permute(1, 0, 2, 3).to(dtype) * scale  # [b, h, s, r]
    q_rope = q_rope.transpose(1, 2).to(dtype) * scale  # [b, h, s, p]

    queries = _tiles(s, query_tile) or [(0, 0)]
    states = [_OnlineSoftmax(dropout, precision) for _ in queries]
    for keys in _tiles(t, key_tile):
        c_tile = _latents(c_kv, latent_scale, keys, dtype)
        k_tile = k_rope[:, keys[0] : keys[1]].to(dtype)
        c_transposed, k_transposed = c_tile.transpose(1, 2), k_tile.transpose(1, 2)
        for rows, state in zip(queries, states, strict=True):
            if causal and keys[0] > t - s + rows[1] - 1:
                continue  # every key of this tile lies after every query of these rows
            width = rows[1] - rows[0]
            # All heads share the keys, so heads and queries are the rows of one matrix product.
            flat_latent = q_latent[:, :, rows[0] : rows[1]].reshape(b, h * width, r)
            flat_rope = q_rope[:, :, rows[0] : rows[1]].reshape(b, h * width, q_rope.shape[-1])
            scores = torch.baddbmm(torch.bmm(flat_rope, k_transposed), flat_latent, c_transposed)
            scores = scores.view(b, h, width, keys[1] - keys[0]).to(precision)
            scores = _hide(scores, rows, keys, t - s, causal, mask)

            def weigh(probs: Tensor, c_tile: Tensor = c_tile, width: int = width) -> Tensor:
                flat = probs.to(dtype).view(b, h * width, c_tile.shape[1])
                return torch.bmm(flat, c_tile).view(b, h, width, r)

            state.add(scores, weigh)
    out_latent, lse = _finish(states, queries, sinks, (b, h, r), q_nope.device)
    # In the wider of the queries' dtype, which the result has, and the weights'.
    wide = torch.promote_types(q_nope.dtype, w_uv.dtype)
    flat_out = out_latent.to(wide).permute(1, 0, 2, 3).reshape(h, b * s, r)
    out = torch.matmul(flat_out, w_uv.to(wide).transpose(1, 2)).view(h, b, s, w_uv.shape[1])
    return out.permute(1, 2, 0, 3).to(q_nope.dtype), lse


def expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    c_kv: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    latent_scale: Tensor | None = None,
    dropout: float = 0.0,
    query_tile: int = 256,
    key_tile: int = 512,
) -> tuple[Tensor, Tensor]:
    """Expanded attention: one tile of keys and values is rebuilt, used by every query, and dropped.

    Scratch: b·h·key_tile·(n + v) numbers for the tile and b·h·query_tile·key_tile for its scores.
    """
    b, s, h, _ = q_nope.shape
    t = c_kv.shape[1]
    dtype, precision = _compute_dtypes(q_nope)
    q_nope_scaled = q_nope.transpose(1, 2).to(dtype) * scale  # [b, h, s, n]
    q_rope_scaled = q_rope.transpose(1, 2).to(dtype) * scale  # [b, h, s, p]
    w_uk, w_uv = w_uk.to(dtype), w_uv.to(dtype)

    queries = _tiles(s, query_tile) or [(0, 0)]
    states = [_OnlineSoftmax(dropout, precision) for _ in queries]
    for keys in _tiles(t, key_tile):
        c_tile = _latents(c_kv, latent_scale, keys, dtype)[:, None]  # [b, 1, tile, r]
        k_rope_transposed = k_rope[:, keys[0] : keys[1]].to(dtype).transpose(1, 2)[:, None]
        k_nope_transposed = torch.matmul(w_uk, c_tile.transpose(2, 3))  # [b, h, n, tile]
        value = torch.matmul(c_tile, w_uv.transpose(1, 2))  # [b, h, tile, v]

        def weigh(probs: Tensor, value: Tensor = value) -> Tensor:
            return torch.matmul(probs.to(dtype), value)

        for rows, state in zip(queries, states, strict=True):
            if causal and keys[0] > t - s + rows[1] - 1:
                continue
            scores = torch.matmul(q_nope_scaled[:, :, rows[0] : rows[1]], k_nope_transposed)
            scores = scores + torch.matmul(q_rope_scaled[:, :, rows[0] : rows[1]], k_rope_transposed)
            state.add(_hide(scores.to(precision), rows, keys, t - s, causal, mask), weigh)
    out, lse = _finish(states, queries, sinks, (b, h, w_uv.shape[1]), q_nope.device)
    return out.transpose(1, 2).to(q_nope.dtype), lse


class _OnlineSoftmax:
    """Running maximum, sum and weighted values of one tile of query rows."""

    def __init__(self, dropout: float, precision: torch.dtype) -> None:
        self.dropout = dropout
        self.precision = precision
        self.maximum: Tensor | None = None  # [b, h, rows, 1]
        self.total: Tensor | None = None
        self.weighted: Tensor | None = None  # [b, h, rows, width of a value]

    def add(self, scores: Tensor, weigh: Callable[[Tensor], Tensor]) -> None:
        # The maximum only keeps exp() in range and cancels out: no gradient flows through it.
        maximum = scores.detach().amax(dim=-1, keepdim=True)
        if self.maximum is not None:
            maximum = torch.maximum(maximum, self.maximum)
        # A row that has seen no key yet has maximum -inf; -inf - -inf would be NaN.
        finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
        probs = torch.exp(scores - finite)
        total = probs.sum(dim=-1, keepdim=True)
        if self.dropout:
            probs = torch.nn.functional.dropout(probs, self.dropout)
        weighted = weigh(probs).to(self.precision)
        if self.maximum is not None and self.total is not None and self.weighted is not None:
            shrink = torch.exp(self.maximum - finite)
            total = total + self.total * shrink
            weighted = weighted + self.weighted * shrink
        self.maximum, self.total, self.weighted = maximum, total, weighted


def _finish(
    states: list[_OnlineSoftmax],
    queries: list[Tile],
    sinks: Tensor | None,
    shape: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Join the tiles of query rows: out [b, h, s, width] and lse [b, s, h], in fp32 (fp64 for fp64 input)."""
    b, h, width = shape
    out, lse = [], []
    for rows, state in zip(queries, states, strict=True):
        count = rows[1] - rows[0]
        if state.maximum is None or state.total is None or state.weighted is None:  # no key to see
            out.append(torch.zeros(b, h, count, width, dtype=state.precision, device=device))
            lse.append(torch.full((b, h, count), -torch.inf, dtype=state.precision, device=device))
            continue
        # A row without keys has out = 0 and lse = -inf. Neither log(0) nor 0/0 may be computed on the way:
        # their gradients are NaN even where their results are not used.
        empty = state.total == 0.0
        total = state.total.masked_fill(empty, 1.0)
        row_lse = state.maximum.masked_fill(empty, 0.0) + total.log()
        row_out = state.weighted / total
        if sinks is not None:
            # exp(lse) / (exp(lse) + exp(sink)): the share of the softmax that the sink leaves to the keys.
            row_out = row_out * torch.sigmoid(row_lse - sinks.to(state.precision).view(1, h, 1, 1))
        out.append(row_out)
        lse.append(row_lse.masked_fill(empty, -torch.inf).squeeze(-1))
    return torch.cat(out, dim=2), torch.cat(lse, dim=2).transpose(1, 2)


def _hide(scores: Tensor, rows: Tile, keys: Tile, offset: int, causal: bool, mask: Tensor | None) -> Tensor:
    """Apply the causal limit (query i sees keys up to i + offset) and the mask to one tile of scores."""
    if mask is not None:
        tile = _tile_of(_tile_of(mask, -2, rows), -1, keys)
        if tile.dtype == torch.bool:
            scores = scores.masked_fill(~tile, -torch.inf)
        else:
            scores = scores + tile.to(scores.dtype)
    if causal and keys[1] - 1 > rows[0] + offset:
        query = torch.arange(*rows, device=scores.device)[:, None] + offset
        key = torch.arange(*keys, device=scores.device)
        scores = scores.masked_fill(key > query, -torch.inf)
    return scores


def _tile_of(mask: Tensor, dim: int, tile: Tile) -> Tensor:
    return mask if mask.shape[dim] == 1 else mask.narrow(dim, tile[0], tile[1] - tile[0])


def _latents(c_kv: Tensor, latent_scale: Tensor | None, keys: Tile, dtype: torch.dtype) -> Tensor:
    """One tile of the latents as numbers, [b, tile, r]."""
    tile = c_kv[:, keys[0] : keys[1]].to(dtype)
    return tile if latent_scale is None else tile * latent_scale[:, keys[0] : keys[1], None].to(dtype)


def _tiles(length: int, size: int) -> list[Tile]:
    if torch.compiler.is_exporting():
        return [(0, length)]  # a program for every length cannot count tiles
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _compute_dtypes(q: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the products, and that of scores, sums and lse.

    CPUs compute in fp32: torch rounds the scores of a half-precision product to half precision, and on most
    CPUs that product is several times slower besides. Accelerators keep the input's dtype.
    """
    if q.dtype == torch.float64:
        return torch.float64, torch.float64
    return (torch.float32 if q.device.type == "cpu" else q.dtype), torch.float32

"""FlashMLA's Python interface on CPU tensors: code and tests written for FlashMLA run here.

Import from ``mla.integrations.flash_mla`` what came from ``flash_mla``. Names, arguments, defaults, layouts
and results are those of https://github.com/deepseek-ai/FlashMLA (MIT licence, state of April 2026; interface
only). Head counts, page sizes and widths that its GPU kernels refuse work as well. As there, gradients flow
through the functions of prefill on whole keys and values (``flash_attn_varlen_...``) and through no others.

Shapes: b sequences, s query tokens, h query heads, t key tokens, d = r + p the width of a cached token, of
which the first r values are the latent (``head_dim_v``) and the last p the rotary key.
"""

from itertools import pairwise

import torch
from torch import Tensor

from mla.ops import arguments, native, portable, whole_keys

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)
_BYTES = (torch.float8_e4m3fn, torch.uint8, torch.int8)

# Bytes of a token in FlashMLA's two fp8 layouts, by d.
_FP8_WIDTHS = {576: 656, 512: 584}


class FlashMLASchedMeta:
    """Stands for FlashMLA's schedule. It holds nothing: the CPU kernels divide the work of each call anew."""


def get_mla_metadata(*args: object, **kwargs: object) -> tuple[FlashMLASchedMeta, None]:
    """What :func:`flash_mla_with_kvcache` takes as ``tile_scheduler_metadata`` and ``num_splits``.

    Any arguments are accepted and not used, as in FlashMLA since January 2026: before, they were
    ``cache_seqlens, num_q_tokens_per_head_k, num_heads_k`` and others.
    """
    return FlashMLASchedMeta(), None


@torch.no_grad()
def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: object = None,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention ("MQA mode") over a paged latent cache: dense, or sparse with ``indices``.

    Args:
        q: [b, s, h, d] absorbed queries, bf16, fp16 or fp32.
        k_cache: [pages, page size, h_k, d] of q's dtype; rows that no query sees are never read. h_k above 1
            is for dense attention only. With ``is_fp8_kvcache`` [pages, page size, 1, bytes], float8_e4m3fn,
            uint8 or int8. For d = 576 a token has 656 bytes: 512 float8_e4m3 values, 4 fp32 scales (one per
            128 values), 64 bf16 values. For d = 512 it has 584: a page holds first those of all values (448
            float8_e4m3, 64 bf16), then those of all scales (7 powers of two and one byte unused).
        block_table: [b, pages] int32 or int64; entries behind a sequence's end are never read.
        cache_seqlens: [b] int32 or int64, the keys of each sequence, from 0. Sparse attention uses neither.
        head_dim_v: r, the width of a value; 512 for fp8.
        tile_scheduler_metadata, num_splits: not used, see :func:`get_mla_metadata`.
        softmax_scale: factor on the scores. None means d ** -0.5, as in FlashMLA. Give the model's own: for
            DeepSeek-V3 it is 192 ** -0.5 (times YaRN's factor), and not 576 ** -0.5.
        causal: the s queries are the last s keys, and none sees a key after itself; dense attention only.
        is_fp8_kvcache: dequantise the tokens that are used to bf16. FlashMLA demands it for sparse attention
            and refuses it for dense; here both go both ways.
        indices: [b, s, top k] int32 or int64, page * page size + offset of each token that a query sees.
            Entries below 0 or beyond the cache are no tokens.
        attn_sink: [h] fp32, one more logit per head, without a value: out is multiplied by
            exp(lse) / (exp(lse) + exp(attn_sink)). In FlashMLA for sparse attention only.
        extra_k_cache, extra_indices_in_kvcache: a second cache of the same format, and the tokens of it that
            are seen besides; sparse attention only.
        topk_length, extra_topk_length: [b] int32 or int64, how many of the leading indices count.

    Returns:
        out [b, s, h, r] in q's dtype, and lse [b, h, s] in fp32, the natural log-sum-exp of the scaled scores
        without the sink. A query that sees no key gives out = 0 and lse = +inf.

    Raises:
        ValueError: arguments that do not fit: which, what was expected, what came.
        NotImplementedError: several key heads in a sparse or fp8 call, an fp8 cache of another d.
    """
    _expect("q [b, s, h, d]", q, (None, None, None, None), _FLOATS)
    b, s, h, d = q.shape
    sparse = indices is not None
    _check_cache("k_cache", k_cache, q, head_dim_v, is_fp8_kvcache, one_head=sparse)
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    arguments.check_scale(scale, "softmax_scale")
    sinks = _sinks(attn_sink, h)
    extra = {
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "extra_topk_length": extra_topk_length,
    }
    if indices is None:
        surplus = _given({"topk_length": topk_length} | extra)
        if surplus:
            raise ValueError(f"{surplus}: expected None without indices (dense attention), got a tensor")
        if block_table is None or cache_seqlens is None:
            missing = "block_table" if block_table is None else "cache_seqlens"
            raise ValueError(f"{missing}: expected a tensor without indices (dense attention), got None")
        pool, table, lengths = _pages(k_cache, block_table, cache_seqlens, q, is_fp8_kvcache)
        group = h // k_cache.shape[2]  # the query heads of one key head; MLA has one key head
        parts = []
        for j in range(k_cache.shape[2]):
            mine = slice(j * group, (j + 1) * group)
            sink = None if sinks is None else sinks[mine]
            keys = pool[:, :, j]
            parts.append(_attend(q[:, :, mine], keys, table, lengths, head_dim_v, scale, sink, causal=causal))
        out, lse = parts[0] if group == h else (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        return out, _lse(lse).transpose(1, 2).contiguous()

    if causal:
        raise ValueError("causal: expected False with indices, which say what each query sees, got True")
    with_extra = extra_k_cache is not None
    chosen = (k_cache, indices, topk_length)
    pool, table = _tokens("indices", *chosen, q, is_fp8_kvcache, gather=with_extra)
    if extra_k_cache is not None and extra_indices_in_kvcache is not None:
        _check_cache("extra_k_cache", extra_k_cache, q, head_dim_v, is_fp8_kvcache, one_head=True)
        chosen = (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
        more, places = _tokens("extra_indices_in_kvcache", *chosen, q, is_fp8_kvcache, gather=True)
        table = torch.cat([table, torch.where(places < 0, -1, places + len(pool))], dim=1)
        pool = torch.cat([pool, more])
    elif _given(extra):
        wanted = "expected extra_k_cache and extra_indices_in_kvcache together"
        raise ValueError(f"{_given(extra)}: {wanted}, got nothing else")
    out, lse = _attend(q.reshape(b * s, 1, h, d), pool, table, _ends(table), head_dim_v, scale, sinks)
    return out.view(b, s, h, head_dim_v), _lse(lse).view(b, s, h).transpose(1, 2).contiguous()


@torch.no_grad()
def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Absorbed attention of each query over the tokens that it names: sparse prefill.

    Args:
        q: [s, h, d] absorbed queries, bf16, fp16 or fp32.
        kv: [t, 1, d] latents and rotary keys of q's dtype; rows that no query names are never read.
        indices: [s, 1, top k] int32 or int64. Entries below 0, or from t on, are no tokens.
        sm_scale: factor on the scores.
        d_v: r, the width of a value.
        attn_sink: [h] fp32, as for :func:`flash_mla_with_kvcache`.
        topk_length: [s] int32 or int64, how many of a query's leading indices count.

    Returns:
        out [s, h, r] in q's dtype; max_logits [s, h] and lse [s, h] in fp32: the largest of the scaled scores
        and their natural log-sum-exp without the sink (both base 2 in FlashMLA before January 2026). A query
        that sees no token gives 0, -inf and +inf.

    Raises:
        ValueError, NotImplementedError: as for :func:`flash_mla_with_kvcache`.
    """
    _expect("q [s, h, d]", q, (None, None, None), _FLOATS)
    _expect("kv [t, 1, d]", kv, (None, None, q.shape[2]), (q.dtype,))
    arguments.check_scale(sm_scale, "sm_scale")
    # Every query is a sequence and every token a page.
    queries, cache = q[:, None], kv[:, None]
    _check_cache("kv", cache, queries, d_v, False, one_head=True)
    pool, table = _tokens("indices", cache, indices, topk_length, queries, False)
    sinks = _sinks(attn_sink, q.shape[1])
    out, lse = _attend(queries, pool, table, _ends(table), d_v, sm_scale, sinks)
    # The kernels keep no maximum: the scores are computed once more for it, in fp32, and the lse with them.
    max_logits, lse = torch.full_like(lse[:, 0], -torch.inf), torch.full_like(lse[:, 0], torch.inf)
    with portable.no_autocast("cpu"):
        for i, tokens in enumerate(table):
            scores = q[i].float() @ pool[tokens[tokens >= 0], 0].float().T * sm_scale
            if scores.shape[1]:
                max_logits[i], lse[i] = scores.amax(dim=1), scores.logsumexp(dim=1)
    return out[:, 0], max_logits, lse


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention over whole keys and values of sequences that lie one after another ("MHA mode"), in torch.

    Args:
        q: [tokens, h, d] queries, bf16, fp16 or fp32.
        k: [keys, h_k, d] keys of q's dtype; h is a multiple of h_k.
        v: [keys, h_k, d_v] values of q's dtype.
        cu_seqlens_qo, cu_seqlens_kv: [b + 1] int32 or int64, where the queries and the keys of each sequence
            begin, and after the last one their number.
        max_seqlen_qo, max_seqlen_kv, is_varlen: not used, the sequences say their lengths.
        dropout_p: 0.0 only, as in FlashMLA.
        softmax_scale: factor on the scores; None means d ** -0.5.
        causal: the queries of a sequence are its last keys, and none sees a key after itself.
        deterministic: not used, the same call gives the same bits.

    Returns:
        out [tokens, h, d_v] in q's dtype, and lse [tokens, h] in fp32, the natural log-sum-exp of the scaled
        scores. A query that sees no key gives out = 0 and lse = +inf.

    Raises:
        ValueError: arguments that do not fit: which, what was expected, what came.
        NotImplementedError: dropout.
    """
    _expect("q [tokens, h, d]", q, (None, None, None), _FLOATS)
    _expect("k [keys, h_k, d]", k, (None, None, q.shape[2]), (q.dtype,))
    _expect("v [keys, h_k, d_v]", v, (*k.shape[:2], None), (q.dtype,))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: expected heads that divide the {q.shape[1]} of q, got {k.shape[1]}")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    arguments.check_scale(scale, "softmax_scale")
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p: expected 0.0, which is all that FlashMLA has, got {dropout_p}")
    queries = _spans("cu_seqlens_qo", cu_seqlens_qo, len(q))
    keys = _spans("cu_seqlens_kv", cu_seqlens_kv, len(k))
    if len(queries) != len(keys):
        wanted = f"as many sequences as cu_seqlens_qo, {len(queries)}"
        raise ValueError(f"cu_seqlens_kv: expected {wanted}, got {len(keys)}")
    nothing = slice(0, 0)  # so that there is a part also without sequences
    with portable.no_autocast("cpu"):
        parts = [
            whole_keys.attend(q[mine], k[seen], v[seen], scale=scale, causal=causal)
            for mine, seen in zip([nothing, *queries], [nothing, *keys], strict=True)
        ]
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return out, lse


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_attn_varlen_func` of keys and values in one tensor [keys, h_k, head_dim_qk + d_v]."""
    k, v = kv[..., :head_dim_qk], kv[..., head_dim_qk:]
    sizes = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    return flash_attn_varlen_func(q, k, v, *sizes, dropout_p, softmax_scale, causal)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_attn_varlen_func` of queries, keys and values in one [tokens, h, 2·head_dim_qk + d_v]."""
    q, k, v = qkv.tensor_split([head_dim_qk, 2 * head_dim_qk], dim=-1)
    sizes = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *sizes, dropout_p, softmax_scale, causal)


def _expect(name: str, x: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    fits = len(shape) == x.ndim and all(n in (None, size) for n, size in zip(shape, x.shape, strict=True))
    if not fits or x.dtype not in dtypes:
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected {kinds} of shape [{sizes}], got {x.dtype} {tuple(x.shape)}")
    if x.device.type != "cpu":
        raise ValueError(f"{name}: expected a CPU tensor, got one on {x.device}")


def _spans(name: str, ends: Tensor, total: int) -> list[slice]:
    """The rows of each sequence, of which the beginnings, and the end of the last one, are given."""
    _expect(f"{name} [b + 1]", ends, (None,), _INTEGERS)
    places: list[int] = ends.tolist()
    if places[:1] != [0] or places[-1] != total or places != sorted(places):
        raise ValueError(f"{name}: expected rising numbers from 0 to {total}, got {places}")
    return [slice(first, last) for first, last in pairwise(places)]


def _given(arguments: dict[str, Tensor | None]) -> str:
    return " and ".join(name for name, x in arguments.items() if x is not None)


def _check_cache(name: str, k_cache: Tensor, q: Tensor, r: int, fp8: bool, *, one_head: bool) -> None:
    h, d = q.shape[2:]
    if fp8 and d not in _FP8_WIDTHS:
        raise NotImplementedError(f"is_fp8_kvcache: FlashMLA has layouts for d = 576 and 512, not for {d}")
    width, dtypes = (_FP8_WIDTHS[d], _BYTES) if fp8 else (d, (q.dtype,))
    _expect(f"{name} [pages, page size, h_k, width]", k_cache, (None, None, None, width), dtypes)
    if r != 512 if fp8 else not 0 < r <= d:
        argument = "d_v" if name == "kv" else "head_dim_v"
        raise ValueError(f"{argument}: expected {512 if fp8 else f'1 to {d}'}, got {r}")
    h_k = k_cache.shape[2]
    if (one_head or fp8) and h_k != 1:
        raise NotImplementedError(f"{name}: sparse and fp8 attention have one key head, got {h_k}")
    if h_k == 0 or h % h_k:
        raise ValueError(f"{name}: expected a number of key heads that divides the {h} of q, got {h_k}")


def _sinks(attn_sink: Tensor | None, h: int) -> Tensor | None:
    if attn_sink is None:
        return None
    _expect("attn_sink [h]", attn_sink, (h,), (torch.float32,))
    return attn_sink.contiguous()


def _pages(
    k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, q: Tensor, fp8: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages [n, page size, h_k, d], those of each sequence [b, pages], and the lengths [b]."""
    pages, page_size = k_cache.shape[:2]
    _expect("cache_seqlens [b]", cache_seqlens, (len(q),), _INTEGERS)
    _expect("block_table [b, pages]", block_table, (len(q), None), _INTEGERS)
    width = block_table.shape[1]
    if len(wrong := cache_seqlens[(cache_seqlens < 0) | (cache_seqlens > width * page_size)]):
        room = "in the room of block_table"
        raise ValueError(f"cache_seqlens ({room}): expected 0 to {width * page_size}, got {int(wrong[0])}")
    table, used = arguments.used_pages("block_table", block_table, cache_seqlens, pages, page_size)
    lengths = cache_seqlens.to(torch.int32).contiguous()
    if not fp8 and k_cache.dtype != torch.float16:
        return k_cache, table, lengths
    chosen, places = _distinct(table[used], pages)
    return _rows(k_cache, (chosen,), q.shape[3], fp8), _table(used, places), lengths


def _tokens(
    name: str,
    k_cache: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    q: Tensor,
    fp8: bool,
    *,
    gather: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tokens as pages of one, [n, 1, d], and those of each query, [b * s, top k] with -1 for none.

    Without ``gather`` the tokens are the whole cache, not copied, where its dtype and strides allow.
    """
    pages, page_size = k_cache.shape[:2]
    b, s, _, d = q.shape
    _expect(f"{name} [b, s, top k]", indices, (b, s, None), _INTEGERS)
    valid = (indices >= 0) & (indices < pages * page_size)
    if topk_length is not None:
        _expect(f"topk_length of {name} [b]", topk_length, (b,), _INTEGERS)
        valid &= torch.arange(indices.shape[2], device=indices.device) < topk_length[:, None, None]
    ids, valid = indices[valid], valid.flatten(0, 1)
    in_line = page_size == 1 or k_cache.stride(0) == page_size * k_cache.stride(1)
    if in_line and not (gather or fp8 or k_cache.dtype == torch.float16):
        return k_cache.flatten(0, 1), _table(valid, ids)
    chosen, places = _distinct(ids, pages * page_size)
    return _rows(k_cache, (chosen // page_size, chosen % page_size), d, fp8), _table(valid, places)


def _distinct(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The distinct ones of numbers below ``size``, in order, and the place of each number among them."""
    seen = torch.zeros(size, dtype=torch.bool, device=ids.device)
    seen[ids] = True
    return seen.nonzero().flatten(), (seen.cumsum(0) - 1)[ids]


def _table(valid: Tensor, values: Tensor) -> Tensor:
    table = torch.full(valid.shape, -1, dtype=torch.int32, device=valid.device)
    table[valid] = values.to(torch.int32)
    return table


def _ends(table: Tensor) -> Tensor:
    """How much of each query's list has to be looked at, [b * s]."""
    counts = torch.arange(1, table.shape[1] + 1, dtype=torch.int32, device=table.device)
    # The zeros in front serve lists without entries.
    return torch.nn.functional.pad(torch.where(table < 0, 0, counts), (1, 0)).amax(dim=1)


def _rows(k_cache: Tensor, where: tuple[Tensor, ...], d: int, fp8: bool) -> Tensor:
    """The chosen pages or tokens, [..., h_k, d], in a dtype that the kernels take."""
    if not fp8:
        rows = k_cache[where]
        return rows.float() if rows.dtype == torch.float16 else rows  # bf16 would not hold fp16
    pages, page_size = k_cache.shape[:2]
    cells = k_cache[:, :, 0].view(torch.uint8)
    if d == 576:
        rows = cells[where]
        nope, rope = rows[..., :512], rows[..., 528:]
        scales = rows[..., 512:528].contiguous().view(torch.float32)
    else:
        page, row, byte = cells.stride()
        if byte != 1 or (row != 584 and page_size > 1):
            raise ValueError(f"fp8 cache: expected contiguous pages, got strides {k_cache.stride()}")
        start = cells.storage_offset()
        rows = cells.as_strided((pages, page_size, 576), (page, 576, 1), start)[where]
        nope, rope = rows[..., :448], rows[..., 448:]
        exponents = cells.as_strided((pages, page_size, 7), (page, 8, 1), start + page_size * 576)[where]
        scales = (exponents.to(torch.int32) << 23).view(torch.float32)  # biased like fp32's own exponents
    values = nope.contiguous().view(torch.float8_e4m3fn).float()
    tiles = values.view(*scales.shape, values.shape[-1] // scales.shape[-1])
    latents = (tiles * scales[..., None]).flatten(-2).to(torch.bfloat16)
    return torch.cat([latents, rope.contiguous().view(torch.bfloat16)], dim=-1).unsqueeze(-2)


def _attend(
    q: Tensor,
    pool: Tensor,
    table: Tensor,
    lengths: Tensor,
    r: int,
    scale: float,
    sinks: Tensor | None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """out [b, s, h, r] in q's dtype and lse [b, s, h]; q [b, s, h, d], pool [pages, page size, d]."""
    dtype = q.dtype
    q = q.float() if dtype == torch.float16 else q
    if native.best() is not None:
        tensors = (q[..., :r], q[..., r:], pool[..., :r], pool[..., r:], lengths)
        out, lse = native.decode(*tensors, scale=scale, causal=causal, page_table=table, sinks=sinks)
        return out.to(dtype), lse
    q = q.float()
    out, lse = q.new_empty((*q.shape[:3], r)), q.new_empty(q.shape[:3])
    # The queries are absorbed already: both up-projections are the identity.
    identity = torch.eye(r, dtype=torch.float32, device=q.device).expand(q.shape[2], r, r)
    for i, length in enumerate(lengths.tolist()):
        ids = table[i, : -(-length // pool.shape[1])]
        keys = pool[ids[ids >= 0]].flatten(0, 1)[:length].float()
        mine = (q[i : i + 1, ..., :r], q[i : i + 1, ..., r:], keys[None, :, :r], keys[None, :, r:])
        with portable.no_autocast("cpu"):
            made = portable.absorbed(*mine, identity, identity, scale=scale, causal=causal, sinks=sinks)
        out[i], lse[i] = (x[0] for x in made)
    # Without keys the share that a sink of -inf leaves is 0 / 0.
    return out.masked_fill(lse[..., None] == -torch.inf, 0.0).to(dtype), lse


def _lse(lse: Tensor) -> Tensor:
    """FlashMLA's mark of a query that sees no key is +inf."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)

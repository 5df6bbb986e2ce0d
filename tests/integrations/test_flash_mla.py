"""The drop-in of FlashMLA against attention written out in fp32: dense, sparse, fp8, all of it poisoned."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mla.integrations import flash_mla
from mla.integrations.flash_mla import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

HUGE = 2147480000
INVALID = [-1, -123456, -(2**31), HUGE, 2**31 - 1]
R = 512


@pytest.fixture(params=["native", "portable"])
def path(request, monkeypatch):
    """Both ways through the module: with the kernels, and as if they had not been built."""
    if request.param == "portable":
        monkeypatch.setattr(flash_mla.native, "best", lambda: None)
    elif flash_mla.native.best() is None:
        pytest.skip("built without kernels")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend(
    q: Tensor, keys: Tensor, seen: Tensor, scale: float, sinks: Tensor | None = None, r: int = R
) -> tuple[Tensor, Tensor, Tensor]:
    """q [s, h, d], keys [s or 1, t, d], seen [s, t] -> out [s, h, r], lse [s, h], max [s, h], all fp32."""
    scores = (q.float() @ keys.float().transpose(-1, -2)) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    out, lse, top = (
        torch.zeros(*q.shape[:2], r),
        torch.full(q.shape[:2], torch.inf),
        torch.full(q.shape[:2], -torch.inf),
    )
    for i in range(len(q)):
        if seen[i].any():
            values = keys[i if len(keys) > 1 else 0].float().nan_to_num()[:, :r]
            logits = scores[i] if sinks is None else torch.cat([scores[i], sinks[:, None]], dim=1)
            weights = torch.where(seen[i], torch.exp(scores[i] - torch.logsumexp(logits, 1)[:, None]), 0.0)
            out[i], lse[i], top[i] = weights @ values, torch.logsumexp(scores[i], 1), scores[i].amax(1)
    return out, lse, top


def close(out: Tensor, lse: Tensor, want_out: Tensor, want_lse: Tensor, bound: float = 6e-3) -> None:
    assert out.shape == want_out.shape
    assert lse.shape == want_lse.shape
    assert lse.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert (out.float() - want_out).norm() <= bound * want_out.norm()
    assert torch.equal(torch.isinf(lse), torch.isinf(want_lse))
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=bound / 2)


@dataclass
class Dense:
    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor

    def run(self, **options):
        schedule, splits = get_mla_metadata()
        tensors = (self.q, self.k_cache, self.block_table, self.cache_seqlens)
        return flash_mla_with_kvcache(*tensors, options.pop("head_dim_v", R), schedule, splits, **options)

    def expected(
        self, cache: Tensor | None = None, causal=False, scale=None, sinks=None, r: int = R
    ) -> tuple[Tensor, Tensor]:
        """Sequence by sequence and key head by key head; ``cache`` is what fp8 stands for."""
        cache = self.k_cache if cache is None else cache
        b, s, h, d = self.q.shape
        h_k = cache.shape[2]
        out, lse = torch.zeros(b, s, h, r), torch.zeros(b, h, s)
        for i in range(b):
            length = int(self.cache_seqlens[i])
            pages = self.block_table[i, : -(-length // cache.shape[1])].long()
            keys = cache[pages].flatten(0, 1)[:length]
            seen = torch.ones(s, length, dtype=torch.bool)
            if causal:
                seen = seen.tril(length - s)
            for j in range(h_k):
                mine = slice(j * h // h_k, (j + 1) * h // h_k)
                sink = None if sinks is None else sinks[mine]
                part = attend(self.q[i, :, mine], keys[None, :, j], seen, scale or d**-0.5, sink, r)
                out[i, :, mine], lse[i, mine] = part[0], part[1].T
        return out, lse


def dense(
    lengths=(0, 1, 37, 130, 64), s=1, h=16, page_size=64, d=576, h_k=1, dtype=torch.bfloat16, seed=0
) -> Dense:
    b, most = len(lengths), max(lengths)
    width = -(-most // page_size) + 2
    pages = b * width
    k_cache = random(pages, page_size, h_k, d, seed=seed).to(dtype)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
    block_table = order.view(b, width).to(torch.int32)
    for i, length in enumerate(lengths):
        used = -(-length // page_size)
        k_cache[block_table[i, used:]] = torch.nan
        if length % page_size:
            k_cache[block_table[i, used - 1], length % page_size :] = torch.nan
        block_table[i, used:] = HUGE
    q = random(b, s, h, d, seed=seed + 1).to(dtype)
    return Dense(q, k_cache, block_table, torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [64, 1, 7])
@pytest.mark.parametrize("h", [16, 64, 128, 9])
@pytest.mark.parametrize("s", [1, 2, 4])
def test_dense(s, h, page_size, causal):
    case = dense(s=s, h=h, page_size=page_size)
    out, lse = case.run(causal=causal)
    assert out.dtype == torch.bfloat16
    close(out, lse, *case.expected(causal=causal))
    assert not out[0].any()
    assert torch.isposinf(lse[0]).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("causal", [False, True])
def test_other_dtypes(dtype, bound, causal, path):
    case = dense(s=3, h=9, page_size=7, dtype=dtype)
    out, lse = case.run(causal=causal, softmax_scale=0.05)
    assert out.dtype == dtype
    close(out, lse, *case.expected(causal=causal, scale=0.05), bound)


@pytest.mark.parametrize(("d", "r"), [(512, 512), (88, 64), (33, 33)])
def test_other_widths(d, r, path):
    case = dense(s=2, h=5, page_size=16, d=d)
    close(*case.run(head_dim_v=r), *case.expected(r=r))


@pytest.mark.parametrize("h_k", [2, 3])
def test_several_key_heads(h_k, path):
    sinks = random(12, seed=5)
    case = dense(s=2, h=12, page_size=7, h_k=h_k)
    close(*case.run(causal=True, attn_sink=sinks), *case.expected(causal=True, sinks=sinks))


@pytest.mark.parametrize("s", [1, 4])
def test_dense_with_sinks(s, path):
    sinks = random(16, seed=5)
    sinks[3], sinks[4] = torch.inf, -torch.inf
    case = dense(s=s)
    out, lse = case.run(attn_sink=sinks)
    close(out, lse, *case.expected(sinks=sinks))
    assert not out[:, :, 3].any()
    assert torch.equal(lse, case.run()[1])


def test_any_strides_and_64_bits():
    case = dense(s=2, h=9, page_size=7)
    want = case.run(causal=True)
    table = torch.full((5, 2 * case.block_table.shape[1]), -(2**40))
    table[:, ::2] = case.block_table.long()
    table[table == HUGE] = 2**40  # what lies behind the end may be anything
    k_cache = torch.full((len(case.k_cache), 9, 1, 580), torch.nan, dtype=torch.bfloat16)
    k_cache[:, 1:8, :, :576] = case.k_cache
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    lengths = case.cache_seqlens.long().repeat_interleave(2)[::2]
    got = Dense(q, k_cache[:, 1:8, :, :576], table[:, ::2], lengths).run(causal=True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()


def test_another_default_device(path):
    """Tensors that are made on the way lie where the arguments do."""
    for case in (dense(s=2, h=9, page_size=7), dense(s=2, h=9, page_size=7, dtype=torch.float16)):
        want = case.run()
        with torch.device("meta"):
            got = case.run()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_at_all(path):
    out, lse = dense(lengths=(0, 0), s=2, h=9).run(causal=True)
    assert not out.any()
    assert torch.isposinf(lse).all()


def test_metadata_of_every_version():
    lengths = torch.tensor([3], dtype=torch.int32)
    for schedule, splits in (
        get_mla_metadata(),
        get_mla_metadata(lengths, 128, 1),
        get_mla_metadata(cache_seqlens=lengths, num_q_tokens_per_head_k=128, num_heads_k=1, topk=64),
    ):
        assert isinstance(schedule, FlashMLASchedMeta)
        assert splits is None


# ---- fp8 caches: both formats written here byte by byte, and what they stand for


def fp8(values: Tensor, rounded_scales: bool = True) -> tuple[Tensor, Tensor]:
    """values [pages, page size, 1, d] -> the cache in bytes, and its values in bf16."""
    pages, page_size, _, d = values.shape
    nope, tile = (512, 128) if d == 576 else (448, 64)
    tiles = values[..., :nope].float().reshape(pages, page_size, nope // tile, tile)
    scales = (tiles.abs().amax(-1) / 448).clamp(min=1e-4)
    if rounded_scales:
        scales = 2.0 ** scales.log2().ceil()
    codes = (tiles / scales[..., None]).to(torch.float8_e4m3fn)
    rope = values[:, :, 0, nope:].to(torch.bfloat16).contiguous()
    meant = (codes.float() * scales[..., None]).flatten(-2).to(torch.bfloat16)
    body = [codes.flatten(-2).view(torch.uint8)]
    if d == 576:
        body += [scales.contiguous().view(torch.uint8), rope.view(torch.uint8)]
        cells = torch.full((pages, page_size + 1, 656), 255, dtype=torch.uint8)
        cells[:, :page_size] = torch.cat(body, dim=-1)
        cache = cells[:, :page_size, None]
    else:
        body.append(rope.view(torch.uint8))
        powers = torch.full((pages, page_size, 8), 255, dtype=torch.uint8)
        powers[..., :7] = (scales.log2() + 127).to(torch.uint8)
        room = -(-page_size * 584 // 576) * 576  # FlashMLA pads pages
        cells = torch.full((pages, room), 255, dtype=torch.uint8)
        cells[:, : page_size * 584] = torch.cat([torch.cat(body, -1).flatten(1), powers.flatten(1)], dim=1)
        cache = cells.as_strided((pages, page_size, 1, 584), (room, 584, 584, 1))
    return cache, torch.cat([meant, rope], dim=-1)[:, :, None]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int8])
@pytest.mark.parametrize("page_size", [64, 7, 1])
@pytest.mark.parametrize("d", [576, 512])
def test_dense_fp8(d, page_size, dtype):
    case = dense(s=2, h=9, page_size=page_size, d=d)
    unused = case.k_cache.isnan().any(-1)
    cells, meant = fp8(case.k_cache.nan_to_num(), rounded_scales=d == 512)
    if d == 576:
        cells[unused] = 255  # NaN in all three parts
    case.k_cache = cells.view(dtype)
    out, lse = case.run(causal=True, is_fp8_kvcache=True)
    close(out, lse, *case.expected(meant, causal=True))


# ---- sparse: tokens by name


@dataclass
class Chosen:
    """A cache [pages, page size, 1, d] and the tokens that each query names, invalid entries among them."""

    cache: Tensor
    indices: Tensor
    lengths: Tensor | None

    @property
    def valid(self) -> Tensor:
        valid = (self.indices >= 0) & (self.indices < self.cache.shape[0] * self.cache.shape[1])
        if self.lengths is not None:
            valid &= torch.arange(self.indices.shape[2]) < self.lengths[:, None, None]
        return valid

    @property
    def keys(self) -> Tensor:
        """[b * s, top k, d], anything where there is no token."""
        rows = self.cache.flatten(0, 2)
        return rows[torch.where(self.valid, self.indices, 0).flatten(0, 1).long()]


def chosen(b, s, top_k=70, tokens=150, page_size=7, d=576, with_lengths=False, seed=0) -> Chosen:
    generator = torch.Generator().manual_seed(seed)
    cache = random(-(-tokens // page_size), page_size, 1, d, seed=seed).to(torch.bfloat16)
    indices = torch.rand(b, s, tokens, generator=generator).argsort(-1)[..., :top_k].to(torch.int32)
    wrong = torch.rand(b, s, top_k, generator=generator) < 0.2
    wrong[0, 0] = True  # a query that sees nothing
    bad = torch.tensor([*INVALID, cache.shape[0] * page_size], dtype=torch.int32)
    indices[wrong] = bad[torch.randint(len(bad), (int(wrong.sum()),), generator=generator)]
    lengths = (
        torch.randint(0, top_k + 1, (b,), generator=generator, dtype=torch.int32) if with_lengths else None
    )
    case = Chosen(cache, indices, lengths)
    unused = torch.ones(cache.shape[0] * page_size, dtype=torch.bool)
    unused[indices[case.valid].long()] = False
    cache.view(-1, d)[unused] = torch.nan
    return case


def expected_sparse(q: Tensor, scopes: list[Chosen], scale: float, sinks: Tensor | None):
    b, s, h, d = q.shape
    keys = torch.cat([scope.keys for scope in scopes], dim=1)
    seen = torch.cat([scope.valid for scope in scopes], dim=2).flatten(0, 1)
    out, lse, _ = attend(q.reshape(b * s, h, d), keys, seen, scale, sinks)
    return out.view(b, s, h, R), lse.view(b, s, h).transpose(1, 2)


def some_sinks(h: int) -> Tensor:
    sinks = random(h, seed=9)
    sinks[1], sinks[2] = torch.inf, -torch.inf
    return sinks


@pytest.mark.parametrize("page_size", [64, 1, 7])
@pytest.mark.parametrize("h", [16, 64, 128, 9])
@pytest.mark.parametrize("s", [1, 2, 4])
def test_sparse(s, h, page_size):
    case = chosen(3, s, page_size=page_size, with_lengths=s == 2)
    q = random(3, s, h, 576, seed=1).to(torch.bfloat16)
    sinks = some_sinks(h) if s > 1 else None
    got = flash_mla_with_kvcache(
        *(q, case.cache, None, None, R, get_mla_metadata()[0]),
        indices=case.indices,
        attn_sink=sinks,
        topk_length=case.lengths,
    )
    close(*got, *expected_sparse(q, [case], 576**-0.5, sinks))
    assert not got[0][0, 0].any()


def test_sparse_on_another_default_device(path):
    case = chosen(3, 2, with_lengths=True)
    q = random(3, 2, 9, 576, seed=1).to(torch.bfloat16)
    arguments = (q, case.cache, None, None, R, get_mla_metadata()[0])
    options = {"indices": case.indices, "topk_length": case.lengths}
    want = flash_mla_with_kvcache(*arguments, **options)
    with torch.device("meta"):
        got = flash_mla_with_kvcache(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("page_size", [64, 1, 7])
@pytest.mark.parametrize("kind", ["576", "512", "bf16", "fp16"])
def test_sparse_formats(kind, page_size, with_lengths, with_extra, path):
    d = 512 if kind == "512" else 576
    scopes = [chosen(2, 2, page_size=page_size, d=d, with_lengths=with_lengths)]
    if with_extra:
        scopes.append(chosen(2, 2, 33, 90, 2 * page_size, d, with_lengths, seed=2))
    caches = []
    for scope in scopes:
        if kind in ("512", "576"):
            unused = scope.cache.isnan().any(-1)
            cells, scope.cache = fp8(scope.cache.nan_to_num())
            if d == 576:
                cells[unused] = 255
            caches.append(cells.view(torch.float8_e4m3fn))
        else:
            scope.cache = scope.cache.half() if kind == "fp16" else scope.cache
            caches.append(scope.cache)
    q = random(2, 2, 9, d, seed=1).to(torch.float16 if kind == "fp16" else torch.bfloat16)
    sinks = some_sinks(9)
    schedule, splits = get_mla_metadata()
    # In the order in which FlashMLA's own tests pass them.
    got = flash_mla_with_kvcache(
        *(q, caches[0], None, None, R, schedule, splits, 0.06, False, kind in ("512", "576")),
        *(scopes[0].indices, sinks),
        *((caches[1], scopes[1].indices) if with_extra else (None, None)),
        *(scopes[0].lengths, scopes[1].lengths if with_extra else None),
    )
    assert got[0].dtype == q.dtype
    close(*got, *expected_sparse(q, scopes, 0.06, sinks))


@pytest.mark.parametrize("h", [64, 9])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("d", [576, 512])
def test_sparse_prefill(d, with_lengths, h, path):
    case = chosen(21, 1, page_size=1, d=d, with_lengths=with_lengths)
    q = random(21, h, d, seed=1).to(torch.bfloat16)
    sinks = some_sinks(h)
    kv = torch.full((len(case.cache), 2, 580), torch.nan, dtype=torch.bfloat16)
    kv[:, 1:, :d] = case.cache[:, 0]
    out, top, lse = flash_mla_sparse_fwd(
        q, kv[:, 1:, :d], case.indices, 0.03, attn_sink=sinks, topk_length=case.lengths
    )
    want_out, want_lse, want_top = attend(q, case.keys, case.valid[:, 0], 0.03, sinks)
    close(out, lse, want_out, want_lse)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top, want_top, rtol=1e-5, atol=1e-5)
    assert top.dtype == torch.float32
    assert torch.isneginf(top[0]).all()


def test_under_another_default_dtype(path):
    """FlashMLA's tests set bf16."""
    case = chosen(3, 1, page_size=1)
    arguments = (random(3, 9, 576, seed=1).to(torch.bfloat16), case.cache[:, 0], case.indices, 0.03)
    want = flash_mla_sparse_fwd(*arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = flash_mla_sparse_fwd(*arguments)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, want, strict=True))


def test_autocast_rounds_no_score(path):
    case = chosen(3, 1, page_size=1)
    arguments = (random(3, 9, 576, seed=1).to(torch.bfloat16), case.cache[:, 0], case.indices, 0.03)
    want = flash_mla_sparse_fwd(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = flash_mla_sparse_fwd(*arguments)
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("top_k", [0, 5])
def test_no_valid_token(top_k, path):
    q, kv = random(3, 9, 576, seed=1), torch.full((4, 1, 576), torch.nan)
    sinks = some_sinks(9)
    indices = torch.full((3, 1, top_k), HUGE, dtype=torch.int32)
    out, top, lse = flash_mla_sparse_fwd(q, kv, indices, 0.1, attn_sink=sinks)
    assert not out.any()
    assert torch.isneginf(top).all()
    assert torch.isposinf(lse).all()
    out, lse = flash_mla_with_kvcache(
        q[None], kv[:, None], None, None, R, indices=indices.view(1, 3, top_k), attn_sink=sinks
    )
    assert not out.any()
    assert torch.isposinf(lse).all()

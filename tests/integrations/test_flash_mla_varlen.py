"""FlashMLA's prefill on whole keys and values: sequences one after another, against torch's own attention."""

import pytest
import torch

from mla.integrations.flash_mla import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from mla.ops import whole_keys

QUERIES, KEYS = [5, 1, 0, 7, 4, 3], [9, 1, 3, 7, 0, 1]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def inputs(h=4, h_k=4, d=12, d_v=8, dtype=torch.float32, queries=QUERIES, keys=KEYS):
    q, k, v = (
        random(sum(queries), h, d),
        random(sum(keys), h_k, d, seed=1),
        random(sum(keys), h_k, d_v, seed=2),
    )
    return tuple(x.to(dtype) for x in (q, k, v))


def reference(q, k, v, queries, keys, scale, causal):
    """Sequence by sequence, query by query, in fp64."""
    group = q.shape[1] // k.shape[1]
    out, lse = [], []
    rows = (
        k.double().repeat_interleave(group, 1).split(keys),
        v.double().repeat_interleave(group, 1).split(keys),
    )
    for mine, mine_k, mine_v in zip(q.double().split(queries), *rows, strict=True):
        s, t = len(mine), len(mine_k)
        for i in range(s):
            seen = max(t - s + i + 1, 0) if causal else t
            scores = torch.einsum("hd,thd->ht", mine[i], mine_k[:seen]) * scale
            out.append(torch.einsum("ht,thv->hv", scores.softmax(-1), mine_v[:seen]))
            lse.append(scores.logsumexp(-1) if seen else torch.full((q.shape[1],), torch.inf).double())
    return torch.stack(out), torch.stack(lse)


@pytest.mark.parametrize("scores_at_once", [1, 50, 2**24])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("h_k", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_sequences_equal_the_reference(monkeypatch, scores_at_once, causal, h_k, dtype, bound):
    monkeypatch.setattr(whole_keys, "_AT_ONCE", scores_at_once)
    q, k, v = inputs(h_k=h_k, dtype=dtype)
    want, want_lse = reference(q, k, v, QUERIES, KEYS, 12**-0.5, causal)
    out, lse = flash_attn_varlen_func(q, k, v, ends(QUERIES), ends(KEYS, torch.int64), 7, 9, causal=causal)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), want, atol=bound, rtol=bound)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


def test_torchs_own_attention_of_one_sequence():
    q, k, v = inputs(queries=[6], keys=[6], d=24, d_v=24)
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3)[0].transpose(
        0, 1
    )
    out, _ = flash_attn_varlen_func(q, k, v, ends([6]), ends([6]), 6, 6, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    lengths = [5, 1, 7]
    tensors = [x.requires_grad_() for x in inputs(queries=lengths, keys=lengths)]
    weights = random(13, 4, 8, seed=3)
    want, _ = reference(*tensors, lengths, lengths, 12**-0.5, causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which does not reach the scores
        got, _ = flash_attn_varlen_func(*tensors, ends(lengths), ends(lengths), 7, 7, causal=causal)
    wanted, found = (torch.autograd.grad((out * weights).sum(), tensors) for out in (want, got))
    for have, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("queries", "keys"), [([2, 3], [0, 0]), ([], [])])
def test_a_backward_pass_goes_through_queries_that_see_nothing(queries, keys):
    tensors = [x.requires_grad_() for x in inputs(queries=queries, keys=keys)]
    out, _ = flash_attn_varlen_func(*tensors, ends(queries), ends(keys), 3, 0)
    for gradient, x in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


def test_training_keeps_no_scores():
    q, k, v = (x.requires_grad_() for x in inputs(queries=[64], keys=[64]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        flash_attn_varlen_func(q, k, v, ends([64]), ends([64]), 64, 64)
    assert max(kept, default=0) < 4 * 64 * 64  # heads · queries · keys


def test_packed_tensors():
    lengths = [5, 0, 7]
    q, k, v = inputs(queries=lengths, keys=lengths)
    at, options = ends(lengths), {"softmax_scale": 0.4, "causal": True}
    want = flash_attn_varlen_func(q, k, v, at, at, 7, 7, **options)
    kv = torch.cat([k, v], dim=2)
    for got in (
        flash_attn_varlen_kvpacked_func(q, kv, at, at, 7, 7, 12, **options),
        flash_attn_varlen_qkvpacked_func(torch.cat([q, kv], dim=2), at, 7, 12, **options),
        flash_attn_varlen_qkvpacked_func(torch.cat([q, kv], dim=2), at, 7, 12, 0.0, 0.4, True, False, False),
    ):
        for have, wanted in zip(got, want, strict=True):
            assert torch.equal(have, wanted)


def test_no_sequences():
    q, k, v = inputs(queries=[], keys=[])
    out, lse = flash_attn_varlen_func(q, k, v, ends([]), ends([]), 0, 0)
    assert (out.shape, lse.shape) == ((0, 4, 8), (0, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": random(20, 4, 12).double()}, ValueError, r"q \[tokens, h, d\]: expected .* got torch.float64"),
        ({"k": random(21, 4, 11)}, ValueError, r"k \[keys, h_k, d\]: expected .*\[any, any, 12\], got"),
        ({"v": random(20, 4, 8)}, ValueError, r"v \[keys, h_k, d_v\]: expected .*\[21, 4, any\], got"),
        (
            {"k": random(21, 3, 12), "v": random(21, 3, 8)},
            ValueError,
            "k: expected heads that divide the 4 .* 3",
        ),
        (
            {"cu_seqlens_qo": ends(QUERIES) + 1},
            ValueError,
            r"cu_seqlens_qo: expected rising .* 0 to 20, got \[1",
        ),
        (
            {"cu_seqlens_qo": torch.tensor([0, 9, 5, 20])},
            ValueError,
            "cu_seqlens_qo: expected rising numbers",
        ),
        ({"cu_seqlens_kv": ends(QUERIES)}, ValueError, "cu_seqlens_kv: expected rising numbers from 0 to 21"),
        (
            {"cu_seqlens_kv": torch.tensor([0, 21])},
            ValueError,
            "as many sequences as cu_seqlens_qo, 6, got 1",
        ),
        (
            {"cu_seqlens_kv": torch.tensor([0.0, 21.0])},
            ValueError,
            r"cu_seqlens_kv \[b \+ 1\]: .*torch.int32",
        ),
        (
            {"softmax_scale": float("inf")},
            ValueError,
            "softmax_scale: expected a finite number in fp32, got",
        ),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: expected 0.0, .* got 0.1"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    q, k, v = inputs()
    given = {"q": q, "k": k, "v": v, "cu_seqlens_qo": ends(QUERIES), "cu_seqlens_kv": ends(KEYS)}
    with pytest.raises(error, match=message):
        flash_attn_varlen_func(**(given | {"max_seqlen_qo": 7, "max_seqlen_kv": 9} | change))

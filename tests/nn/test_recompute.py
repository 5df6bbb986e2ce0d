"""``recompute_kv``: the same gradients, a fraction of the bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.training_memory import PeakBytes, bytes_kept_for_backward
from mla.nn import MultiheadLatentAttention
from mla.nn import attention as nn_attention
from tests.nn.cases import SIZES, build, make_config, random

MODULES = {
    "plain": {},
    "half, query compression, bias": {"layout": "half", "q_lora_rank": 24, "attention_bias": True},
    "no rope dimensions": {"qk_rope_head_dim": 0},
    "cross-attention": {"context_size": 19},
}


def gradients(module: MultiheadLatentAttention, x: Tensor, context: Tensor | None, **options) -> list[Tensor]:
    sources = [y.detach().clone().requires_grad_() for y in (x, context) if y is not None]
    torch.manual_seed(0)
    out = module(sources[0], context=None if context is None else sources[1], **options)
    wanted = sources + list(module.parameters())
    return [out, *torch.autograd.grad((out * random(*out.shape, seed=5)).sum(), wanted)]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@pytest.mark.parametrize("scores_at_once", [1, 2 * 2 * 9 * 9, 2**24])
@pytest.mark.parametrize("mask_heads", [None, 1, SIZES["num_attention_heads"]])
def test_gradients_equal_the_ordinary_ones(monkeypatch, name, path, scores_at_once, mask_heads):
    monkeypatch.setattr(nn_attention, "_SCORES_AT_ONCE", scores_at_once)
    module = build(**MODULES[name]).double()
    context = random(2, 9, 19, seed=1).double() if "context_size" in MODULES[name] else None
    options = {"path": path}
    if mask_heads is not None:
        options["attention_mask"] = random(2, mask_heads, 9, 9, seed=2) > -0.5
    x = random(2, 9, SIZES["hidden_size"]).double()
    want = gradients(module, x, context, **options)
    module.recompute_kv = True
    got = gradients(module, x, context, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_mask_that_learns_gets_its_gradient():
    module = build().double()
    x = random(2, 6, SIZES["hidden_size"]).double()
    found = []
    for module.recompute_kv in (False, True):
        bias = random(1, SIZES["num_attention_heads"], 6, 6).double().requires_grad_()
        found.append(torch.autograd.grad(module(x, attention_mask=bias).square().sum(), bias)[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-10)


def test_dropout_drops_the_same_weights_again():
    module = build(attention_dropout=0.4).double()
    x = random(2, 9, SIZES["hidden_size"]).double()
    want = gradients(module, x, None)
    module.recompute_kv = True
    for a, b in zip(gradients(module, x, None), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("path", ["absorbed", "expanded"])
def test_gradcheck(path):
    config = make_config(
        hidden_size=5,
        num_attention_heads=2,
        kv_lora_rank=4,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=3,
        q_lora_rank=3,
    )
    torch.manual_seed(0)
    module = MultiheadLatentAttention(config, recompute_kv=True, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        parameters = dict(zip(names, weights, strict=True))
        result: Tensor = torch.func.functional_call(module, parameters, (x,), {"path": path})
        return result

    x = random(1, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *(y.detach().requires_grad_() for y in module.parameters())))


@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@pytest.mark.parametrize("q_lora_rank", [None, 48])
def test_bytes_kept_for_the_backward_pass(path, q_lora_rank):
    config = make_config(
        hidden_size=128,
        num_attention_heads=16,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        q_lora_rank=q_lora_rank,
    )
    s, kept = 256, {}
    for recompute_kv in (False, True):
        module = MultiheadLatentAttention(config, recompute_kv=recompute_kv)
        x = random(1, s, 128).requires_grad_()
        _, kept[recompute_kv] = bytes_kept_for_backward(
            lambda module=module, x=x: module(x, path=path), module
        )
    assert kept[True] * 4 < kept[False]
    # Input, compressed and normed latents, queries before and after their norm, heads' outputs; no scores.
    numbers = 128 + 4 * 64 + 16 + 16 * (32 + 16) + 16 * 32 + 3 * (q_lora_rank or 0)
    assert kept[True] <= 1.1 * 4 * s * numbers


def test_a_few_heads_at_a_time_bound_the_peak(monkeypatch):
    """The backward pass of 16 heads needs the scores of 4 at once where it may hold no more."""
    module = MultiheadLatentAttention(make_config(num_attention_heads=16), recompute_kv=True)
    x = random(1, 128, SIZES["hidden_size"])
    peaks = []
    for heads in (16, 4):
        monkeypatch.setattr(nn_attention, "_SCORES_AT_ONCE", heads * 128 * 128)
        with PeakBytes() as counter:
            module(x, path="expanded").sum().backward()
        peaks.append(counter.peak)
    assert peaks[1] < 0.7 * peaks[0]


def test_peak_bytes_counts_what_is_alive():
    with PeakBytes() as counter:
        first = torch.ones(1000)
        second = first.view(10, 100).t() * 2  # the views are free
        del first
        third = second + 1
        assert counter.alive == 8000
    assert counter.peak == 8000
    del second, third
    assert counter.alive == 0


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    monkeypatch.setattr(nn_attention, "checkpoint", lambda *_, **__: pytest.fail("checkpoint was called"))
    module = build(recompute_kv=True)
    with torch.no_grad():
        module(random(1, 4, SIZES["hidden_size"]))

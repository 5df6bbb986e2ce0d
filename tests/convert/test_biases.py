"""Large biases: a key may have one a hundred times its size, and the softmax ignores what is constant."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from mla.convert import convert
from mla.convert.checkpoint import attention_weights
from mla.convert.descent import Muon, column_apart
from mla.convert.healing import _matrices
from mla.convert.pipeline import embedded, sample_inputs, terms_of
from mla.convert.rope_split import ladder, split_rope
from mla.convert.statistics import AttentionWeights, LayerStatistics, collect
from tests.convert.tiny import divergence, teacher, tokens

PIPELINE, REFIT = (importlib.import_module(f"mla.convert.{name}") for name in ("pipeline", "refit"))


def _measured(kind: str, **changes: object) -> tuple[AttentionWeights, LayerStatistics]:
    """Weights and statistics of a first layer."""
    model = teacher(kind, **changes)
    weights = attention_weights(model, 0)
    with torch.no_grad():
        stream = embedded(model, tokens(4, 24))
        return weights, collect(weights, sample_inputs(weights, model.model.layers[0], stream, range(4)))


def test_the_constant_weighs_nothing_in_the_keys_terms() -> None:
    weights, found = _measured("qwen2", num_key_value_heads=4)  # so many that the basis is the identity
    assert weights.biased
    split = split_rope(found, weights.inv_freq, ladder(6, 100.0))
    constant = terms_of(weights, found, split).cov[:, -1, -1]
    assert float(constant[:4].abs().max()) < 1e-6
    # The values' sum it up: a window's one, and its share of the plain and of the first tokens' covariance.
    traces = [found.plain_cov.trace(), found.start_cov.trace()]
    share = found.value_cov.diagonal(dim1=1, dim2=2).sum(1) * (0.03 / traces[0] + 0.1 / traces[1])
    torch.testing.assert_close(constant[4:], 1 + share)
    torch.testing.assert_close(found.plain_cov[-1, -1].item(), 1.0)


def test_without_biases_nothing_is_centred() -> None:
    weights, found = _measured("llama")
    assert not weights.biased
    assert torch.equal(found.key_plain_cov, found.plain_cov)


def test_biases_take_steps_of_their_own_size() -> None:
    start = torch.randn(3, 8, 17, generator=torch.Generator().manual_seed(1))
    start[..., -1] *= 1000
    stack = start.clone().requires_grad_()
    muon = Muon([stack], [column_apart])
    stack.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
    muon.step(0.01)
    for moved, size in zip(column_apart(stack.detach() - start), column_apart(start), strict=True):
        share = moved.square().mean((1, 2)).sqrt() / size.square().mean((1, 2)).sqrt()
        assert ((share > 0.006) & (share < 0.013)).all()


@pytest.mark.parametrize(("kind", "reading"), [("llama", 1), ("qwen2", 2)])
def test_the_bias_column_is_apart_where_there_is_one(
    kind: str, reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the refit and in healing: of query, latent and rotary key. Without biases a matrix is one."""
    units: list[list[list[torch.Tensor]]] = []

    def told(*given: Any) -> Muon:
        muon = Muon(*given)
        units.append(muon.units)
        return muon

    monkeypatch.setattr(REFIT, "Muon", told)
    student = convert(teacher(kind), calibration=tokens(3, 24), cache=0.5)
    names = ["latent", "key_rope", "query_nope", "query_rope", "key_nope", "value", "output"]
    wanted = dict.fromkeys(names[:4], reading) | dict.fromkeys(names[4:], 1)
    assert len(units) == 2
    for found in units:
        assert [len(each) for each in found] == [wanted[name] for name in names]
    query = "q_b_proj" if kind == "qwen2" else "q_proj"
    views = _matrices(student.config)
    weight = getattr(student.model.layers[0].self_attn, query).weight
    parts = views[query](weight)
    assert len(parts) == 2 * reading
    assert sum(part.numel() for part in parts) == weight.numel()


def test_large_biases_of_keys_cost_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a covariance that holds the constant, which the softmax ignores, twenty times as large."""
    model = teacher("qwen2", seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias *= 20
            layer.self_attn.q_proj.bias *= 0.3
    ids = tokens(8, 64, seed=9)

    def kl() -> float:
        student = convert(model, calibration=tokens(16, 64, seed=3), cache=0.5)
        with torch.no_grad():
            return divergence(model(ids).logits, student(ids).logits)

    def uncentred(*given: Any) -> LayerStatistics:
        found = collect(*given)
        return dataclasses.replace(found, key_plain_cov=found.plain_cov)

    now = kl()
    monkeypatch.setattr(PIPELINE, "collect", uncentred)
    assert now < 0.99 * kl()


def test_first_tokens_have_a_share_of_the_values_terms_alone() -> None:
    weights, found = _measured("llama")
    split = split_rope(found, weights.inv_freq, ladder(6, 100.0))
    cov = terms_of(weights, found, split).cov
    none = dataclasses.replace(found, start_cov=torch.zeros_like(found.start_cov))
    without = terms_of(weights, none, split).cov
    assert torch.equal(cov[:4], without[:4])
    share = found.value_cov.diagonal(dim1=1, dim2=2).sum(1) / found.start_cov.trace()
    torch.testing.assert_close(cov[4:] - without[4:], 0.1 * share[:, None, None] * found.start_cov)

"""Refitting a layer: what it computes is what the stock model computes, and no step of it does harm."""

from __future__ import annotations

import pytest
import torch

from mla.budget import Budget
from mla.convert.checkpoint import attention_weights, empty_student, stream_scale, student_config, write_layer
from mla.convert.pipeline import budget_for, factor_layer, input_norm
from mla.convert.refit import refit, student_block, student_starts
from mla.convert.statistics import Sample, collect, teacher_block, teacher_starts
from tests.convert.tiny import teacher, tokens


@pytest.fixture(scope="module")
def layer():
    """(teacher, budget, weights, factors, inputs, the teacher block's output) of a first layer.

    The first tokens are not those of the windows.
    """
    model = teacher()
    budget = budget_for(model.config, cache=0.4, rank=None, rope=None)
    weights = attention_weights(model, 0)
    with torch.no_grad():
        hidden = model.get_input_embeddings()(tokens(50, 24, seed=4)).float()
        rows = input_norm(model.model.layers[0].input_layernorm, hidden)
        inputs = Sample(rows[:48], rows[48:].flatten(0, 1))
        factors = factor_layer(weights, collect(weights, inputs), budget)
        windows = torch.stack([teacher_block(weights, x) for x in inputs.windows])
        output = Sample(windows, teacher_starts(weights, inputs.starts))
    return model, budget, weights, factors, inputs, output


def _error(factors, budget: Budget, inputs, output) -> float:
    made = [student_block(factors, x, budget.theta) for x in inputs]
    return float((torch.stack(made) - output).square().sum() / output.square().sum())


def test_a_block_computes_what_the_stock_block_computes(layer):
    model, budget, weights, factors, inputs, _ = layer
    config = student_config(model, rank=budget.rank, rope=budget.rope, nope=12, theta=budget.theta)
    student = empty_student(model, config)
    write_layer(student, 0, factors, constant=weights.constant, stream=stream_scale(model))
    x = inputs.windows[:1]
    turn = student.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    with torch.no_grad():
        stock = student.model.layers[0].self_attn(x, position_embeddings=turn, attention_mask=None)[0]
    own = student_block(factors, x[0], budget.theta) * stream_scale(model)
    torch.testing.assert_close(own, stock[0], atol=2e-5, rtol=2e-4)


def test_a_first_token_is_a_window_of_one(layer):
    _, budget, weights, factors, inputs, output = layer
    alone = inputs.starts[:, None]
    torch.testing.assert_close(torch.cat([teacher_block(weights, x) for x in alone]), output.starts)
    student = torch.cat([student_block(factors, x, budget.theta) for x in alone])
    torch.testing.assert_close(student_starts(factors, inputs.starts), student)


def _erring(inputs: Sample) -> Sample:
    """A student's stream: earlier layers have lost something."""
    chance = torch.Generator().manual_seed(0)
    return Sample(*(0.8 * x + 0.1 * torch.randn(x.shape, generator=chance) for x in vars(inputs).values()))


def test_the_descent_lowers_the_error_on_text_it_did_not_see(layer, monkeypatch: pytest.MonkeyPatch):
    _, budget, _, factors, inputs, output = layer
    own = _erring(inputs)
    fitted, unseen = slice(0, 40), slice(40, 48)
    monkeypatch.setattr("mla.convert.refit._TOKENS_PER_STEP", 48)  # of windows of 24
    seen = (Sample(each.windows[fitted], each.starts) for each in (own, output))
    refitted = refit(factors, *seen, theta=budget.theta)
    before, after = (
        _error(each, budget, own.windows[unseen], output.windows[unseen]) for each in (factors, refitted)
    )
    assert after < 0.9 * before


def test_first_tokens_are_fitted_for_themselves(layer, monkeypatch: pytest.MonkeyPatch):
    """And those that were not seen, too; without their share they are not, where windows err otherwise."""
    _, budget, _, factors, inputs, output = layer
    own = Sample(_erring(inputs).windows, 0.4 * inputs.starts)
    monkeypatch.setattr("mla.convert.refit._TOKENS_PER_STEP", 48)
    fitted, unseen = slice(0, 40), slice(40, 48)

    def apart(share: float) -> float:
        monkeypatch.setattr("mla.convert.refit._START_SHARE", share)
        seen = (Sample(each.windows, each.starts[fitted]) for each in (own, output))
        found = student_starts(refit(factors, *seen, theta=budget.theta), own.starts[unseen])
        return float((found - output.starts[unseen]).square().sum() / output.starts[unseen].square().sum())

    assert apart(1.0) < 0.7 * apart(0.0)


def test_a_descent_that_does_harm_is_not_taken(layer, monkeypatch: pytest.MonkeyPatch):
    _, budget, _, factors, inputs, output = layer
    monkeypatch.setattr("mla.convert.refit._RATE", 100.0)
    assert refit(factors, inputs, output, theta=budget.theta) is factors


def test_a_block_that_errs_less_takes_smaller_steps(layer, monkeypatch: pytest.MonkeyPatch):
    _, budget, _, factors, inputs, output = layer
    rates = []
    monkeypatch.setattr("mla.convert.refit._descend", lambda *call: rates.append(call[-1]) or call[0])
    exact = Sample(
        torch.stack([student_block(factors, x, budget.theta) for x in inputs.windows]),
        student_starts(factors, inputs.starts),
    )
    for share in (1.0, 1e-2, 1e-4):
        pairs = zip(vars(exact).values(), vars(output).values(), strict=True)
        wanted = Sample(*(own + share * (theirs - own) for own, theirs in pairs))
        refit(factors, inputs, wanted, theta=budget.theta)
    assert rates[0] / rates[1] == pytest.approx(10, rel=0.2)  # squared errors 1e4 apart
    assert rates[1] / rates[2] == pytest.approx(10, rel=0.01)
    refit(factors, inputs, exact, theta=budget.theta)
    assert len(rates) == 3  # nothing is left to fit

"""What a conversion needs at least is known from the configuration."""

from __future__ import annotations

import pytest
import torch

from mla.convert import budget_for, convert
from mla.convert.memory import least_memory, models_without_weights
from tests.convert.tiny import teacher, tokens


def numbers(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "split_query"), [("llama", False), ("llama", True), ("qwen2", False)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_counted_exactly(kind: str, tied: bool, split_query: bool) -> None:
    model = teacher(kind, tie_word_embeddings=tied)
    student = convert(model, calibration=tokens(1, 8), rank=10, rope=6, split_query=split_query)
    budget = budget_for(model.config, cache=None, rank=10, rope=6)
    empty = models_without_weights(model.config, budget, split_query)
    assert [numbers(each) for each in empty] == [numbers(model), numbers(student)]
    assert {each.device.type for each in empty} == {"meta"}


def test_statistics_text_and_training_count() -> None:
    model = teacher(num_hidden_layers=3)
    config = model.config
    budget = budget_for(config, cache=0.5, rank=None, rope=None)
    student = convert(model, calibration=tokens(1, 8), cache=0.5)
    weights = 4 * (numbers(model) + numbers(student))
    # Two covariances of every head over 48 numbers, measured and as terms; 48 of width, five times.
    statistics = 2 * 2 * 4 * 48 * 48 * 8
    trained = 16 * sum(numbers(layer.self_attn) for layer in student.model.layers)
    for windows, heal, more in (
        (2, False, statistics + 5 * 2 * 16 * 48 * 4),
        (2, True, trained),
        (99, True, statistics + 5 * 99 * 16 * 48 * 4),
    ):
        found = least_memory(config, budget, windows=windows, window=16, split_query=False, heal=heal)
        assert found - weights == more

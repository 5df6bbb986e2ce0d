"""What a conversion needs at least is known from the configuration."""

from __future__ import annotations

import pytest
import torch

from mla.convert import budget_for, convert
from mla.convert.memory import least_memory, student_numbers, teacher_numbers
from tests.convert.tiny import teacher, tokens


def numbers(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("split_query", [True, False])
def test_the_weights_are_counted_exactly(tied: bool, split_query: bool) -> None:
    model = teacher(tie_word_embeddings=tied)
    assert teacher_numbers(model.config) == numbers(model)
    student = convert(model, calibration=tokens(1, 8), rank=10, rope=6, split_query=split_query)
    budget = budget_for(model.config, cache=None, rank=10, rope=6)
    assert student_numbers(model.config, budget, split_query) == numbers(student)


def test_statistics_and_text_count() -> None:
    config = teacher().config
    budget = budget_for(config, cache=0.5, rank=None, rope=None)
    weights = 4 * (teacher_numbers(config) + student_numbers(config, budget, False))
    found = least_memory(config, budget, windows=3, window=16, split_query=False)
    # Two covariances of every head over 48 numbers, measured and as terms; 48 of width, five times.
    assert found == weights + 2 * 2 * 4 * 48 * 48 * 8 + 5 * 3 * 16 * 48 * 4

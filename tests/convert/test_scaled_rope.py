"""Llama 3.1 and later slow their slow rotary pairs down: conversion follows the teacher as it runs."""

from __future__ import annotations

import pytest
import torch

from mla.convert import convert
from mla.convert.checkpoint import teacher_frequencies
from mla.convert.rope_split import ladder

from .tiny import divergence, teacher, tokens

PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("rope", [PLAIN, SCALED])
@pytest.mark.parametrize("width", [12, 64])
def test_frequencies_are_those_that_transformers_rotates_with(rope: dict[str, object], width: int) -> None:
    original = teacher(head_dim=width, rope_parameters=rope)
    found = teacher_frequencies(original.config)
    torch.testing.assert_close(found.float(), original.model.rotary_emb.inv_freq, atol=0, rtol=1e-6)
    with torch.device("meta"):  # as in a conversion on a GPU
        assert teacher_frequencies(original.config).device.type == "meta"
    # A pair that turns more than high_freq_factor times within the original length keeps its speed exactly.
    fast = ladder(width, 10_000.0) > 2 * torch.pi * 4 / 64
    assert torch.equal(found[fast], ladder(width, 10_000.0)[fast])
    assert torch.equal(found, ladder(width, 10_000.0)) == (rope is PLAIN)


def test_a_scaled_model_is_converted_as_it_runs() -> None:
    """With a slot near every frequency; as if unscaled, it would be another model."""
    original, unscaled = (teacher(rope_parameters=rope) for rope in (SCALED, PLAIN))
    ids = tokens(4, 200, seed=5)
    student = convert(original, rank=24, rope=24, calibration=tokens(12, 200))
    assert student.config.rope_parameters["rope_type"] == "default"
    with torch.no_grad():
        wanted = original(ids).logits
        apart = divergence(wanted, unscaled(ids).logits)
        lost = divergence(wanted, student(ids).logits)
    assert lost < 0.25 * apart

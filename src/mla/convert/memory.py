"""How much memory a conversion takes at least, from the configuration alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from mla.budget import Budget
from mla.convert.checkpoint import cached_numbers, head_dim, student_config
from mla.convert.statistics import MOST_STARTS

# Calibration text is in memory as so many streams of hidden states: what either model hands on, while a layer
# is refitted with what the student's block reads and the teacher's writes.
_STREAMS, _REFITTED = 2, 4
# Of a number that healing trains: gradient, momentum and best copy in fp32, and a copy while it is saved.
_TRAINED = 16


def least_memory(
    config: Any, budget: Budget, *, windows: int, window: int, split_query: bool, heal: bool
) -> int:
    """Bytes that a conversion holds at once, products under way and activations apart.

    Both models in fp32, and with them the largest of three: the statistics of one layer in fp64, the terms
    that are made of them and the calibration text's hidden states; while a layer is refitted more of those;
    while healing what every trained number needs.

    Args:
        config: of a model that :func:`mla.convert.check_convertible` accepts.
        budget: of the student.
        windows, window: calibration windows, and tokens in each.
        split_query: see :func:`mla.convert.convert`.
        heal: whether the student is trained afterwards.
    """
    teacher, student = models_without_weights(config, budget, split_query)
    hidden = config.hidden_size
    width = min(hidden, cached_numbers(config))  # of the basis of keys and values
    statistics = 2 * 2 * config.num_attention_heads * width**2 * 8
    starts = min(config.vocab_size, MOST_STARTS) + 1
    stream = (windows * window + starts) * hidden * 4
    trained = sum(_numbers(layer.self_attn) for layer in student.model.layers) if heal else 0
    weights = 4 * (_numbers(teacher) + _numbers(student))
    return int(weights + max(statistics + _STREAMS * stream, _REFITTED * stream, _TRAINED * trained))


def models_without_weights(config: Any, budget: Budget, split_query: bool) -> tuple[Any, Any]:
    """Teacher and student on "meta": what they would be, and no memory for it."""
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        sizes = {"rank": budget.rank, "rope": budget.rope, "nope": head_dim(config)}
        return teacher, DeepseekV3ForCausalLM(
            student_config(teacher, **sizes, theta=1e4, split_query=split_query)
        )


def _numbers(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

"""How much memory a conversion takes at least, from the configuration alone."""

from __future__ import annotations

from typing import Any

from mla.budget import Budget
from mla.convert.checkpoint import cached_numbers, head_dim

# Calibration text is in memory as so many streams of hidden states: what either model hands on, what either
# block reads, and what the teacher's writes.
_STREAMS = 5


def least_memory(config: Any, budget: Budget, *, windows: int, window: int, split_query: bool) -> int:
    """Bytes that :func:`mla.convert.convert` holds at once, products under way and healing apart.

    Both models in fp32, the statistics of one layer in fp64 with the terms that are made of them, and the
    calibration text's hidden states.

    Args:
        config: of a model that :func:`mla.convert.check_convertible` accepts.
        budget: of the student.
        windows, window: calibration windows, and tokens in each.
        split_query: see :func:`mla.convert.convert`.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = min(hidden, cached_numbers(config))  # of the basis of keys and values
    statistics = 2 * 2 * heads * width**2 * 8
    streams = _STREAMS * windows * window * hidden * 4
    weights = teacher_numbers(config) + student_numbers(config, budget, split_query)
    return int(4 * weights + statistics + streams)


def teacher_numbers(config: Any) -> int:
    """How many numbers the teacher's weights are, biases apart."""
    hidden = config.hidden_size
    queries = config.num_attention_heads * head_dim(config) * hidden
    tables = 1 if config.tie_word_embeddings else 2
    return _around(config, tables, 2 * queries + cached_numbers(config) * hidden)


def student_numbers(config: Any, budget: Budget, split_query: bool) -> int:
    """How many numbers the student's weights are, biases apart."""
    hidden, heads, d = config.hidden_size, config.num_attention_heads, head_dim(config)
    queries = heads * (d + budget.rope) * hidden + (hidden * (hidden + 1) if split_query else 0)
    latents = (budget.rank + budget.rope) * hidden + budget.rank
    return _around(config, 2, queries + latents + heads * 2 * d * budget.rank + heads * d * hidden)


def _around(config: Any, tables: int, attention: int) -> int:
    """``tables`` of embeddings, and layers with so many numbers of attention."""
    hidden = config.hidden_size
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return int(tables * config.vocab_size * hidden + config.num_hidden_layers * layer + hidden)

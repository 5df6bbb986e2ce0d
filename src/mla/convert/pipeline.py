"""The conversion, layer by layer: measure, split the rotation, factorise, store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from mla.convert.budget import Budget, choose_budget
from mla.convert.check import check_convertible
from mla.convert.checkpoint import (
    LayerFactors,
    attention_weights,
    empty_student,
    head_dim,
    stream_scale,
    student_config,
    write_layer,
)
from mla.convert.factorise import Terms, factorise
from mla.convert.rope_split import (
    RopeSplit,
    balance,
    ladder,
    mix_pairs,
    residual_keys,
    rotary_keys,
    rotary_queries,
    split_rope,
)
from mla.convert.statistics import AttentionWeights, LayerStatistics, collect
from mla.errors import MLAError

# Share of the plain covariance in each head's own: attention's weights are heavy-tailed, a few thousand
# tokens leave directions unseen.
_PLAIN_SHARE = 0.03


def convert(
    teacher: PreTrainedModel,
    *,
    calibration: Tensor,
    cache: float | None = None,
    rank: int | None = None,
    rope: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> DeepseekV3ForCausalLM:
    """Convert a Llama-type model (MHA, GQA or MQA) to Multi-head Latent Attention, without training.

    Exact where the target can be: one key-value head with ``rope`` = d and ``rank`` = d. Otherwise the
    squared error of every attention block's output on the calibration text is made small; docs/conversion.md
    has the mathematics.

    Args:
        teacher: a model that :func:`check_convertible` accepts; it is not changed.
        calibration: int64 token ids [windows, tokens] (see :func:`tokenize_windows`).
        cache: fraction of the original 2·G·d cached numbers per token and layer; r and p are chosen.
        rank: latent rank r, instead of ``cache``.
        rope: rotary width p (even); with ``rank``, or with ``cache`` (r is what remains).
        on_progress: called as (stage, done, total) after every layer.

    Returns:
        A stock fp32 model in eval mode; ``config.kv_lora_rank`` and ``config.qk_rope_head_dim`` say what was
        chosen.

    Raises:
        MLAError: the model or the combination of arguments cannot be converted.
    """
    config = teacher.config
    check_convertible(config)
    _check_calibration(calibration, config.vocab_size)
    d = head_dim(config)
    budget = choose_budget(
        cache=cache,
        rank=rank,
        rope=rope,
        groups=config.num_key_value_heads or config.num_attention_heads,
        head_dim=d,
        hidden=config.hidden_size,
        theta=float(config.rope_parameters["rope_theta"]),
    )
    layers = config.num_hidden_layers
    student = empty_student(
        teacher,
        student_config(teacher, rank=budget.rank, rope=budget.rope, nope=d, theta=budget.theta),
    )
    stream = stream_scale(teacher)
    with torch.no_grad():
        hidden = teacher.get_input_embeddings()(calibration).float()
        for layer in range(layers):
            block = teacher.model.layers[layer]
            weights = attention_weights(teacher, layer)
            statistics, output = collect(weights, _norm(block.input_layernorm, hidden))
            write_layer(student, layer, factor_layer(weights, statistics, budget), stream=stream)
            hidden += output
            hidden += _mlp(block, hidden)
            if on_progress is not None:
                on_progress("convert", layer + 1, layers)
    return student


def factor_layer(weights: AttentionWeights, statistics: LayerStatistics, budget: Budget) -> LayerFactors:
    """One layer's converted attention from its weights and statistics."""
    split = split_rope(statistics, weights.inv_freq, ladder(budget.rope, budget.theta))
    factors = factorise(_terms(weights, statistics, split), budget.rank)
    queries = weights.q.double()
    key_rope, query_rope = balance(rotary_keys(split, weights.k.double()), rotary_queries(split, queries))
    heads = weights.heads
    return LayerFactors(
        latent=factors.encoder @ statistics.basis,
        key_rope=key_rope,
        query_nope=mix_pairs(split.rotation, queries),
        query_rope=query_rope,
        key_nope=factors.decoders[:heads],
        value=factors.decoders[heads:],
        output=weights.o.double(),
    )


def _terms(weights: AttentionWeights, statistics: LayerStatistics, split: RopeSplit) -> Terms:
    """Keys and values of every head as one list of quadratic forms in the same unit."""
    H, d = weights.heads, weights.head_dim
    group = [weights.group_of(h) for h in range(H)]
    keys = residual_keys(split, weights.k.double() @ statistics.basis.T)
    values = weights.v.double() @ statistics.basis.T
    turn = mix_pairs(split.rotation, torch.eye(d, dtype=torch.float64).expand(H, d, d))
    key_metric = turn @ statistics.query_moment @ turn.mT / d
    value_metric = torch.einsum("hDd,hDe->hde", weights.o.double(), weights.o.double())

    def steadied(cov: Tensor) -> Tensor:
        share = _PLAIN_SHARE * _trace(cov) / _trace(statistics.plain_cov).clamp(min=1e-300)
        return cov + share[:, None, None] * statistics.plain_cov

    return Terms(
        targets=torch.cat([keys[group], values[group]]),
        metric=torch.cat([key_metric, value_metric]),
        cov=torch.cat([steadied(statistics.key_cov), steadied(statistics.value_cov)]),
    )


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """The teacher's RMSNorm in fp32, whatever its dtype."""
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    normed: Tensor = hidden * scale * norm.weight.float()
    return normed


def _mlp(block: Any, hidden: Tensor) -> Tensor:
    """The layer's MLP in the teacher's own dtype, one window at a time."""
    dtype = block.mlp.gate_proj.weight.dtype
    norm = block.post_attention_layernorm
    return torch.stack([block.mlp(_norm(norm, window).to(dtype)).float() for window in hidden])


def _check_calibration(calibration: Tensor, vocabulary: int) -> None:
    if calibration.ndim != 2 or calibration.dtype != torch.int64 or calibration.shape[1] < 2:
        raise MLAError(
            f"calibration must be int64 token ids [windows, tokens], got {calibration.dtype} "
            f"{list(calibration.shape)}"
        )
    if calibration.numel() == 0:
        raise MLAError("calibration is empty: at least one window of 2 tokens is needed")
    if int(calibration.min()) < 0 or int(calibration.max()) >= vocabulary:
        raise MLAError(
            f"calibration holds token ids outside the vocabulary of {vocabulary}: wrong tokenizer?"
        )

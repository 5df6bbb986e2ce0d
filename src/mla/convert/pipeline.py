"""The conversion, layer by layer: measure, split the rotation, factorise, refit, store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from mla.budget import Budget, choose_budget
from mla.convert.check import check_convertible
from mla.convert.checkpoint import (
    LayerFactors,
    attention_weights,
    cached_numbers,
    empty_student,
    has_biases,
    head_dim,
    stream_scale,
    student_config,
    write_layer,
)
from mla.convert.factorise import Terms, factorise
from mla.convert.parts import load, store
from mla.convert.refit import refit, student_block, student_starts
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
from mla.convert.statistics import (
    MOST_STARTS,
    AttentionWeights,
    LayerStatistics,
    Sample,
    collect,
    teacher_block,
    teacher_starts,
)
from mla.convert.text import check_vocabulary, check_window
from mla.errors import MLAError

# Share of the plain covariance in each head's own: attention's weights are heavy-tailed, a few thousand
# tokens leave directions unseen.
_PLAIN_SHARE = 0.03
# Share of first tokens' covariance in that of each head's values.
_START_SHARE = 0.1
# The statistics take at most so many tokens: they are second moments, and cost as much as the descent, which
# reads every window.
_MEASURED = 12_288
# Tokens per window of calibration text. What is fitted on shorter ones drifts away from the teacher in long
# contexts.
_WINDOW = 1024
# The streams are stored after every so many layers: a run that goes on reads the text from there. They may be
# GBs, which a disk writes in the time of a fraction of such a layer.
_STREAMS_EVERY = 4
_STREAMS = "layer-inputs.safetensors"  # beside the layers' files, of which it is worth nothing without all
# Tokens of calibration text from a share of the original cache upwards.
_TOKENS = ((1 / 3, 24_576), (1 / 4, 65_536), (0.0, 131_072))


def convert(
    teacher: PreTrainedModel,
    *,
    calibration: Tensor,
    cache: float | None = None,
    rank: int | None = None,
    rope: int | None = None,
    split_query: bool = False,
    state: Path | None = None,
    on_progress: Callable[[str, float, float], None] | None = None,
) -> DeepseekV3ForCausalLM:
    """Convert a Llama-type model (MHA, GQA or MQA) to Multi-head Latent Attention, block by block.

    Each block is fitted to the teacher's on the calibration text; the model as a whole is not trained.
    Exact where the target can be: one key-value head with ``rope`` = d and ``rank`` = d. Otherwise the
    squared error of every attention block's output on the calibration text is made small; docs/conversion.md
    has the mathematics.

    Args:
        teacher: a model that :func:`check_convertible` accepts; it is not changed. The work is done, and the
            result lies, on its device, which needs fp64.
        calibration: int64 token ids [windows, tokens] (see :func:`tokenize_windows`). If all of several begin
            with the same token, every text is taken to.
        cache: fraction of the original 2·G·d cached numbers per token and layer; r and p are chosen.
        rank: latent rank r, instead of ``cache``.
        rope: rotary width p (even); with ``rank``, or with ``cache`` (r is what remains).
        split_query: store the query projection as two, of full rank D, which llama.cpp's loader asks for:
            exact, D² more numbers per layer. Not for models with biases, which llama.cpp's DeepSeek lacks.
        state: folder for the factors of finished layers, and what both models hand on after some of them: a
            call with the same arguments and the same folder takes them as they are and continues, with the
            same result. The caller keeps folders of different runs apart.
        on_progress: called as (stage, layers done, layers in all) after every layer.

    Returns:
        A stock fp32 model in eval mode; ``config.kv_lora_rank`` and ``config.qk_rope_head_dim`` say what was
        chosen.

    Raises:
        MLAError: the model or the combination of arguments cannot be converted.
    """
    config = teacher.config
    check_convertible(config)
    check_split_query(teacher, split_query)
    _check_calibration(calibration, config.vocab_size)
    budget = budget_for(config, cache=cache, rank=rank, rope=rope)
    d = head_dim(config)
    layers = config.num_hidden_layers
    student = empty_student(
        teacher,
        student_config(
            teacher, rank=budget.rank, rope=budget.rope, nope=d, theta=budget.theta, split_query=split_query
        ),
    )
    scale = stream_scale(teacher)
    measured = _spread(len(calibration), max(1, _MEASURED // calibration.shape[1]))
    # What is created inside lies on the teacher's device.
    with torch.no_grad(), teacher.device:
        if state is not None and all(_place(state, layer).exists() for layer in range(layers)):
            # A healing goes on: nothing is left to fit, so nobody has to read the calibration text.
            for layer in range(layers):
                factors, weights = _stored(state, layer, teacher.device), attention_weights(teacher, layer)
                assert factors is not None
                write_layer(student, layer, factors, constant=weights.constant, stream=scale)
            (state / _STREAMS).unlink(missing_ok=True)
            return student
        first, theirs, own = _streams(teacher, calibration, state)
        for layer in range(layers):
            block, weights = teacher.model.layers[layer], attention_weights(teacher, layer)
            read = partial(block_inputs, weights, block)
            factors = None if state is None else _stored(state, layer, teacher.device)
            if layer < first:
                assert factors is not None
                write_layer(student, layer, factors, constant=weights.constant, stream=scale)
                continue
            output: Iterable[Tensor] = (teacher_block(weights, read(x)) for x in theirs.windows)
            starts = teacher_starts(weights, read(theirs.starts))
            if factors is None:
                # What is largest is not held at one time: the statistics, then what the refit reads.
                statistics = collect(weights, sample_inputs(weights, block, theirs, measured))
                found = factor_layer(weights, statistics, budget)
                del statistics
                output = stacked(output, len(calibration))
                mine = sample_inputs(weights, block, own, range(len(calibration)))
                factors = refit(found, mine, Sample(output, starts), theta=budget.theta)
                del mine
                if state is not None:
                    store(_place(state, layer), vars(factors))
            write_layer(student, layer, factors, constant=weights.constant, stream=scale)
            hand_on(block, weights, theirs, output, starts)
            del output
            output = (student_block(factors, read(x), budget.theta) for x in own.windows)
            hand_on(block, weights, own, output, student_starts(factors, read(own.starts)))
            if state is not None and (layer + 1) % _STREAMS_EVERY == 0 and layer + 1 < layers:
                kept = {"hidden": theirs.windows, "own": own.windows}
                kept |= {"hidden_starts": theirs.starts, "own_starts": own.starts}
                store(state / _STREAMS, {"layers": torch.tensor(layer + 1), **kept})
            if on_progress is not None:
                on_progress("converting", layer + 1, layers)
    if state is not None:  # every layer is there now
        (state / _STREAMS).unlink(missing_ok=True)
    return student


def check_split_query(teacher: PreTrainedModel, split_query: bool) -> None:
    """Raises: MLAError: a split query was asked for, and the model has biases."""
    if split_query and has_biases(teacher):
        raise MLAError(
            "a split query is for llama.cpp, and its DeepSeek has none of the biases that this model's "
            "attention has: leave it out"
        )


def budget_for(config: Any, *, cache: float | None, rank: int | None, rope: int | None) -> Budget:
    """What :func:`convert` will choose for a model with this ``config``.

    Raises:
        MLAError: a combination that makes no sense.
    """
    return choose_budget(
        cache=cache,
        rank=rank,
        rope=rope,
        groups=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim(config),
        hidden=config.hidden_size,
        theta=float(config.rope_parameters["rope_theta"]),
    )


def calibration_size(
    config: Any,
    budget: Budget | None = None,
    *,
    texts: int = 1,
    windows: int | None = None,
    window: int | None = None,
) -> tuple[int, int]:
    """How many windows of how many tokens a conversion deserves, where it is not given.

    24,576 tokens; for a ``budget`` below a third of the original cache 65,536, below a quarter 131,072: the
    factors of a small cache fit a few thousand tokens too well (docs/conversion-experiments.md). 1,024 tokens
    a window, or as many as the model takes. Of long windows there are two all the same, and one for each of
    ``texts``.

    Raises:
        MLAError: a window that the model does not take.
    """
    if window is None:
        window = min(_WINDOW, config.max_position_embeddings)
    check_window(config, window)
    if windows is None:
        share = 1.0 if budget is None else (budget.rank + budget.rope) / cached_numbers(config)
        tokens = next(tokens for least, tokens in _TOKENS if share >= least)
        windows = max(2, texts, -(-tokens // window))
    return windows, window


def factor_layer(weights: AttentionWeights, statistics: LayerStatistics, budget: Budget) -> LayerFactors:
    """One layer's converted attention from its weights and statistics."""
    split = split_rope(statistics, weights.inv_freq, ladder(budget.rope, budget.theta))
    factors = factorise(terms_of(weights, statistics, split), budget.rank)
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


def terms_of(weights: AttentionWeights, statistics: LayerStatistics, split: RopeSplit) -> Terms:
    """Keys and values of every head as one list of quadratic forms in the same unit."""
    H, d = weights.heads, weights.head_dim
    group = weights.group
    keys = residual_keys(split, weights.k.double() @ statistics.basis.T)
    values = weights.v.double() @ statistics.basis.T
    turn = mix_pairs(split.rotation, torch.eye(d, dtype=torch.float64).expand(H, d, d))
    key_metric = turn @ statistics.query_moment @ turn.mT / d
    value_metric = torch.einsum("hDd,hDe->hde", weights.o.double(), weights.o.double())

    # All heads' covariances are the largest thing that a conversion holds: they are written where they stay.
    steadied = statistics.key_cov.new_empty(2 * H, *statistics.plain_cov.shape)
    for cov, plain, room in (
        (statistics.key_cov, statistics.key_plain_cov, steadied[:H]),
        (statistics.value_cov, statistics.plain_cov, steadied[H:]),
    ):
        own = _trace(cov)
        share = _PLAIN_SHARE * own / _trace(plain).clamp(min=1e-300)
        # A head that writes nothing leaves no statistics, and whatever its terms are does not count.
        share = torch.where(own > 0, share, 1.0)
        torch.mul(share[:, None, None], plain, out=room).add_(cov)
    # Every head reads the same of a first token.
    share = _START_SHARE * _trace(statistics.value_cov) / _trace(statistics.start_cov).clamp(min=1e-300)
    steadied[H:].addcmul_(share[:, None, None], statistics.start_cov)
    return Terms(
        targets=torch.cat([keys[group], values[group]]),
        metric=torch.cat([key_metric, value_metric]),
        cov=steadied,
    )


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of 0 .. count-1, evenly."""
    kept = min(count, most)
    return [index * count // kept for index in range(kept)]


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def input_norm(norm: Any, hidden: Tensor) -> Tensor:
    """The teacher's RMSNorm in fp32, whatever its dtype."""
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    normed: Tensor = hidden * scale * norm.weight.float()
    return normed


def block_inputs(weights: AttentionWeights, block: Any, hidden: Tensor) -> Tensor:
    """What the projections of a layer's attention read, fp32 [t, D or D + 1], of its stream [t, D]."""
    return weights.inputs(input_norm(block.input_layernorm, hidden))


def sample_inputs(weights: AttentionWeights, block: Any, stream: Sample, windows: Sequence[int]) -> Sample:
    """The same of first tokens, and of those ``windows`` of the stream, made one at a time."""
    made = (block_inputs(weights, block, stream.windows[place]) for place in windows)
    return Sample(stacked(made, len(windows)), block_inputs(weights, block, stream.starts))


def hand_on(
    block: Any, weights: AttentionWeights, stream: Sample, windows: Iterable[Tensor], starts: Tensor
) -> None:
    """The stream after a layer, in place. ``windows`` is what its attention writes in each, [t, D], and may
    be made from that window of the stream; ``starts`` is what it writes at first tokens, [n, D]. The MLP is
    in the teacher's own dtype.
    """
    norm, dtype = block.post_attention_layernorm, block.mlp.gate_proj.weight.dtype
    for x, made in zip(chain(stream.windows, [stream.starts]), chain(windows, [starts]), strict=True):
        x += made + weights.constant
        x += block.mlp(input_norm(norm, x).to(dtype)).float()


def embedded(teacher: PreTrainedModel, calibration: Tensor) -> Sample:
    """What the first layer reads of the calibration text [b, t] and of tokens that begin one.

    Every text begins with the same token where every window does. Elsewhere any token of the text may begin
    one, and that which the model's configuration names.
    """
    firsts, tokens = torch.unique(calibration[:, 0]), torch.unique(calibration)
    if len(calibration) > 1 and len(firsts) == 1:
        tokens = firsts
    else:
        tokens = tokens[_spread(len(tokens), MOST_STARTS)]
        named = teacher.config.bos_token_id
        if isinstance(named, int) and 0 <= named < teacher.config.vocab_size and named not in tokens:
            # First: the last of them may be held out.
            tokens = torch.cat([tokens.new_tensor([named]), tokens])
    embedding = teacher.get_input_embeddings()
    windows, starts = (embedding(ids.to(teacher.device)).float() for ids in (calibration, tokens))
    return Sample(windows, starts)


def stacked(windows: Iterable[Tensor], count: int) -> Tensor:
    """torch.stack of ``count`` tensors of one shape and dtype that are made one at a time: a list of them
    would take as much memory again.
    """
    found = None
    for index, window in enumerate(windows):
        if found is None:
            found = window.new_empty(count, *window.shape)
        found[index] = window
    assert found is not None
    return found


def _streams(teacher: PreTrainedModel, calibration: Tensor, state: Path | None) -> tuple[int, Sample, Sample]:
    """A layer, and what it reads on the calibration text: the teacher's residual stream, and the student's in
    the teacher's scale, which carries what earlier layers have lost.

    The last layer whose inputs are stored, or the first of all.
    """
    if state is not None and (state / _STREAMS).exists():
        kept = load(state / _STREAMS, teacher.device)
        layer = int(kept["layers"])
        if all(_place(state, earlier).exists() for earlier in range(layer)):
            theirs = Sample(kept["hidden"], kept["hidden_starts"])
            return layer, theirs, Sample(kept["own"], kept["own_starts"])
    theirs = embedded(teacher, calibration)
    return 0, theirs, Sample(theirs.windows.clone(), theirs.starts.clone())


def _place(state: Path, layer: int) -> Path:
    return state / f"layer-{layer:03d}.safetensors"


def _stored(state: Path, layer: int, device: torch.device) -> LayerFactors | None:
    path = _place(state, layer)
    return LayerFactors(**load(path, device)) if path.exists() else None


def _check_calibration(calibration: Tensor, vocabulary: int) -> None:
    if calibration.ndim != 2 or calibration.dtype != torch.int64 or calibration.shape[1] < 2:
        raise MLAError(
            f"calibration must be int64 token ids [windows, tokens], got {calibration.dtype} "
            f"{list(calibration.shape)}"
        )
    if calibration.numel() == 0:
        raise MLAError("calibration is empty: at least one window of 2 tokens is needed")
    check_vocabulary(calibration, vocabulary)

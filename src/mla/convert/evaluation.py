"""How good a model is on a text: perplexity, KL divergence and agreement with another model, and with itself
where it decodes on its cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla import formats
from mla.cache import LatentCache
from mla.convert.checkpoint import stream_scale
from mla.errors import MLAError
from mla.integrations.transformers import absorb, restore


@dataclass(frozen=True)
class Evaluation:
    """Measured on next-token predictions, averaged over all windows.

    Attributes:
        tokens: number of predictions.
        nll: mean negative log-likelihood, nats per token.
        perplexity: exp(nll).
        kl: mean KL(reference ‖ model) in nats per token; None without a reference.
        agreement: share of positions where both models' most likely token is the same; None likewise.
        nll_by_position: mean nll at each of 8 equal parts of the window, from its start to its end.
    """

    tokens: int
    nll: float
    perplexity: float
    kl: float | None
    agreement: float | None
    nll_by_position: tuple[float, ...]


@torch.no_grad()
def evaluate(
    model: Any,
    windows: Tensor,
    *,
    against: Any | None = None,
    cache_format: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure ``model`` on windows of token ids [w, length], one window at a time.

    Args:
        model: a causal language model of Transformers.
        windows: int64 [w, length]; both models must use the same vocabulary.
        against: the reference (teacher); adds KL and agreement.
        cache_format: run an absorbed ``model`` over a ``LatentCache`` of this format: every token meets the
            others' latents as they are stored.
        on_progress: called with (windows done, windows in all).

    Raises:
        MLAError: token ids or vocabularies that do not fit.
    """
    _check_vocabulary(model, against, windows)
    if cache_format is not None:
        formats.cache_format(cache_format)
    nll_sum = torch.zeros(windows.shape[1] - 1, dtype=torch.float64)
    kl_sum = agreed = 0.0
    for done, window in enumerate(windows):
        log_probs = _log_probs(model, window, cache_format)
        targets = window[1:, None].to(log_probs.device)
        nll_sum -= log_probs.gather(1, targets)[:, 0].double().cpu()
        if against is not None:
            reference = _log_probs(against, window).to(log_probs.device)
            kl_sum += float((reference.exp() * (reference - log_probs)).sum(-1).double().sum())
            agreed += float((reference.argmax(-1) == log_probs.argmax(-1)).sum())
        if on_progress is not None:
            on_progress(done + 1, len(windows))
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    nll = float(nll_sum.sum()) / tokens
    parts = torch.tensor_split(nll_sum / windows.shape[0], min(8, windows.shape[1] - 1))
    return Evaluation(
        tokens=tokens,
        nll=nll,
        perplexity=math.exp(min(nll, 700.0)),
        kl=None if against is None else kl_sum / tokens,
        agreement=None if against is None else agreed / tokens,
        nll_by_position=tuple(float(part.mean()) for part in parts),
    )


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding on a latent cache, beside one full forward pass over the same tokens.

    Attributes:
        prompts: how many. ``tokens``: decoded after each.
        cache_format: of the cache; None: latents as the model computes them.
        cache_bytes_per_token: of all layers, read off the cache's tensors.
        agreement: share of the decoded tokens that are the most likely ones of the full pass, too.
    """

    prompts: int
    tokens: int
    cache_format: str | None
    cache_bytes_per_token: int
    agreement: float


@torch.no_grad()
def decode_greedily(
    model: Any, windows: Tensor, *, prompts: int = 4, tokens: int = 32, cache_format: str | None = None
) -> Decoding:
    """Let an MLA model go on with the beginnings of windows, absorbed, token by token; then read it all anew.

    Args:
        model: from :func:`mla.convert.convert`; it is absorbed while it decodes, and only then.
        windows: int64 token ids [w, length]. A prompt is the first half of one, or 64 tokens.
        prompts: windows that are begun with, or all there are.
        tokens: to decode after each, or as many as a window has room for.
        cache_format: see :class:`LatentCache`.
    """
    begun = min(64, windows.shape[1] // 2)
    count = min(tokens, windows.shape[1] - begun)
    ids = given = windows[:prompts, :begun].to(model.device)
    absorb(model)
    try:
        # The last token is not read: exactly what is allocated is in use.
        cache = LatentCache(model.config, capacity=begun + count - 1, format=cache_format)
        for _ in range(count):
            given = model(given, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)[:, None]
            ids = torch.cat([ids, given], 1)
    finally:
        restore(model)
    wanted = model(ids[:, :-1], use_cache=False, logits_to_keep=count).logits.argmax(-1)
    return Decoding(
        prompts=len(ids),
        tokens=count,
        cache_format=cache_format,
        cache_bytes_per_token=cache.nbytes // (len(ids) * cache.get_seq_length()),
        agreement=float((wanted == ids[:, begun:]).float().mean()),
    )


@torch.no_grad()
def layer_errors(model: Any, reference: Any, windows: Tensor) -> list[float]:
    """Relative squared error of every attention block's output, Σ‖y − y'‖² / Σ‖y'‖², front to back.

    Both models run on their own streams, so a block also answers for what the layers before it got wrong. 0
    is the reference's output exactly, 1 is as far from it as an output of nothing.

    Args:
        model: from :func:`mla.convert.convert`, also when absorbed. Its stream is the reference's, scaled by
            :func:`mla.convert.checkpoint.stream_scale`, which is undone here.
        reference: the model it came from.
        windows: int64 token ids [w, length], one window at a time.

    Returns:
        One number per layer.

    Raises:
        MLAError: token ids or vocabularies that do not fit.
    """
    _check_vocabulary(model, reference, windows)
    stream = stream_scale(reference)
    apart = torch.zeros(len(reference.model.layers), dtype=torch.float64)
    energy = torch.zeros_like(apart)
    for window in windows:
        theirs, own = _block_outputs(reference, window), _block_outputs(model, window)
        for layer, (expected, found) in enumerate(zip(theirs, own, strict=True)):
            apart[layer] += (found.to(expected.device) / stream - expected).double().square().sum().cpu()
            energy[layer] += expected.double().square().sum().cpu()
    tiny = torch.finfo(torch.float64).tiny
    errors: list[float] = (apart / energy.clamp(min=tiny)).tolist()
    return errors


def _block_outputs(model: Any, window: Tensor) -> list[Tensor]:
    """What every attention block adds to the stream, fp32 [length, d] per layer."""
    found: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        found.append(output[0].float())

    handles = [layer.self_attn.o_proj.register_forward_hook(keep) for layer in model.model.layers]
    try:
        model.model(window[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _log_probs(model: Any, window: Tensor, cache_format: str | None = None) -> Tensor:
    """[length - 1, vocabulary] in fp32: the prediction of every token but the first."""
    options: dict[str, Any] = {"use_cache": False}
    if cache_format is not None:
        config = model.config.get_text_config(decoder=True)
        options = {"past_key_values": LatentCache(config, capacity=len(window), format=cache_format)}
    logits = model(window[None].to(model.device), **options).logits[0, :-1]
    result: Tensor = logits.float().log_softmax(-1)
    return result


def _check_vocabulary(model: Any, against: Any | None, windows: Tensor) -> None:
    size = model.config.get_text_config(decoder=True).vocab_size
    if int(windows.max()) >= size:
        raise MLAError(f"token id {int(windows.max())} is outside the model's vocabulary of {size}")
    if against is not None:
        other = against.config.get_text_config(decoder=True).vocab_size
        if other != size:
            raise MLAError(f"the two models have vocabularies of {size} and {other} tokens: not comparable")

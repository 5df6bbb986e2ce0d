"""How fast a model reads and writes on this machine, absorbed or as Transformers runs it."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache

from mla.cache import LatentCache
from mla.config import MLAConfig
from mla.errors import MLAError
from mla.integrations.doctor import diagnose
from mla.integrations.loading import require_memory
from mla.integrations.prefixes import read_prompt
from mla.integrations.transformers import absorb, restore

Way = Literal["absorbed", "stock"]

#: Tokens on which both ways are compared before anything is timed.
_COMPARED = 32


@dataclass(frozen=True)
class Speed:
    """One way of running at one length of context.

    Attributes:
        way: "absorbed", or "stock", which is Transformers' own attention and cache.
        context: tokens read, and in the cache while tokens are written.
        prefill: tokens read per second, one run.
        decode: tokens written per second, by the median of the steps.
        cache_bytes_per_token: of all layers, as the tensors hold them.
    """

    way: Way
    context: int
    prefill: float
    decode: float
    cache_bytes_per_token: float


@torch.no_grad()
def measure_speed(
    model: Any,
    contexts: Sequence[int],
    *,
    cache_format: str,
    tokens: int = 16,
    ways: Sequence[Way] = ("absorbed",),
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Speed]:
    """Time reading and writing random tokens, one sequence, after both ways have given the same answers.

    Args:
        model: an MLA model of Transformers, absorbed or not; it is left as Transformers made it.
        contexts: lengths that are read, each with room for ``tokens`` more in the model.
        cache_format: of the absorbed way's cache, a name of ``mla.formats.CACHE_FORMATS``.
        tokens: written after each, 2 or more.
        ways: what to time, in turns.
        on_progress: called with (runs done, runs in all).

    Raises:
        MLAError: the ways differ by more than rounding; the longest cache would not fit into memory (of the
            machine; that of other devices is not asked).
    """
    restore(model)
    config = MLAConfig.from_transformers(model.config)
    text = model.config.get_text_config(decoder=True)
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(text.vocab_size, (1, count), generator=generator, device="cpu").to(model.device)

    if model.device.type == "cpu":
        longest = max(contexts) + tokens
        held = config.cache_bytes(longest, cache_format)
        require_memory(held, f"a cache of {longest} tokens")
    report = diagnose(model, draw(min(_COMPARED, config.max_position_embeddings)))
    if not report.safe:
        raise MLAError(f"absorbed, the model does not give its own answers: {'; '.join(report.problems)}")
    found: list[Speed] = []
    runs = [(context, way) for context in contexts for way in ways]
    for context, way in runs:
        on_progress(len(found), len(runs))
        ids = draw(context + tokens)
        with _running(model, way):
            found.append(_time(model, ids, context, way, cache_format))
    on_progress(len(runs), len(runs))
    return found


@contextmanager
def _running(model: Any, way: Way) -> Iterator[None]:
    if way == "stock":
        yield
        return
    absorb(model)
    try:
        yield
    finally:
        restore(model)


def _time(model: Any, ids: torch.Tensor, context: int, way: Way, cache_format: str) -> Speed:
    text = model.config.get_text_config(decoder=True)
    cache: Any = DynamicCache(config=model.config)
    if way == "absorbed":
        cache = LatentCache(text, capacity=ids.shape[1], format=cache_format)
    model(ids[:, :16])  # what happens once, happens before
    prompt = ids[0, :context].tolist()
    started = time.perf_counter()
    if way == "absorbed":  # in steps, as generate and serve read
        read_prompt(model, prompt, cache, lambda read, total: None)
    _wait_for(model(ids[:, cache.get_seq_length() : context], past_key_values=cache, logits_to_keep=1))
    prefill = time.perf_counter() - started
    steps = []
    for position in range(context, ids.shape[1]):
        started = time.perf_counter()
        _wait_for(model(ids[:, position : position + 1], past_key_values=cache))
        steps.append(time.perf_counter() - started)
    return Speed(
        way=way,
        context=context,
        prefill=context / prefill,
        decode=1 / statistics.median(steps),
        cache_bytes_per_token=_nbytes(cache) / cache.get_seq_length(),
    )


def _wait_for(output: Any) -> None:
    """A GPU goes on computing after the call has returned."""
    output.logits[0, -1, 0].item()


def _nbytes(cache: Any) -> int:
    if isinstance(cache, LatentCache):
        return cache.nbytes
    names = ("keys", "values", "indexer_keys")
    held = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(each.nbytes for each in held if isinstance(each, torch.Tensor))

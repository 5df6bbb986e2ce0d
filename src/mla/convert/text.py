"""Calibration text: windows cut out of a file, or written by the model itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mla.errors import MLAError

# Sequences that are written side by side; a decoded token costs about the same for one as for so many.
_BATCH = 32
# A token that is not given but drawn.
_FREE = -1


def write_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    windows: int,
    length: int,
    *,
    seed: int = 0,
    on_progress: Callable[[str, float, float], None] | None = None,
) -> Tensor:
    """Let the model write its own calibration text, drawn at temperature 1.

    Half of the windows start as a document does. Where the tokenizer has a chat template, the other half
    starts where a user's turn does, so that the model asks itself something and answers. Without a token that
    texts start from, any is the first.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        windows: number of windows.
        length: tokens per window.
        seed: of the drawing.
        on_progress: called as (stage, windows done, windows in all).

    Returns:
        int64 token ids [windows, length], in an order that ``seed`` fixes.

    Raises:
        MLAError: no window to write.
    """
    check_windows(windows, length)
    starts = _starts(tokenizer)
    longest = min(length, max(len(start) for start in starts))
    given = torch.tensor([(start + [_FREE] * longest)[:longest] for start in starts])
    given = given[torch.arange(windows) % len(starts)]
    chance = torch.Generator(model.device).manual_seed(seed)
    written = []
    for batch in given.chunk(-(-windows // _BATCH)):
        written.append(_draw(model, batch.to(model.device), length, chance))
        if on_progress is not None:
            on_progress("writing calibration text", sum(len(ids) for ids in written), windows)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
    return torch.cat(written)[order]


def _starts(tokenizer: Any) -> list[list[int]]:
    """Token ids that a text begins with: a document's, and a user's turn's where there is a chat template."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    starts = [[_FREE if first is None else int(first)]]
    if tokenizer.chat_template is not None:
        marker = "MARKER"
        turn = tokenizer.apply_chat_template([{"role": "user", "content": marker}], tokenize=False)
        ids = tokenizer(turn.split(marker)[0], add_special_tokens=False)["input_ids"]
        if ids:
            starts.append(ids)
    return starts


@torch.no_grad()
def _draw(model: PreTrainedModel, given: Tensor, length: int, chance: torch.Generator) -> Tensor:
    """Continue rows of token ids [w, n], free ones last, to [w, length], past any end of text."""
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.randint(vocabulary, (len(given), 1), generator=chance, device=given.device)
    parts = [torch.where(given[:, :1] == _FREE, first, given[:, :1])]
    layers = model.config.get_text_config().num_hidden_layers
    cache = Cache(layers=[_Reserved(length) for _ in range(layers)])
    for place in range(1, length):
        output = model(input_ids=parts[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        # torch.multinomial draws a number for every entry of the vocabulary, one after another.
        reached = output.logits[:, -1].float().softmax(-1).cumsum(-1)
        chosen = torch.rand(len(given), 1, generator=chance, device=given.device) * reached[:, -1:]
        drawn = torch.searchsorted(reached, chosen, right=True).clamp_(max=vocabulary - 1)
        if place < given.shape[1]:
            drawn = torch.where(given[:, place, None] == _FREE, drawn, given[:, place, None])
        parts.append(drawn)
    return torch.cat(parts, dim=1).cpu()


class _Reserved(DynamicLayer):  # type: ignore[misc]  # Transformers' caches are untyped
    """A cache layer with room for ``length`` tokens: its base copies all that it holds for every new one."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.rooms: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values so far [b, g, t, d], from those of the next tokens."""
        seen = self.get_seq_length()
        if not seen:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [
                x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_states, value_states)
            ]
        end = seen + key_states.shape[2]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, seen:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values


def tokenize_windows(text: str, tokenizer: Any, windows: int, length: int, *, seed: int = 0) -> Tensor:
    """Cut ``windows`` windows of ``length`` tokens out of ``text``, spread over all of it.

    Args:
        text: any text; it is split into ``windows`` equal parts and one window is read from each, at a place
            that depends on ``seed`` and on nothing else, so a small calibration still sees every topic.
        tokenizer: a Transformers tokenizer. Its beginning-of-sequence token, where it adds one by itself,
            starts every window, as it does in use.
        windows: number of windows.
        length: tokens per window.
        seed: place of the window inside its part.

    Returns:
        int64 token ids [windows, length].

    Raises:
        MLAError: the text is too short.
    """
    check_windows(windows, length)
    chance = random.Random(seed)
    part = len(text) // windows
    if part < length:  # not even one character per token
        raise MLAError(
            f"the calibration text is too short: {len(text)} characters for {windows} windows of {length} "
            "tokens; give a longer text, fewer windows or shorter ones"
        )
    rows = []
    for index in range(windows):
        # 8 characters per token is more than any tokenizer of a European language needs.
        room = max(part - 8 * length, 0)
        start = index * part + chance.randint(0, room)
        ids = tokenizer(text[start : start + max(part, 8 * length)])["input_ids"]
        if len(ids) < length:
            raise MLAError(
                f"the calibration text is too short: a part of {part} characters gives {len(ids)} tokens, "
                f"{length} are needed; give a longer text, fewer windows or shorter ones"
            )
        rows.append(torch.tensor(ids[:length], dtype=torch.int64))
    return torch.stack(rows)


def cut_text(text: str, tokenizer: Any, length: int) -> Tensor:
    """All of ``text`` in windows that follow one another; what does not fill one is left out.

    Args:
        text: any text, even one shorter than a window.
        tokenizer: a Transformers tokenizer. Its beginning-of-sequence token, where it adds one by itself,
            starts every window, as it does in use.
        length: tokens per window.

    Returns:
        int64 token ids [windows, length]; there may be no window.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    start = ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []
    ids, fresh = ids[len(start) :], length - len(start)
    count = len(ids) // fresh
    rows = torch.tensor(ids[: count * fresh], dtype=torch.int64).view(count, fresh)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), rows], dim=1)


def check_windows(windows: int, length: int) -> None:
    """Raises: MLAError: fewer than one window of two tokens."""
    if windows < 1 or length < 2:
        raise MLAError(f"need at least 1 window of 2 tokens, got {windows} of {length}")

"""Calibration text: windows cut out of a file, or written by the model itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mla.convert.parts import load, store
from mla.errors import MLAError

# Tokens of a text that the model writes. Long ones lose their thread, and many short ones are more varied.
_PIECE = 128
# One in so many is a conversation, in which the user says so many tokens.
_ASKED = 4
_SAID = 24
# Texts that are written side by side; a decoded token costs little more for many of them than for one.
_BATCH = 128
# Tokens in a row by which two windows are known to hold the same text.
_SAME = 64
# A token that is not given but drawn.
_FREE = -1


class TooShortError(MLAError):
    """A text with fewer windows than are asked for."""


def write_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    windows: int,
    length: int,
    *,
    seed: int = 0,
    state: Path | None = None,
    on_progress: Callable[[str, float, float], None] | None = None,
) -> Tensor:
    """Let the model write its own calibration text, drawn at temperature 1.

    A window holds several texts, one after another, of 128 tokens or a little more. Each goes on from one
    token, any that the tokenizer knows but special ones, so that they are about all there is. Where the
    tokenizer has a chat template, every fourth is a conversation instead: the model begins to ask something
    and answers.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer. Its beginning-of-sequence token, where it adds one by itself, starts every
            window and is what every text was written after.
        windows: number of windows.
        length: tokens per window.
        seed: of the drawing.
        state: file for what is written so far: a call with the same arguments and the same file goes on from
            there. The caller removes it.
        on_progress: called as (stage, windows done, windows in all).

    Returns:
        int64 token ids [windows, length].

    Raises:
        MLAError: no window to write.
    """
    check_windows(windows, length)
    first = _beginning(tokenizer)
    asked = _conversation(tokenizer, first)
    fresh = length - len(first)
    piece = min(fresh, max(_PIECE, 2 * len(asked)))
    count = -(-windows * fresh // piece)
    given = torch.full((count, len(first) + piece), _FREE)
    given[:, : len(first)] = torch.tensor(first, dtype=torch.int64)
    words = _words(tokenizer, model.config.get_text_config().vocab_size)
    chosen = torch.randint(len(words), (count,), generator=torch.Generator().manual_seed(seed))
    given[:, len(first)] = words[chosen]
    if asked:
        row = torch.tensor(asked[:piece])
        part = given[_ASKED - 1 :: _ASKED, len(first) : len(first) + len(row)]
        part[:] = torch.where(row == _FREE, part, row)
    chance = torch.Generator(model.device).manual_seed(seed)
    written = given[:0]
    if state is not None and state.exists():
        kept = load(state)
        written = kept["written"]
        chance.set_state(kept["chance"])
    size = -(-count // -(-count // _BATCH))
    for begun in range(len(written), count, size):
        batch = given[begun : begun + size].to(model.device)
        written = torch.cat([written, _draw(model, batch, chance)])
        if state is not None:
            store(state, {"written": written, "chance": chance.get_state()})
        if on_progress is not None:
            done = written[:, len(first) :].numel() // fresh
            on_progress("writing calibration text", min(done, windows), windows)
    rows = written[:, len(first) :].flatten()[: windows * fresh].view(windows, fresh)
    return torch.cat([given[:1, : len(first)].expand(windows, -1), rows], dim=1)


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer adds one by itself."""
    ids: list[int] = list(tokenizer("")["input_ids"][:1])
    return ids if tokenizer.bos_token_id is not None and ids == [tokenizer.bos_token_id] else []


def _conversation(tokenizer: Any, first: list[int]) -> list[int]:
    """Tokens after ``first`` up to the answer, what the user says free; none without a chat template."""
    if tokenizer.chat_template is None:
        return []
    marker = "MARKER"
    messages = [{"role": "user", "content": marker}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, after = text.partition(marker)
    ids: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
    if ids[: len(first)] == first:
        ids = ids[len(first) :]
    return [*ids, *[_FREE] * _SAID, *tokenizer(after, add_special_tokens=False)["input_ids"]]


def _words(tokenizer: Any, vocabulary: int) -> Tensor:
    """Token ids that stand for text; others, and rows that only fill the vocabulary up, may be untrained."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    found = sorted(i for i in set(tokenizer.get_vocab().values()) - special if i < vocabulary)
    return torch.tensor(found)


@torch.no_grad()
def _draw(model: PreTrainedModel, given: Tensor, chance: torch.Generator) -> Tensor:
    """Rows of token ids [w, n] with the free ones drawn, past any end of text; the first is given."""
    vocabulary = model.config.get_text_config().vocab_size
    layers = model.config.get_text_config().num_hidden_layers
    cache = Cache(layers=[_Reserved(given.shape[1]) for _ in range(layers)])
    parts = [given[:, :1]]
    for place in range(1, given.shape[1]):
        output = model(input_ids=parts[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        # torch.multinomial draws a number for every entry of the vocabulary, one after another.
        reached = output.logits[:, -1].float().softmax(-1).cumsum(-1)
        chosen = torch.rand(len(given), 1, generator=chance, device=given.device) * reached[:, -1:]
        drawn = torch.searchsorted(reached, chosen, right=True).clamp_(max=vocabulary - 1)
        parts.append(torch.where(given[:, place, None] == _FREE, drawn, given[:, place, None]))
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


def tokenize_windows(
    text: str, tokenizer: Any, windows: int, length: int, *, seed: int = 0, name: str = "the text"
) -> Tensor:
    """Cut ``windows`` windows of ``length`` tokens out of ``text``, spread over all of it.

    Args:
        text: any text; it is split into ``windows`` equal parts and one window is read from each, at a place
            that depends on ``seed`` and on nothing else, so a small calibration still sees every topic.
            Windows of a text that is short for so many of them overlap.
        tokenizer: a Transformers tokenizer. Its beginning-of-sequence token, where it adds one by itself,
            starts every window, as it does in use.
        windows: number of windows.
        length: tokens per window.
        seed: place of the window inside its part.
        name: of the text, for the error.

    Returns:
        int64 token ids [windows, length].

    Raises:
        TooShortError: says how many windows fit.
    """
    check_windows(windows, length)
    # 8 characters per token is more than most text needs; where it is not enough, all is read anew in longer
    # pieces.
    reach = 8 * length
    while True:
        # Not even one character per token from one window to the next: they would be nearly the same.
        fitting = max(0, len(text) - reach) // length + 1
        pieces = _pieces(text, windows, reach, seed) if windows <= fitting else []
        rows = [tokenizer(piece)["input_ids"][:length] for piece in pieces]
        if rows and min(map(len, rows)) == length:
            return torch.tensor(rows, dtype=torch.int64)
        if windows > fitting or reach >= len(text):
            if len(tokenizer(text[-reach:])["input_ids"]) < length:
                fitting = 0
            raise TooShortError(
                f"{name} is too short: {len(text)} characters hold {fitting} of {windows} windows of "
                f"{length} tokens; give a longer text, fewer windows or shorter ones"
            )
        reach *= 2


def _pieces(text: str, windows: int, reach: int, seed: int) -> list[str]:
    """``windows`` pieces of ``reach`` characters, one of each part of the text."""
    chance = random.Random(seed)
    part = len(text) // windows
    room = part - reach  # below 0 in a short text: there windows lie closer together, the last at its end
    last = max(0, len(text) - reach)
    starts = [
        index * part + chance.randint(0, room) if room >= 0 else index * last // max(1, windows - 1)
        for index in range(windows)
    ]
    return [text[start : start + reach] for start in starts]


def cut_text(text: str, tokenizer: Any, length: int, *, limit: int | None = None) -> Tensor:
    """The beginning of ``text`` in windows that follow one another; what does not fill one is left out.

    Args:
        text: any text, even one shorter than a window.
        tokenizer: a Transformers tokenizer. Its beginning-of-sequence token, where it adds one by itself,
            starts every window, as it does in use.
        length: tokens per window.
        limit: of the text at most so many tokens; a large file is not tokenised whole. None takes all of it.

    Returns:
        int64 token ids [windows, length]; there may be no window.
    """
    start = _beginning(tokenizer)
    # 16 characters per token are more than nearly every text needs; where they are not enough, more is read.
    reach = len(text) if limit is None else 16 * limit
    while True:
        ids = tokenizer(text[:reach], verbose=False)["input_ids"][len(start) :][:limit]
        if reach >= len(text) or len(ids) == limit:
            break
        reach *= 2
    fresh = length - len(start)
    count = len(ids) // fresh
    rows = torch.tensor(ids[: count * fresh], dtype=torch.int64).view(count, fresh)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), rows], dim=1)


def seen_before(windows: Tensor, others: Tensor) -> list[bool]:
    """Which of ``windows`` hold text that one of ``others`` holds, too, wherever either begins.

    Text is the same where 64 tokens in a row are, or a whole window of fewer: more than a chat template puts
    at the head of every conversation.

    Args:
        windows: int64 token ids [w, t]. ``others``: int64 token ids [v, t'].
    """
    length = min(_SAME, windows.shape[1], others.shape[1])

    def runs(row: Tensor) -> set[bytes]:
        ids = row.cpu().numpy().tobytes()
        size = row.element_size()
        return {ids[size * start : size * (start + length)] for start in range(len(row) - length + 1)}

    known = set().union(*(runs(row) for row in others))
    return [not known.isdisjoint(runs(row)) for row in windows]


def check_windows(windows: int, length: int) -> None:
    """Raises: MLAError: fewer than one window of two tokens."""
    if windows < 1 or length < 2:
        raise MLAError(f"need at least 1 window of 2 tokens, got {windows} of {length}")


def check_window(config: Any, length: int) -> None:
    """Refuse windows that a model with this ``config`` does not read whole.

    Raises:
        MLAError: fewer than two tokens, or more than the model has positions, where it has a number of them.
    """
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length < 2 or (most is not None and length > most):
        expected = "2 or more" if most is None else f"2 to {most} tokens, which is what the model takes"
        raise MLAError(f"window: expected {expected}, got {length}")


def check_vocabulary(ids: Tensor, vocabulary: int) -> None:
    """Raises: MLAError: token ids that a model of ``vocabulary`` tokens does not know."""
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocabulary:
        raise MLAError(
            f"calibration text holds token ids from {least} to {most}, outside the model's "
            f"vocabulary of {vocabulary}: another model's tokenizer?"
        )

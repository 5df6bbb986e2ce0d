"""Answers, written token by token on latents that are kept: the one loop of command line and server."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mla.cache import LatentCache
from mla.integrations.prefixes import Prefixes, read_prompt
from mla.integrations.writing import write_in_order

#: Tokens of a prompt that say how the text goes on after it.
_CONTEXT = 8
#: Tokens further that a letter may reach: none has more than four bytes, and tokens may be single bytes.
_LETTER = 3
#: What decoders write for bytes that are no letter.
_NO_LETTER = "\ufffd"


class _Stopped(Exception):  # noqa: N818 - not an error
    """Nobody wants the answer any more, of which not a word has been written."""


class Writer:
    """A model that writes answers, with its tokenizer and what it has read before.

    Of the model's own generation config what does not go with one token after another is taken out of it,
    into ``left_out`` by name, and the strings that end an answer into ``stops``.

    Args:
        model: an absorbed model; tokenizer: its tokenizer.
        prefixes: makes the caches.
    """

    def __init__(self, model: Any, tokenizer: Any, prefixes: Prefixes) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prefixes = prefixes
        self.left_out = write_in_order(model)
        own = model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        # Ours to find: generate() wants a tokenizer for them, and leaves them in the text. Special tokens are
        # no text: those are found as tokens.
        stops = [own.stop_strings] if isinstance(own.stop_strings, str) else own.stop_strings or []
        added = tokenizer.added_tokens_decoder.items()
        special = {each.content: token for token, each in added if each.special}
        # What follows a special token in a stop string would come after the end.
        found = {stop: [token for text, token in special.items() if stop.startswith(text)] for stop in stops}
        self.stops = tuple(stop for stop in stops if not found[stop])
        self.end_tokens = {*ends, *(token for tokens in found.values() for token in tokens)} - {None}
        own.eos_token_id, own.stop_strings = sorted(self.end_tokens) or None, None

    def write(
        self,
        tokens: list[int],
        config: Any,
        writing: "Writing",
        *,
        seed: int | None,
        room: int,
        on_read: Callable[[int, int], object] = lambda read, total: None,
        stopped: Callable[[], bool] = lambda: False,
        read: Callable[[LatentCache, Callable[[int, int], object]], object] | None = None,
    ) -> LatentCache:
        """Write the continuation of a prompt; latents of a common beginning are used again, and its own kept.

        Args:
            tokens: the prompt.
            config: as ``writing_config`` makes it.
            writing: told every token; the answer ends where it says so.
            seed: of the draw; None takes another one every time.
            room: tokens of the answer for which the cache is made larger at a time.
            on_read: told (tokens read, tokens in all) while a long prompt is read, last when all of it is.
            stopped: asked between steps of a long prompt and after every token; the answer ends where it says
                yes, without a token if that is before the first one.
            read: reads the prompt but for its last token into an empty cache, in a way of its own: called as
                (cache, check), with ``check`` as for ``read_prompt``. Nothing is kept then.

        Returns:
            The cache, which does not hold the newest token yet.

        Raises:
            MLAError: the cache would not fit into the memory, or the budget.
        """
        s, most = len(tokens), config.max_new_tokens
        size = s + min(most, room)
        cache = self.prefixes.take(tokens, size) if read is None else self.prefixes.new(size)
        writing.reused = cache.get_seq_length()
        writing.times.append(time.perf_counter())

        def check(done: int, total: int) -> None:
            on_read(done, total)
            if stopped():
                raise _Stopped

        # A streamer would be given the token after generate() has asked whether to stop: an answer would end
        # one token and one step later.
        def step(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            nonlocal size
            token = int(ids[0, -1])
            ends = writing.put(token) or stopped()
            # After an end token generate() goes no step further, for which there would have to be room.
            if ids.shape[1] > size and not ends and token not in self.end_tokens:
                size = min(size + room, s + most)
                self.prefixes.grow(cache, size)
            return torch.full((1,), ends, device=ids.device)

        # An answer ends between two steps only, when the cache holds whole tokens. What is interrupted in
        # another way may leave half a step in it, and is not kept.
        with contextlib.suppress(_Stopped):
            if read is None:
                read_prompt(self.model, tokens, cache, check)
            else:
                read(cache, check)
            if most > 0:
                torch.seed() if seed is None else torch.manual_seed(seed)
                ids = torch.tensor([tokens], device=self.model.device)
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=cache,
                    generation_config=config,
                    stopping_criteria=[step],
                )
            writing.end()
        if read is None:
            self.prefixes.keep(tokens + writing.written, cache, len(writing.written))
        return cache


class Writing:
    """An answer as it is written: its tokens, when each of them came, and its text.

    Text goes out as soon as its letters are whole and it can no longer be the beginning of a stop string. A
    stop string ends the answer and is no part of it, nor is what follows.

    Args:
        tokenizer: the model's.
        stops: the stop strings.
        send: given the text piece by piece, and what else the reader finds.
        prompt: token ids [s] after whose text that of the answer goes on; empty where it stands alone.
        reader: tells text from reasoning and calls; None takes all of the answer for text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        send: Callable[[Any], object],
        *,
        prompt: Sequence[int] = (),
        reader: Any = None,
    ) -> None:
        self.written: list[int] = []
        self.reused = 0  # tokens of the prompt whose latents were there already
        self.times: list[float] = []  # seconds on a clock: when the prompt was begun, then of every token
        self.stopped = False  # at a stop string, or by whoever is sent the pieces
        self._stops = stops
        self._send = send
        self._reader = reader
        self._decoding = Decoding(tokenizer.decode, prompt)
        self._held = ""  # text that may be the beginning of a stop string

    def put(self, token: int) -> bool:
        """A new token; returns whether the answer ends with it."""
        self.times.append(time.perf_counter())
        self.written.append(token)
        self._decoding.add(token)
        self._show()
        return self.stopped

    def end(self) -> None:
        """The answer is complete."""
        self._show(last=True)
        if self._reader is not None:
            self._take(self._reader.finish())
        self._send_held()

    def _show(self, last: bool = False) -> None:
        # A reader looks for special tokens.
        reads = self._reader is not None and not self._reader.failed
        text = self._decoding.take(skip_special=not reads, last=last)
        if text:
            self._take([text] if self._reader is None else self._reader.feed(text))

    def _take(self, items: Sequence[Any]) -> None:
        for item in items:
            if self.stopped:
                return
            if type(item) is not str:  # tool calls, and reasoning, a subclass of str
                self._send_held()
                self._send(item)
                continue
            self._held += item
            found = cut_at(self._held, self._stops)
            if found is not None:
                self._held, self.stopped = found, True
                self._send_held()
                return
            keep = beginning_of_stop(self._held, self._stops)
            ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            if ready:
                self._send(ready)

    def _send_held(self) -> None:
        if self._held:
            self._send(self._held)
            self._held = ""


class Decoding:
    """The text of a sequence of tokens as it grows; whole letters only.

    Args:
        decode: the tokenizer's, called as ``decode(ids, skip_special_tokens=...)``.
        prompt: token ids [s] after whose text the new tokens' text goes on; empty where it stands alone.
    """

    def __init__(self, decode: Callable[..., str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = _context(decode, prompt)
        self._shown = len(self._tokens)  # tokens whose text has been taken
        self._start = 0  # where decoding starts, so that spaces between tokens come out right

    def add(self, token: int) -> None:
        """A new token at the end."""
        self._tokens.append(token)

    def take(self, *, skip_special: bool, last: bool = False) -> str:
        """Text that the newest tokens add; none while a letter is not whole, unless they are the ``last``."""
        before = self._decode(self._tokens[self._start : self._shown], skip_special_tokens=skip_special)
        now = self._decode(self._tokens[self._start :], skip_special_tokens=skip_special)
        if len(now) <= len(before) or (now.endswith(_NO_LETTER) and not last):
            return ""
        text = now[len(before) :]
        if not now.startswith(before) and _NO_LETTER in now[: len(before)]:
            # Bytes that are no letter have undone the letters before them, as decoders of bytes do that take
            # all of a run or nothing. Those have been taken.
            text = self._decode(self._tokens[self._shown :], skip_special_tokens=skip_special)
        self._start, self._shown = self._shown, len(self._tokens)
        return text


def _context(decode: Callable[..., str], prompt: Sequence[int]) -> list[int]:
    """The end of a prompt, as far as it decodes to whole letters, since what follows may be bytes of its run.

    A decoder of bytes that takes all of a run or nothing loses the run, and the answer's letters with it,
    where the first of these tokens or the last is a part of a letter only.
    """
    for end in range(len(prompt), max(len(prompt) - _CONTEXT, 0), -1):
        for first in range(max(end - _CONTEXT, 0), max(end - _CONTEXT - _LETTER, 0) - 1, -1):
            tokens = list(prompt[first:end])
            if not decode(tokens, skip_special_tokens=True).endswith(_NO_LETTER):
                return tokens
    return []


def cut_at(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None without one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else None


def beginning_of_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of the text with which a stop string begins."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest

"""From the tokens of an answer to its text, and from its text to what is said, thought and called."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

#: What the parsers of tool calls raise.
_UNREADABLE = (ValueError, RuntimeError, KeyError, TypeError, AttributeError)
#: Tokens of a prompt that say how the text goes on after it.
_CONTEXT = 8
#: Tokens further that a letter may reach: none has more than four bytes, and tokens may be single bytes.
_LETTER = 3
#: What decoders write for bytes that are no letter.
_NO_LETTER = "\ufffd"


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


class Reader:
    """What is said, thought and called in an answer, as Transformers' parser of responses tells it.

    What looks like a call but is none, or is cut off, comes out as the text that it is, and so does all that
    follows: nothing of an answer is lost.

    Args:
        parser: fresh, for one answer. initial: what it has found in the prompt.
        special: texts of special tokens, which the parser has to see and people have not.
    """

    def __init__(self, parser: Any, special: Sequence[str]) -> None:
        self._parser = parser
        self._special = special
        self._text = ""
        self._place = 0  # in the text: what stands before it has come out, or was a mark of the parser's
        self._opened: int | None = None  # where the region began of which nothing has come out yet
        self.failed = False
        self.message: dict[str, Any] | None = None  # all of it, once it has been read to its end
        self.initial = _joined(self._items(parser.initial_events))

    def feed(self, text: str) -> list[Any]:
        """Text, reasoning and calls that the text adds, in order."""
        items: list[Any] = []
        for place, letter in enumerate(text):
            if self.failed:
                items.append(text[place:])
                break
            # One after another: else nothing tells where in the text a region began.
            self._text += letter
            try:
                items += self._items(self._parser.feed(letter))
            except _UNREADABLE:
                items += self._fail()
        return _joined(items)

    def finish(self) -> list[Any]:
        """What is left at the end of the answer."""
        if self.failed:
            return []
        try:
            message, events = self._parser.finalize()
            items = self._items(events)
        except _UNREADABLE:  # it ended within a call: there is none, then
            return self._fail()
        self.message = message
        return _joined(items)

    def _items(self, events: Sequence[dict[str, Any]]) -> list[Any]:
        found: list[Any] = []
        for index, event in enumerate(events):
            is_last = index == len(events) - 1
            items = response_events_to_chunks([event])
            for item in items:
                if isinstance(item, ToolCall) and not isinstance(item.name, str):
                    raise ValueError(f"expected the name of a tool, got {item.name!r}")
            if event["type"] == "region_chunk":
                self._place = min(self._place + len(event.get("text") or ""), len(self._text))
                if items:
                    self._opened = None
            elif event["type"] == "region_open":
                self._opened = self._place
                if is_last:  # the mark that opens it is read; without one, its first letters are the reason
                    self._place = len(self._text)
            else:
                self._opened = None
                if is_last:  # else the mark that opens the next one is the reason
                    self._place = len(self._text)
            found += items
        return found

    def _fail(self) -> list[Any]:
        self.failed = True
        rest = self._text[self._place if self._opened is None else self._opened :]
        for text in self._special:
            rest = rest.replace(text, "")
        return [rest] if rest else []


def _joined(items: Sequence[Any]) -> list[Any]:
    """The same with neighbours of one kind in one piece."""
    joined: list[Any] = []
    for item in items:
        if joined and type(item) is type(joined[-1]) and isinstance(item, str):
            kind = ReasoningText if isinstance(item, ReasoningText) else str
            joined[-1] = kind(str(joined[-1]) + str(item))
        else:
            joined.append(item)
    return joined


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

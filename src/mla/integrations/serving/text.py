"""From the text of an answer to what is said, thought and called."""

from collections.abc import Sequence
from typing import Any

from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

#: What the parsers of tool calls raise.
_UNREADABLE = (ValueError, RuntimeError, KeyError, TypeError, AttributeError)


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

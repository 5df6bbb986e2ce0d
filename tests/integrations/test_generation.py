"""The loop that writes answers: letters come out whole, stop strings not at all, room is made when needed."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mla.integrations.generation import Writer, Writing, beginning_of_stop, cut_at
from tests.cli.conftest import make_tokenizer


def pieces(tokenizer, tokens, *, stops=(), prompt=()) -> list[str]:
    """What is sent of an answer of these tokens, until it stops."""
    sent = []
    writing = Writing(tokenizer, stops, sent.append, prompt=prompt)
    for token in tokens:
        if writing.put(token):
            break
    writing.end()
    return sent


def byte_tokens(tokenizer, text: bytes) -> list[int]:
    """The token of every byte; GPT-2's alphabet writes those that do not print as the letters from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    letters = {byte: chr(byte) for byte in prints} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tokenizer.convert_tokens_to_ids([letters[byte] for byte in text])


def test_stop_strings():
    assert cut_at("one two", ["two", "ne"]) == "o"
    assert cut_at("one two", ["three"]) is None
    assert beginning_of_stop("text a", ["ab", "t abc"]) == 3
    assert beginning_of_stop("text", []) == 0


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("größer 日本 🙂 end".encode(), [], list("größer 日本 🙂 end")),
        ("größer 日本 🙂 end".encode(), ["🙂"], list("größer 日本 ")),
        # Held back while it may be the beginning of a stop string, and sent as soon as it is none.
        (b"one two three", ["two t", "zz"], list("one ")),
        (b"one two", ["two t"], [*"one ", "two"]),
        (b"twt two", ["two"], ["tw", "t "]),
        ("schön, schöner".encode(), ["schöner"], ["schön,", " "]),
        (b"ok \xe6\x97", [], [*"ok ", "\ufffd"]),
    ],
)
def test_text_comes_out_whole_however_it_is_cut(text, stops, want):
    """Letters of several tokens, stop strings over several pieces, invalid bytes at the end."""
    tokenizer = make_tokenizer()
    sent = pieces(tokenizer, byte_tokens(tokenizer, text), stops=stops)
    assert "".join(sent) == "".join(want)
    assert sent == want


def falling_back() -> PreTrainedTokenizerFast:
    """Letters that have no token of their own are bytes, as in SentencePiece's models."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁time"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def fallen(text: str | bytes) -> list[int]:
    """The tokens of :func:`falling_back` for a text of bytes."""
    return [1 + byte for byte in (text.encode() if isinstance(text, str) else text)]


A_TIME = [258, 259]


@pytest.mark.parametrize(
    ("prompt", "answer", "want"),
    [
        # Eight tokens of the prompt would begin within a letter, and end with one.
        *((A_TIME + fallen("日本語文" + "é" * n), fallen("で🙂") + A_TIME, "で🙂 a time") for n in range(3)),
        (fallen("日本語文字"), A_TIME, " a time"),
        (fallen("🙂" * 9), fallen("é"), "é"),
        # A prompt that ends within a letter, or in bytes that are none.
        (A_TIME + fallen("日本".encode()[:5]), A_TIME, " a time"),
        (A_TIME + fallen(b"\xff"), fallen("日本") + A_TIME, "日本 a time"),
        (fallen(b"\xff" * 30), fallen("日本") + A_TIME, "日本 a time"),
        # An answer that does.
        (A_TIME, fallen("日本".encode()[:5]), "日\ufffd\ufffd"),
        (A_TIME, fallen("日".encode() + b"\xff") + A_TIME, "日\ufffd a time"),
    ],
)
def test_letters_of_bytes_come_out_whole(prompt, answer, want):
    assert "".join(pieces(falling_back(), answer, prompt=prompt)) == want


@pytest.mark.parametrize(("ends", "stopped"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("last", [5, 7])
def test_a_complete_answer_asks_for_no_more_room(ends, stopped, last):
    asked = []

    def generate(ids, stopping_criteria, **kwargs):
        for length in (2, 257, 258):
            ids = torch.full((1, length), 5)
            ids[0, -1] = last if length == 258 else 5
            assert bool(stopping_criteria[0](ids, None)) == (ends or stopped)

    prefixes = SimpleNamespace(
        new=lambda capacity: SimpleNamespace(get_seq_length=lambda: 0),
        grow=lambda cache, capacity: asked.append(capacity),
    )
    model = SimpleNamespace(generate=generate, device="cpu")
    writer = SimpleNamespace(model=model, prefixes=prefixes, end_tokens={7})
    writing = SimpleNamespace(put=lambda token: ends, end=lambda: None, times=[])
    config, read = SimpleNamespace(max_new_tokens=299), lambda cache, check: None
    options = {"seed": 0, "room": 256, "stopped": lambda: stopped, "read": read}
    Writer.write(writer, [1], config, writing, **options)
    assert asked == ([] if ends or stopped or last == 7 else [300])

"""The page and the model card: self-contained, well-formed, with the numbers of the facts."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from mla.cache import LatentCache
from mla.convert import convert
from mla.convert.evaluation import decode_greedily, layer_errors
from mla.convert.report import card, page

from .tiny import teacher, tokens

FACTS: dict[str, Any] = {
    "format": 2,
    "source": "someone/tiny-llama",
    "dims": {
        "layers": 30,
        "hidden": 576,
        "heads": 9,
        "rank": 144,
        "rope": 48,
        "nope": 64,
        "value": 64,
        "rope_theta": 1003.5,
        "cached_numbers_per_token_and_layer": 192,
        "original_numbers_per_token_and_layer": 384,
    },
    "calibration": {"texts": ["self"], "windows": 48, "window": 256, "seed": 7},
    "dtype": "bfloat16",
    "heal": {
        "minutes": 60,
        "seconds": 3601.2,
        "tokens": 1_234_567,
        "kl_before": 0.2345,
        "kl_after": 0.0678,
        "curve": [[0.0, 0.2345], [1200.0, 0.11], [3600.0, 0.0678]],
    },
    "quality": {
        "windows": 8,
        "window": 1024,
        "tokens": 8184,
        "text": "written by the model itself",
        "teacher_perplexity": 19.418,
        "perplexity": 20.357,
        "kl": 0.0689,
        "top1": 0.873,
        "nll_by_position": [3.9, 3.2, 3.1, 3.0, 3.0, 2.9, 2.95, 2.9],
        "teacher_nll_by_position": [3.85, 3.15, 3.0, 2.95, 2.9, 2.85, 2.85, 2.8],
    },
    "layer_errors": [0.001 * (1 + layer % 7) for layer in range(30)],
    "cache_bytes_per_token": {"original": 23_040, "converted": 11_520},
    "decoding": {"prompts": 4, "tokens": 32, "cache_format": None, "agreement": 0.9921875},
    "base_model": "someone/tiny-llama",
    "license": "apache-2.0",
    "command": "mla convert someone/tiny-llama small --rank 144 --rope 48",
    "seconds": 4000.0,
    "versions": {"mla": "0.1.0", "torch": "2.9", "transformers": "5.19"},
}
_VOID = {"meta", "br", "line", "circle", "rect", "polyline"}


class WellFormed(HTMLParser):
    """Every element that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href", "action", "onload"} & {name for name, _ in attrs}
        assert tag not in {"script", "link", "iframe", "object"}
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(text: str) -> None:
    """A page that is well-formed and loads nothing."""
    parser = WellFormed()
    parser.feed(text)
    parser.close()
    assert not parser.open
    assert not re.search(r"https?://|url\(|@import", text)
    assert "nan" not in re.sub(r"[^ ]*<title>.*?</title>", "", " ".join(re.findall(r'points="[^"]*"', text)))
    assert len(text) < 250_000


def test_the_page_stands_alone_and_has_the_numbers() -> None:
    text = page(FACTS)
    check(text)
    for number in (
        "19.418",
        "20.357",
        "0.0689",
        "87.3%",
        "23,040",
        "11,520",
        "50.0%",
        "1,234,567",
        "8,184",
        "99.2% of 128",
    ):
        assert number in text, number
    assert text.count("<svg") == 3
    assert text.count("<rect") == 30
    assert "that the model wrote itself (seed 7)" in text


def test_what_was_not_measured_is_left_out() -> None:
    bare = {key: FACTS[key] for key in ("source", "dims", "dtype", "versions")}
    text = page(bare)
    check(text)
    assert "<svg" not in text
    assert "the model as a whole was not trained" in text
    assert "not measured" in text
    assert "not measured" in card("out", bare)
    check(page({**FACTS, "heal": None, "layer_errors": []}))


def test_figures_that_are_infinite_or_equal_are_drawn() -> None:
    facts = copy.deepcopy(FACTS)
    facts["quality"]["nll_by_position"] = facts["quality"]["teacher_nll_by_position"] = [1.0]
    facts["layer_errors"] = [0.0]
    facts["heal"]["curve"] = [[0.0, float("inf")], [60.0, 1.0]]
    check(page(facts))


def test_a_name_cannot_become_markup() -> None:
    text = page({**FACTS, "source": "</style><b>x"})
    check(text)
    assert "<b>x" not in text


def test_the_card_says_what_was_done() -> None:
    text = card("small", FACTS)
    head, _, _ = text.removeprefix("---\n").partition("\n---\n")
    assert head.splitlines() == [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "base_model: someone/tiny-llama",
        "license: apache-2.0",
        "tags: [mla, multi-head-latent-attention, converted]",
    ]
    bare = {key: FACTS[key] for key in ("source", "dims", "dtype", "versions")}
    assert "base_model" not in card("out", bare)
    assert "license:" not in card("out", bare)
    for part in (
        "# small",
        "someone/tiny-llama",
        "healed for 60 min",
        "Healing chose its weights on the same windows.",
        "float16",
        "licence",
        "| 20.357 (+4.8%) |",
        "\nmla convert someone/tiny-llama small --rank 144 --rope 48\n",
    ):
        assert part in text, part


@pytest.mark.parametrize("eps", [1e-5, 1e-6])  # the first scales the student's stream
def test_layer_errors_vanish_for_an_exact_conversion(eps: float) -> None:
    original = teacher(num_key_value_heads=1, rms_norm_eps=eps)
    student = convert(original, rank=12, rope=12, calibration=tokens(2, 16))
    errors = layer_errors(student, original, tokens(2, 20, seed=3))
    assert len(errors) == 2
    assert max(errors) < 1e-8
    with torch.no_grad():
        student.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    assert layer_errors(student, original, tokens(2, 20, seed=3)) == pytest.approx([0, 0.25], abs=1e-4)


@pytest.mark.parametrize(("cache_format", "size"), [(None, 4), ("bf16", 2)])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_decoding_on_the_cache(kind: str, cache_format: str | None, size: int) -> None:
    student = convert(teacher(kind), rank=10, rope=6, calibration=tokens(2, 24))
    before = student(tokens(1, 8)).logits
    found = decode_greedily(student, tokens(6, 20), cache_format=cache_format)
    assert (found.prompts, found.tokens) == (4, 10)
    assert found.cache_bytes_per_token == 2 * 16 * size
    assert found.agreement > 0.9
    assert torch.equal(student(tokens(1, 8)).logits, before)  # as stock as it was
    one = decode_greedily(student, tokens(1, 2))
    assert (one.prompts, one.tokens) == (1, 1)


def test_decoding_that_errs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    student = convert(teacher(), rank=10, rope=6, calibration=tokens(2, 24))
    monkeypatch.setattr("mla.convert.evaluation.LatentCache", lambda *_, **__: Forgetful(student.config))
    assert decode_greedily(student, tokens(4, 40)).agreement < 0.9


class Forgetful(LatentCache):
    """A cache that holds nothing but zeros."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *given: Any, **more: Any) -> Any:
        return super().update(key_states * 0, value_states * 0, *given, **more)


def test_layer_errors_are_shares_otherwise() -> None:
    original = teacher()
    student = convert(original, cache=0.4, calibration=tokens(2, 24))
    errors = layer_errors(student, original, tokens(2, 20, seed=3))
    assert all(1e-6 < error < 2 for error in errors)

"""What each step of the conversion gives: all of them, and all but one, on the same text.

    python -m benchmarks.ablation --text FILE --calibration FILE [--budgets 192 ...] [--without ...]

The steps are those of docs/conversion.md, untrained. Windows of 1024 tokens calibrate and measure; texts are
read as by `benchmarks.converters`. Without the expected rotation what loses RoPE is not rotated at all, but
the slots are still chosen as if it were, so that step gives at least what the figure says.
"""

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks import timing
from benchmarks.converters import WINDOW, Remembered, add_text_options, load_teacher, read_texts, spread
from mla.convert import convert, pipeline, tokenize_windows
from mla.convert.checkpoint import cached_numbers
from mla.convert.evaluation import evaluate
from mla.convert.statistics import LayerStatistics, Sample
from mla.convert.text import cut_text

Patches = list[tuple[str, Any]]


def _statistics(change: Callable[[LayerStatistics], dict[str, Any]]) -> Patches:
    """The pipeline's statistics with some of them replaced."""
    collect = pipeline.collect

    def changed(*arguments: Any) -> LayerStatistics:
        found = collect(*arguments)
        return dataclasses.replace(found, **change(found))

    return [("mla.convert.pipeline.collect", changed)]


def _plain(found: LayerStatistics) -> dict[str, Any]:
    """The covariance of plain tokens for every head, of the same size as its own: keys and values stay
    balanced."""

    def as_large(own: torch.Tensor) -> torch.Tensor:
        size = torch.einsum("hmm->h", own) / found.plain_cov.trace()
        return size[:, None, None] * found.plain_cov

    return {"key_cov": as_large(found.key_cov), "value_cov": as_large(found.value_cov)}


def _one_group(found: LayerStatistics) -> dict[str, Any]:
    """Groups that look uncorrelated: the best mixture of their pairs is one of them."""
    return {"pair_moment": found.pair_moment * torch.eye(found.pair_moment.shape[-1])}


def _unturned() -> Patches:
    split_rope = pipeline.split_rope

    def changed(*arguments: Any, **options: Any) -> Any:
        split = split_rope(*arguments, **options)
        return dataclasses.replace(split, rotation=torch.ones_like(split.rotation))

    return [("mla.convert.pipeline.split_rope", changed)]


def _unalternated() -> Patches:
    factorise = pipeline.factorise
    return [("mla.convert.pipeline.factorise", lambda terms, rank: factorise(terms, rank, rounds=0))]


def _teachers_stream() -> Patches:
    """The student's block is fitted on what the teacher's block has just read, window by window."""
    refit = pipeline.refit
    windows: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []

    def reading(block: Callable[..., torch.Tensor], read: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        def keeping(weights: Any, x: torch.Tensor) -> torch.Tensor:
            read.append(x)
            return block(weights, x)

        return keeping

    def changed(factors: Any, own: Sample, output: Sample, **options: Any) -> Any:
        theirs = Sample(torch.stack(windows), starts.pop())
        windows.clear()
        return refit(factors, theirs, output, **options)

    return [
        ("mla.convert.pipeline.teacher_block", reading(pipeline.teacher_block, windows)),
        ("mla.convert.pipeline.teacher_starts", reading(pipeline.teacher_starts, starts)),
        ("mla.convert.pipeline.refit", changed),
    ]


# By what is left out.
STEPS: dict[str, Callable[[], Patches]] = {
    "nothing": list,
    "attention's covariances": lambda: _statistics(_plain),
    "mixed slots": lambda: _statistics(_one_group),
    "expected rotation": _unturned,
    "alternation": _unalternated,
    "the student's stream": _teachers_stream,
    "first tokens": lambda: [(f"mla.convert.{name}._START_SHARE", 0.0) for name in ("pipeline", "refit")],
    "refit": lambda: [("mla.convert.pipeline.refit", lambda factors, *_, **__: factors)],
}


class Measured:
    """The pipeline's statistics, of each layer's inputs once: the teacher's stream is the same for every row.

    They stay in memory: of SmolLM2 0.8 GB.
    """

    def __init__(self) -> None:
        self.collect = pipeline.collect
        self.found: dict[bytes, LayerStatistics] = {}

    def __call__(self, weights: Any, inputs: Sample) -> LayerStatistics:
        key = hashlib.blake2b(inputs.windows.numpy().tobytes()).digest()
        if key not in self.found:
            self.found[key] = self.collect(weights, inputs)
        return self.found[key]


@contextmanager
def left_out(step: str) -> Iterator[None]:
    """The converter without one of :data:`STEPS` while inside."""
    with ExitStack() as stack:
        for target, change in STEPS[step]():
            stack.enter_context(patch(target, change))
        yield


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_text_options(parser)
    parser.add_argument("--budgets", type=int, nargs="+", default=[192], help="r + p per token and layer")
    parser.add_argument("--without", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} tokens, to evaluate on")
    parser.add_argument("--samples", type=int, default=8, help=f"of {WINDOW} tokens, to calibrate on")
    timing.add_common_options(parser)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    teacher, tokenizer = load_teacher(options)
    text, to_fit = read_texts(options)
    calibration = tokenize_windows(to_fit, tokenizer, options.samples, WINDOW, seed=options.seed)
    windows = spread(cut_text(text, tokenizer, WINDOW), options.windows)
    reference = Remembered(teacher)
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    measured = Measured()
    for budget in options.budgets:
        for without in options.without:
            with patch("mla.convert.pipeline.collect", measured), left_out(without):
                share = budget / cached_numbers(teacher.config)
                student = convert(teacher, calibration=calibration, cache=share)
            found = evaluate(student, windows, against=reference)
            rows.append({"budget": budget, "without": without, **dataclasses.asdict(found)})
            console.print(f"{budget} without {without}: KL {found.kl:.4f}, perplexity {found.perplexity:.2f}")
    if options.json:
        facts = {"calibration": list(calibration.shape), "seed": options.seed}
        print(json.dumps({"machine": timing.machine(), **facts, "rows": rows}))
        return
    timing.print_table(
        f"Conversions without one step, {rows[0]['tokens']} predictions in windows of {WINDOW} tokens",
        ["r + p", "without", "KL", "perplexity", "top-1"],
        (
            (
                str(row["budget"]),
                row["without"],
                f"{row['kl']:.4f}",
                f"{row['perplexity']:.2f}",
                f"{row['agreement']:.3f}",
            )
            for row in rows
        ),
        left=2,
    )
    print(timing.describe(timing.machine()))


if __name__ == "__main__":
    main()

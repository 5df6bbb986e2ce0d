"""Rank as a decision: several budgets converted and measured on the same text, the smallest that will do.

Every measured budget is kept as JSON in the state folder, under its rank and rotary width: an exploration
that was killed goes on, and a search after an exploration starts from what that one has seen.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mla.convert.check import check_convertible
from mla.convert.checkpoint import cached_numbers, head_dim
from mla.convert.evaluation import evaluate
from mla.convert.parts import load_json, mark
from mla.convert.pipeline import budget_for, convert
from mla.convert.promise import Promise
from mla.convert.spectra import Spectrum, layer_spectra
from mla.errors import MLAError
from mla.formats import cache_format
from mla.whole import whole

Progress = Callable[[str, float, float], None]

#: Shares of the original cache that :func:`explore` looks at.
BUDGETS = (1 / 2, 3 / 8, 5 / 16, 3 / 16, 1 / 8)
#: Rotary widths beside the rule's own, as shares of it.
SPLITS = (2 / 3, 4 / 3)
#: :func:`smallest` looks at so many sizes up to the original cache, evenly spaced; BUDGETS are among them.
STEPS = 48
#: Caches are counted in bytes of this format, the usual one, whatever the models here compute in.
FORMAT = "bf16"

_CONVERTING = 0.9  # share of a point's time; the rest is measuring


@dataclass(frozen=True)
class Point:
    """One conversion and what it keeps of the original, on the held-out windows.

    Attributes:
        rank, rope: r and p. ``numbers``: r + p, cached per token and layer.
        cache: ``numbers`` as a share of the original's.
        bytes_per_token: of all layers, in bf16.
        kl: mean KL(original ‖ converted), nats per token.
        perplexity: of the converted model. ``top1``: share of tokens with the same most likely next one.
        seconds: that converting and measuring took.
    """

    rank: int
    rope: int
    numbers: int
    cache: float
    bytes_per_token: int
    kl: float
    perplexity: float
    top1: float
    seconds: float


@dataclass(frozen=True)
class Exploration:
    """What :func:`explore` found.

    Attributes:
        points: every conversion, largest cache first.
        frontier: those that no other one beats with as small a cache, largest cache first.
        knee: the point of the frontier that lies furthest below the straight line between its ends, KL
            against bytes, both scaled to 0..1: to its left every byte saved costs more than on average, to
            its right less. None where no point lies below the line.
        teacher_perplexity: of the original on the same windows.
        original_bytes_per_token: its cache in bf16, all layers. ``original_numbers``: per token and layer.
        calibration, held_out: windows and tokens per window of the texts.
        spectra: per layer, with the rotary width of the knee (or of the first point).
    """

    points: tuple[Point, ...]
    frontier: tuple[Point, ...]
    knee: Point | None
    teacher_perplexity: float
    original_bytes_per_token: int
    original_numbers: int
    calibration: tuple[int, int]
    held_out: tuple[int, int]
    spectra: tuple[Spectrum, ...]


@dataclass(frozen=True)
class Smallest:
    """What :func:`smallest` chose, and everything it chose from, largest cache first."""

    point: Point
    tried: tuple[Point, ...]
    teacher_perplexity: float


def explore(
    teacher: PreTrainedModel,
    calibration: Tensor,
    held_out: Tensor,
    *,
    budgets: Sequence[float] | None = None,
    state: Path | None = None,
    on_progress: Progress | None = None,
) -> Exploration:
    """Convert at several budgets and splits of r and p on one calibration, measure all on the same windows.

    At every budget the rotary width is the rule's own, then two thirds and four thirds of it.

    Args:
        teacher: fp32 model that :func:`mla.convert.check_convertible` accepts.
        calibration: int64 token ids [w, t].
        held_out: int64 token ids [w, t] that only measure.
        budgets: shares of the original cache; None takes BUDGETS.
        state: folder for what is finished, created where missing; the same call continues.
        on_progress: called as (stage, points done, points in all), with fractions.

    Returns:
        The points, the frontier and its knee, the spectra.

    Raises:
        MLAError: a model or budget that cannot be converted, or a ``state`` of another run.
    """
    config = teacher.config
    check_convertible(config)
    shares = sorted(set(BUDGETS if budgets is None else budgets), reverse=True)
    if not shares:
        raise MLAError("an exploration needs at least one budget")
    by_rule = [budget_for(config, cache=share, rank=None, rope=None) for share in shares]
    asked = [(each.rank, each.rope) for each in by_rule]
    # The rule's points first: whoever interrupts has the whole curve early.
    asked += [split for each in by_rule for split in _splits(each.rank, each.rope, head_dim(config))]
    asked = list(dict.fromkeys(asked))
    lab = _Lab(teacher, calibration, held_out, state, on_progress, expected=len(asked) + 1)
    points = _by_size([lab.measure(rank, rope) for rank, rope in asked])
    best = frontier(points)
    knee = find_knee(best)
    return Exploration(
        points=points,
        frontier=best,
        knee=knee,
        teacher_perplexity=lab.teacher_perplexity,
        original_bytes_per_token=lab.bytes_per_token(lab.full, 0),
        original_numbers=lab.full,
        calibration=(calibration.shape[0], calibration.shape[1]),
        held_out=(held_out.shape[0], held_out.shape[1]),
        spectra=lab.spectra(knee or points[0]),
    )


def smallest(
    teacher: PreTrainedModel,
    calibration: Tensor,
    held_out: Tensor,
    promise: Promise,
    *,
    state: Path | None = None,
    on_progress: Progress | None = None,
) -> Smallest:
    """The smallest cache that keeps a promise on the held-out windows.

    Bisection over multiples of 1/STEPS of the original cache, with the rule's split of r and p: at most six
    conversions, fewer where ``state`` knows budgets already. It takes for granted that a larger cache is no
    worse. Other splits that ``state`` knows from an exploration may be chosen, too.

    Args:
        teacher: fp32 model that :func:`mla.convert.check_convertible` accepts.
        calibration: int64 token ids [w, t].
        held_out: int64 token ids [w, t] that only measure.
        promise: what the cache must keep.
        state: as for :func:`explore`, and the same folder may serve both.
        on_progress: as for :func:`explore`.

    Returns:
        The point to convert with, and all that were measured.

    Raises:
        MLAError: no budget keeps the promise; the message has the best one seen.
    """
    config = teacher.config
    check_convertible(config)
    lab = _Lab(teacher, calibration, held_out, state, on_progress, expected=1)
    splits = lab.grid()
    seen = {(point.rank, point.rope): point for point in lab.stored()}

    def keeps(point: Point) -> bool:
        return promise.kept(kl=point.kl, perplexity=point.perplexity, original=lab.teacher_perplexity)

    # Everything below ``low`` breaks the promise, ``high`` and above keeps it.
    low, high = 0, len(splits)
    for index, split in enumerate(splits):  # what is known narrows the range for nothing
        if low <= index < high and split in seen:
            low, high = (low, index) if keeps(seen[split]) else (index + 1, high)
    while low < high:
        lab.expected = lab.finished + (high - low).bit_length()
        middle = (low + high) // 2
        point = seen[splits[middle]] = lab.measure(*splits[middle])
        low, high = (low, middle) if keeps(point) else (middle + 1, high)
    tried = _by_size(seen.values())
    kept = [point for point in tried if keeps(point)]
    if not kept:
        best = min(tried, key=lambda point: point.kl)
        raise MLAError(
            f"no cache below the original's {lab.full} numbers per token and layer keeps "
            f"{promise} on the held-out text; the best seen: {best.numbers} "
            f"numbers (rank {best.rank}, rope {best.rope}) with KL {best.kl:.4f} and perplexity "
            f"{best.perplexity:.3f} ({best.perplexity / lab.teacher_perplexity - 1:+.1%}). Allow more, "
            "calibrate on more text, or choose a cache and heal it"
        )
    chosen = min(kept, key=lambda point: (point.numbers, point.kl))
    return Smallest(point=chosen, tried=tried, teacher_perplexity=lab.teacher_perplexity)


def frontier(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points that no other one with as small a cache beats in KL, largest cache first."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.numbers, each.kl)):
        if not found or point.kl < found[-1].kl:
            found.append(point)
    return tuple(reversed(found))


def find_knee(best: Sequence[Point]) -> Point | None:
    """The knee of a frontier, see :class:`Exploration`."""
    if len(best) < 3:
        return None
    large, small = best[0], best[-1]

    def below(point: Point) -> float:
        saved = (point.bytes_per_token - small.bytes_per_token) / (
            large.bytes_per_token - small.bytes_per_token
        )
        lost = (point.kl - large.kl) / (small.kl - large.kl)
        return 1 - saved - lost

    found = max(best, key=below)
    return found if below(found) > 1e-9 else None


class _Lab:
    """One teacher, one calibration, one held-out text; measures a budget once."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        calibration: Tensor,
        held_out: Tensor,
        state: Path | None,
        on_progress: Progress | None,
        *,
        expected: int,
    ) -> None:
        self.teacher, self.calibration, self.held_out = teacher, calibration, held_out
        self.state, self.on_progress = state, on_progress
        self.expected, self.finished = expected, 0
        config = teacher.config
        self.full = cached_numbers(config)
        self._enter_state()
        stored = self._load("original")
        if stored is None:
            stored = {"perplexity": evaluate(teacher, held_out).perplexity}
            self._store("original", stored)
        self.teacher_perplexity: float = stored["perplexity"]

    def bytes_per_token(self, rank: int, rope: int) -> int:
        return int(cache_format(FORMAT).row_bytes(rank, rope) * self.teacher.config.num_hidden_layers)

    def grid(self) -> list[tuple[int, int]]:
        """The rule's (r, p) for every multiple of 1/STEPS below the original cache, smallest first."""
        found = []
        for step in range(1, STEPS):
            if round(step / STEPS * self.full) >= 4:  # two for the rotary key, and a latent
                budget = budget_for(self.teacher.config, cache=step / STEPS, rank=None, rope=None)
                found.append((budget.rank, budget.rope))
        return sorted(set(found), key=sum)

    def stored(self) -> list[Point]:
        """What earlier calls with this state have measured."""
        paths = [] if self.state is None else sorted(self.state.glob("r*-p*.json"))
        return [Point(**load_json(path)) for path in paths]

    def measure(self, rank: int, rope: int) -> Point:
        name = _name(rank, rope)
        stored = self._load(name)
        if stored is None:
            stored = asdict(self._convert(name, rank, rope))
            self._store(name, stored)
        if self.state is not None:  # the layers of a budget are of use until its point is there
            shutil.rmtree(self.state / name, ignore_errors=True)
        self.finished += 1
        self._tell(name, 0.0)
        return Point(**stored)

    def spectra(self, point: Point) -> tuple[Spectrum, ...]:
        name = f"spectra-p{point.rope}"
        stored = self._load(name)
        if stored is None:
            budget = budget_for(self.teacher.config, cache=None, rank=point.rank, rope=point.rope)
            found = layer_spectra(
                self.teacher,
                self.calibration,
                rope=budget.rope,
                theta=budget.theta,
                on_progress=lambda stage, done, total: self._tell(stage, done / total),
            )
            stored = {"layers": [asdict(each) for each in found]}
            self._store(name, stored)
        self.finished += 1
        return tuple(
            Spectrum(
                each["directions_90"], each["directions_99"], tuple(each["ranks"]), tuple(each["left_out"])
            )
            for each in stored["layers"]
        )

    def _convert(self, name: str, rank: int, rope: int) -> Point:
        started = time.monotonic()
        student = convert(
            self.teacher,
            calibration=self.calibration,
            rank=rank,
            rope=rope,
            state=None if self.state is None else self.state / name,
            on_progress=lambda _, done, total: self._tell(f"{name}: converting", _CONVERTING * done / total),
        )
        result = evaluate(
            student,
            self.held_out,
            against=self.teacher,
            on_progress=lambda done, total: self._tell(
                f"{name}: measuring", _CONVERTING + (1 - _CONVERTING) * done / total
            ),
        )
        assert result.kl is not None
        assert result.agreement is not None
        rank, rope = student.config.kv_lora_rank, student.config.qk_rope_head_dim
        return Point(
            rank=rank,
            rope=rope,
            numbers=rank + rope,
            cache=(rank + rope) / self.full,
            bytes_per_token=self.bytes_per_token(rank, rope),
            kl=result.kl,
            perplexity=result.perplexity,
            top1=result.agreement,
            seconds=round(time.monotonic() - started, 1),
        )

    def _tell(self, stage: str, part: float) -> None:
        if self.on_progress is not None:
            done = self.finished + part
            self.on_progress(stage, done, max(self.expected, done))

    def _enter_state(self) -> None:
        if self.state is None:
            return
        own = {"run": mark([self.calibration, self.held_out], [self.teacher])}
        stored = self._load("run")
        if stored is None:
            self._store("run", own)
        elif stored != own:
            raise MLAError(
                f"{self.state} holds the state of another exploration (another model, calibration or "
                "held-out text): choose another folder, or remove it"
            )

    def _load(self, name: str) -> dict[str, Any] | None:
        if self.state is None or not (self.state / f"{name}.json").exists():
            return None
        return load_json(self.state / f"{name}.json")

    def _store(self, name: str, value: dict[str, Any]) -> None:
        if self.state is not None:
            with whole(self.state / f"{name}.json") as partial:
                partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _splits(rank: int, rope: int, width: int) -> list[tuple[int, int]]:
    """Other even rotary widths with the same r + p; beyond the head width only the ladder gets denser."""
    others = [max(2, round(rope * share / 2) * 2) for share in SPLITS]
    most = min(max(rope, width), rank + rope - 1)
    return [(rank + rope - each, each) for each in others if each <= most and each != rope]


def _name(rank: int, rope: int) -> str:
    return f"r{rank}-p{rope}"


def _by_size(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: (-point.numbers, -point.rope)))

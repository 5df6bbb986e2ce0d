"""What the two pages of a conversion are made of: a self-contained frame, tables, charts as inline SVG.

Nothing is loaded from anywhere and nothing runs: a page is text, style and drawings. Everything that comes
from outside (model names, paths) is escaped here, so callers pass plain text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mla.looks import style_of

_STYLE = Path(__file__).parent / "page.css"
_WIDTH, _HEIGHT = 400, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 24, 46
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend.
        colour: class of the style sheet: "mha" for the original, "mla" for the result, "gqa", "mqa".
        points: (x, y), joined in this order; none where y is not finite.
        style: "curve" (line and dots), "thin" (line), "dots".
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    style: str = "curve"


@dataclass(frozen=True)
class Chart:
    """A drawing with two axes.

    Attributes:
        label: what it shows, for those who do not see it.
        x_label, y_label: of the axes, with units.
        series: what is drawn; equal names share one entry of the legend.
        floor: smallest y that must be in sight, such as 0; None fits the data.
        log: logarithmic y; points at or below 0 are left out.
        across, down: values at which a dashed line is drawn across (of y), down (of x).
        ring: a point to mark, or None.
        whole: x counts things, such as layers: ticks at integers.
    """

    label: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    floor: float | None = None
    log: bool = False
    across: Sequence[float] = field(default=())
    down: Sequence[float] = field(default=())
    ring: tuple[float, float] | None = None
    whole: bool = False


def frame(title: str, body: str) -> str:
    """The whole HTML page; ``title`` is plain text, ``body`` HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style_of(_STYLE)}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Plain text as HTML."""
    return html.escape(str(value))


def cards(items: Iterable[tuple[str, str]]) -> str:
    """Large figures side by side: (figure, what it is)."""
    inner = "".join(
        f'<div class="card"><b>{text(big)}</b><span class="soft">{text(small)}</span></div>'
        for big, small in items
    )
    return f'<div class="cards">{inner}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, chosen: int | None = None) -> str:
    """A table that scrolls by itself; row number ``chosen`` is marked."""
    lines = ["".join(f"<th>{text(cell)}</th>" for cell in head)] if head else []
    marked = None if chosen is None else chosen + len(lines)
    lines += ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
    body = "".join(
        f'<tr class="chosen">{line}</tr>' if index == marked else f"<tr>{line}</tr>"
        for index, line in enumerate(lines)
    )
    kind = ' class="numbers"' if head else ""
    return f'<div class="scroll"><table{kind}>{body}</table></div>'


def figure(title: str, inner: str, caption: str = "", *, across: bool = False) -> str:
    """A card with a heading; ``inner`` is HTML, title and caption are plain text."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    kind = ' class="across"' if across else ""
    return f"<figure{kind}><h2>{text(title)}</h2>{inner}{below}</figure>"


def legend(series: Iterable[Series]) -> str:
    """Names and colours."""
    names = dict.fromkeys((each.name, each.colour) for each in series)
    inner = "".join(f'<span><i class="{colour}"></i>{text(name)}</span>' for name, colour in names)
    return f'<div class="legend">{inner}</div>'


def lines(chart: Chart) -> str:
    """The chart as SVG, with its legend where there is more than one name."""
    shown = [
        Series(each.name, each.colour, [p for p in each.points if _visible(p, chart.log)], each.style)
        for each in chart.series
    ]
    xs = [x for each in shown for x, _ in each.points] + list(chart.down)
    ys = [y for each in shown for _, y in each.points] + list(chart.across)
    if not xs or not ys:
        return "<p>No figures.</p>"
    axes = _Axes(chart, xs, ys)
    parts = [axes.drawn()]
    parts += [
        f'<line class="here" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{axes.y(y)}" y2="{axes.y(y)}"/>'
        for y in chart.across
    ]
    parts += [
        f'<line class="here" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" x1="{axes.x(x)}" x2="{axes.x(x)}"/>'
        for x in chart.down
    ]
    for each in shown:
        path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in each.points)
        if each.style != "dots":
            parts.append(f'<polyline class="{each.style} {each.colour}" style="fill:none" points="{path}"/>')
        if each.style != "thin":
            parts += [
                f'<circle class="{each.colour}" r="3" cx="{axes.x(x)}" cy="{axes.y(y)}">'
                f"<title>{text(each.name)}: {number(x)}, {number(y)}</title></circle>"
                for x, y in each.points
            ]
    if chart.ring is not None:
        x, y = chart.ring
        parts.append(f'<circle class="ring mla" style="fill:none" r="8" cx="{axes.x(x)}" cy="{axes.y(y)}"/>')
    several = len({each.name for each in shown}) > 1
    return (legend(shown) if several else "") + _svg(chart.label, parts)


def bars(label: str, x_label: str, y_label: str, values: Sequence[float]) -> str:
    """One bar per value from 0 up, numbered from 0."""
    if not values:
        return "<p>No figures.</p>"
    points = [(float(index), value) for index, value in enumerate(values)]
    chart = Chart(label, x_label, y_label, [Series(label, "mla", points)], floor=0.0, whole=True)
    axes = _Axes(chart, [-0.5, len(values) - 0.5], [value for _, value in points if math.isfinite(value)])
    parts = [axes.drawn()]
    for x, y in points:
        if math.isfinite(y):
            left, right, top = axes.x(x - 0.4), axes.x(x + 0.4), axes.y(y)
            parts.append(
                f'<rect class="mla" style="stroke:none" x="{left}" y="{top}" width="{_trim(right - left)}" '
                f'height="{_trim(_HEIGHT - _BOTTOM - top)}"><title>{number(x)}: {number(y)}</title></rect>'
            )
    return _svg(label, parts)


def number(value: float) -> str:
    """As people read it: whole numbers with separators, others with four or five digits that matter."""
    if not math.isfinite(value):
        return "infinite" if value > 0 else "none"
    if value == round(value) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


class _Axes:
    """Where a value lies on the drawing, and the grid with its numbers."""

    def __init__(self, chart: Chart, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.chart = chart
        self._scale: Callable[[float], float] = math.log10 if chart.log else float
        self.low_x, self.high_x = _room(min(xs), max(xs))
        low, high = min(ys, default=0.0), max(ys, default=1.0)
        if chart.floor is not None:
            low = min(low, chart.floor)
        low, high = _room(self._scale(low), self._scale(high))
        margin = 0.05 * (high - low)
        at_floor = chart.floor is not None and not chart.log and low == chart.floor
        self.low_y, self.high_y = (low if at_floor else low - margin), high + margin

    def x(self, value: float) -> float:
        share = (value - self.low_x) / (self.high_x - self.low_x)
        return _trim(_LEFT + share * (_WIDTH - _LEFT - _RIGHT))

    def y(self, value: float) -> float:
        share = (self._scale(value) - self.low_y) / (self.high_y - self.low_y)
        return _trim(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP))

    def drawn(self) -> str:
        across, down = [], []
        for value in _ticks(self.low_x, self.high_x, whole=self.chart.whole):
            at = self.x(value)
            down.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
            down.append(
                f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(value)}</text>'
            )
        values = (
            _decades(self.low_y, self.high_y)
            if self.chart.log
            else _ticks(self.low_y, self.high_y, whole=False)
        )
        for value in values:
            at = self.y(value)
            across.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
            across.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{number(value)}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) // 2
        names = (
            f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{text(self.chart.x_label)}</text>'
            f'<text x="4" y="12">{text(self.chart.y_label)}</text>'
        )
        return "".join(down + across) + names


def _svg(label: str, parts: Iterable[str]) -> str:
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return f'<svg viewBox="{box}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'


def _visible(point: tuple[float, float], log: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log)


def _room(low: float, high: float) -> tuple[float, float]:
    """A range of some length, also for a single value."""
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    if whole:
        step = max(1.0, round(step))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between 10^low and 10^high, at most about eight; with 2 and 5 times those if few."""
    first, last = math.ceil(low), math.floor(high)
    if last - first < 2:
        steps = [10.0**power * factor for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
        return [value for value in steps if low <= math.log10(value) <= high]
    step = max(1, -(-(last - first) // 8))
    return [10.0**index for index in range(first, last + 1, step)]


def _trim(value: float) -> float:
    return round(value, 1)

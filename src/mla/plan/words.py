"""Numbers as people read them. page.js has the same functions for the page."""

from __future__ import annotations

import math

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def _three(value: float) -> str:
    """Three digits that matter, or the whole integer part: 0.0123, 1.23, 12.3, 123, 1234."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def byte_words(value: float) -> str:
    """Bytes in binary units: 9210691584 is "8.58 GiB"."""
    if not math.isfinite(value):
        return "never"
    power = 0
    while abs(value) >= 1024 and power < len(_BINARY) - 1:
        value, power = value / 1024, power + 1
    return f"{_three(value) if power else f'{value:.0f}'} {_BINARY[power]}"


def count_words(value: float, unit: str = "") -> str:
    """A count in decimal units: 671e9 parameters are "671 G"; small integers stay whole."""
    if not math.isfinite(value):
        return "never"
    if abs(value) < 10_000 and value == round(value):
        return f"{value:.0f} {unit}".rstrip()
    power = 0
    while abs(value) >= 1000 and power < len(_DECIMAL) - 1:
        value, power = value / 1000, power + 1
    return f"{_three(value)} {_DECIMAL[power]}{unit}".rstrip()


def time_words(seconds: float) -> str:
    """Seconds in the unit that leaves a number of 1 or more."""
    if not math.isfinite(seconds):
        return "never"
    for size, unit in _SECONDS:
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds * 1e9)} ns"


def whole_words(value: float) -> str:
    """An integer with separators, rounded up: the first context at which something holds; "never" for inf."""
    return "never" if not math.isfinite(value) else f"{math.ceil(value):,}"


def plain_words(value: float) -> str:
    """A number as it enters a formula: integers whole with separators, others with six digits."""
    if not math.isfinite(value):
        return "never"
    if value == round(value) and abs(value) < 1e18:
        return f"{value:,.0f}"
    return f"{value:.6g}"


def words(value: float, unit: str) -> str:
    """A figure with its unit in words."""
    if unit == "B":
        return byte_words(value)
    if unit == "s":
        return time_words(value)
    if unit in ("op", "op/s", "op/B", "1/s", "parameters"):
        return count_words(value, unit if unit != "1/s" else "/s")
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{plain_words(value)} {unit}"

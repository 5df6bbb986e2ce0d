"""Which dtype training multiplies in."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from mla.convert import arithmetic
from mla.convert.arithmetic import faster_dtype, mixed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("half", "wanted"),
    [(0.5, torch.bfloat16), (0.79, torch.bfloat16), (0.81, torch.float32), (9.0, torch.float32)],
)
def test_the_faster_one_is_taken(half: float, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: half}
    monkeypatch.setattr(arithmetic, "_seconds", lambda x, weight: times[weight.dtype])
    assert faster_dtype(CPU) == wanted


@pytest.mark.parametrize(
    ("half", "wanted"), [((9.0, 3.0, 0.5, 2.0), torch.bfloat16), ((9.0, 0.9, 3.0, 0.9), torch.float32)]
)
def test_the_fastest_product_of_either_counts(
    half: tuple[float, ...], wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first, which warms up, nor one that another process held up."""
    took = [9.0, 1.0, 4.0, 1.0, *half]
    clock = itertools.accumulate(x for seconds in took for x in (0.0, seconds))
    monkeypatch.setattr(arithmetic, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert faster_dtype(CPU) == wanted
    assert next(clock, None) is None, "other products were timed than these"


def test_only_products_are_rounded() -> None:
    x = torch.randn(4, 8)
    with mixed(torch.bfloat16, CPU):
        assert (x @ x.T).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
    with mixed(torch.float32, CPU):
        assert (x @ x.T).dtype == torch.float32

"""Which dtype training multiplies in."""

from __future__ import annotations

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


def test_it_is_measured_here() -> None:
    assert faster_dtype(CPU) in (torch.float32, torch.bfloat16)


def test_only_products_are_rounded() -> None:
    x = torch.randn(4, 8)
    with mixed(torch.bfloat16, CPU):
        assert (x @ x.T).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
    with mixed(torch.float32, CPU):
        assert (x @ x.T).dtype == torch.float32

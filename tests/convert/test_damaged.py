"""A kept part that a crash has damaged is named, with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mla.convert import Request, convert, run
from mla.convert.explore import explore, smallest
from mla.convert.healing import heal
from mla.convert.parts import load
from mla.convert.promise import Promise
from mla.errors import MLAError

from .tiny import Letters, teacher, tokens

MODEL, WINDOWS = teacher(num_hidden_layers=1), tokens(2, 16)


@pytest.fixture(params=["", '{"mark', "PK\x03\x04", "\0" * 500], ids=["empty", "cut", "archive", "zeros"])
def content(request: pytest.FixtureRequest) -> str:
    """Of a file that lost all of it, or its end, or whose content never came to the disk."""
    return str(request.param)


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("explored")
    explore(MODEL, WINDOWS, WINDOWS, budgets=[0.5], state=state)
    return state


def test_tensors(content: str, tmp_path: Path) -> None:
    (tmp_path / "layer.safetensors").write_text(content)
    with pytest.raises(MLAError, match=r"layer\.safetensors is damaged .*: delete it"):
        load(tmp_path / "layer.safetensors")


def test_the_state_of_a_healing(content: str, tmp_path: Path) -> None:
    state = tmp_path / "healing.pt"
    state.write_text(content)
    student = convert(MODEL, cache=0.5, calibration=WINDOWS)
    with pytest.raises(MLAError, match=r"healing\.pt is damaged \(\w+Error.*\): delete it") as told:
        heal(student, MODEL, WINDOWS, WINDOWS, minutes=0.01, state=state)
    assert "\n" not in str(told.value)


def test_what_was_asked_for(content: str, tmp_path: Path) -> None:
    place = tmp_path / ".out.converting"
    place.mkdir()
    (place / "request.json").write_text(content)
    (place / "layer-000.safetensors").write_text("of use, perhaps")
    request = Request(cache=0.5, windows=2, window=16)
    with pytest.raises(MLAError, match=r"request\.json is damaged .*: delete it"):
        run("tiny", MODEL, Letters(), tmp_path / "out", request)
    assert len(list(place.iterdir())) == 2


@pytest.mark.parametrize("name", ["run", "r16-p8"])
def test_what_a_search_has_measured(name: str, content: str, explored: Path, tmp_path: Path) -> None:
    state = shutil.copytree(explored, tmp_path / "points")
    assert (state / f"{name}.json").exists()
    (state / f"{name}.json").write_text(content)
    with pytest.raises(MLAError, match=rf"{name}\.json is damaged .*: delete it"):
        smallest(MODEL, WINDOWS, WINDOWS, Promise(max_kl=100.0), state=state)

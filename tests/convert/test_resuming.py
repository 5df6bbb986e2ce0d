"""A conversion that goes on where it was killed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mla.convert import convert
from mla.convert.pipeline import teacher_block
from mla.whole import UnwrittenError
from tests.convert.tiny import teacher, tokens

PIPELINE = importlib.import_module("mla.convert.pipeline")


class _Killed(BaseException):
    pass


@pytest.fixture
def _every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIPELINE, "_STREAMS_EVERY", 2)


@pytest.mark.usefixtures("_every_second")
@pytest.mark.parametrize(("killed", "read_again"), [(1, 5), (3, 3), (4, 1)])
def test_it_reads_the_text_from_the_stored_streams_on(
    killed: int, read_again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after so many of five layers: the same digits, and no layer before the streams read again."""
    model = teacher("qwen2", num_hidden_layers=5)  # its biases leave a constant in every layer
    calibration = tokens(3, 24)

    def kill(_stage: str, done: float, _total: float) -> None:
        if done == killed:
            raise _Killed

    wanted = convert(model, calibration=calibration, cache=0.5)
    with pytest.raises(_Killed):
        convert(model, calibration=calibration, cache=0.5, state=tmp_path, on_progress=kill)
    names = {f"layer-{layer:03d}.safetensors" for layer in range(killed)}
    names |= {"layer-inputs.safetensors"} if killed >= 2 else set()
    assert {path.name for path in tmp_path.iterdir()} == names
    blocks: list[int] = []
    monkeypatch.setattr(PIPELINE, "teacher_block", lambda *given: blocks.append(1) or teacher_block(*given))
    found = convert(model, calibration=calibration, cache=0.5, state=tmp_path)
    assert len(blocks) == read_again * len(calibration)
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    # With every layer there, the streams are of no more use.
    assert {path.name for path in tmp_path.iterdir()} == {f"layer-{n:03d}.safetensors" for n in range(5)}


@pytest.mark.usefixtures("_every_second")
def test_streams_without_all_earlier_layers_are_not_taken(tmp_path: Path) -> None:
    model, calibration = teacher(num_hidden_layers=3), tokens(3, 24)

    def kill(_stage: str, done: float, _total: float) -> None:
        if done == 2:
            raise _Killed

    with pytest.raises(_Killed):
        convert(model, calibration=calibration, cache=0.5, state=tmp_path, on_progress=kill)
    (tmp_path / "layer-000.safetensors").unlink()
    found = convert(model, calibration=calibration, cache=0.5, state=tmp_path)
    wanted = convert(model, calibration=calibration, cache=0.5)
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.usefixtures("_every_second")
def test_a_full_disk_leaves_the_earlier_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calibration = teacher(num_hidden_layers=5), tokens(3, 24)
    stored: list[int] = []

    def fills(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "hidden" in tensors:
            stored.append(int(tensors["layers"]))
            if len(stored) == 2:
                Path(path).write_bytes(b"half")
                raise SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    with monkeypatch.context() as full_disk:
        full_disk.setattr("mla.convert.parts.save_file", fills)
        with pytest.raises(UnwrittenError, match=r"layer-inputs\.safetensors cannot be written: .*No space"):
            convert(model, calibration=calibration, cache=0.5, state=tmp_path)
    assert stored == [2, 4]
    assert len(list(tmp_path.iterdir())) == 4 + 1
    begun: list[Any] = []
    real = PIPELINE._streams
    monkeypatch.setattr(PIPELINE, "_streams", lambda *given: begun.append(real(*given)) or begun[-1])
    found = convert(model, calibration=calibration, cache=0.5, state=tmp_path)
    assert begun[0][0] == 2
    wanted = convert(model, calibration=calibration, cache=0.5)
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name

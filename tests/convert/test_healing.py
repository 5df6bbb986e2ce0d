"""Healing on tiny teachers: it learns, it never makes worse, it survives a kill."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from mla.convert import convert, healing
from mla.convert.healing import heal
from mla.errors import MLAError
from tests.convert.tiny import divergence, teacher, tokens

TRAINED = {
    "llama": ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "qwen2": ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
}


def _student(model: torch.nn.Module) -> DeepseekV3ForCausalLM:
    return convert(model, calibration=tokens(6, 24), rank=6, rope=6)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only runs when it is read: as many steps on a busy machine as on an idle one."""
    seconds = itertools.count(0.0, 0.03)
    monkeypatch.setattr("mla.convert.healing.time", SimpleNamespace(monotonic=lambda: next(seconds)))


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla.convert.healing._SAVE_EVERY", 0.0)


def _kl(model: torch.nn.Module, student: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return divergence(model(ids).logits, student(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TRAINED)
def test_it_learns_and_touches_nothing_but_the_attention(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla.convert.healing.faster_dtype", lambda _: dtype)
    # A tiny random model learns within seconds only with steps that would ruin a real one.
    monkeypatch.setattr("mla.convert.healing._RATE", 0.01)
    model = teacher(kind)
    student = _student(model)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    held_out = tokens(3, 24, seed=9)
    worse = _kl(model, student, held_out)
    told: list[tuple[str, float, float]] = []
    found = heal(
        student,
        model,
        tokens(64, 24, seed=5),
        held_out,
        minutes=0.1,
        on_progress=lambda *step: told.append(step),
    )
    assert found.kl_before == pytest.approx(worse, rel=1e-4)
    # Measured on the stock model, latent norm and all: what was trained without it is stored with it.
    assert _kl(model, student, held_out) == pytest.approx(found.kl_after, rel=1e-3)
    assert found.kl_after < 0.97 * found.kl_before
    assert found.tokens > 0
    assert found.seconds > 5
    assert {stage for stage, _, _ in told} == {"healing"}
    for name, value in student.state_dict().items():
        trained = name.split(".")[-2] in TRAINED[kind] and name.endswith("weight")
        if name.endswith("kv_a_proj_with_mqa.bias"):
            # Folding the norm out and in again rounds.
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)
            continue
        assert torch.equal(value, before[name]) != trained, name
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_it_is_never_worse_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps so large that they ruin everything leave the weights as they were."""
    model = teacher()
    student = _student(model)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    monkeypatch.setattr("mla.convert.healing._RATE", 100.0)
    found = heal(student, model, tokens(8, 24), tokens(3, 24, seed=9), minutes=0.03)
    assert found.kl_after == found.kl_before
    assert max(kl for _, kl in found.curve) > found.kl_before
    for name, value in student.state_dict().items():
        # Folding the norm out and in again rounds.
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock on which a step takes 20 seconds and a check of three windows 30."""
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now

    def slow(name: str, seconds: float) -> None:
        real = getattr(healing, name)

        def later(*arguments: Any) -> Any:
            clock.now += seconds
            return real(*arguments)

        monkeypatch.setattr(healing, name, later)

    slow("_slope", 20.0)
    slow("_kl", 10.0)
    monkeypatch.setattr(healing, "time", clock)
    return clock


@pytest.mark.parametrize(("seconds", "checks"), [(240, 1), (3240, 4), (3250, 4), (3260, 4), (7200, 4)])
def test_checks_fit_into_the_time(seconds: float, checks: int, slow_clock: SimpleNamespace) -> None:
    """A short healing has only the last check, none ends late, and the first third of the time has none."""
    model = teacher()
    found = heal(_student(model), model, tokens(8, 24), tokens(3, 24, seed=9), minutes=seconds / 60)
    assert len(found.curve) == 1 + checks
    assert slow_clock.now == found.seconds
    assert found.curve[1][0] > seconds / 3
    assert seconds - 20 - 30 <= found.seconds <= seconds
    assert found.tokens > 0


@pytest.mark.usefixtures("slow_clock")
def test_no_time_for_a_step() -> None:
    model = teacher()
    found = heal(_student(model), model, tokens(8, 24), tokens(3, 24, seed=9), minutes=1)
    assert found.tokens == 0
    assert found.curve == ((0.0, found.kl_before),)


@pytest.mark.usefixtures("_quick", "slow_clock")
def test_a_killed_run_still_ends_in_time(tmp_path: Path) -> None:
    model = teacher()
    state = tmp_path / "healing.pt"

    def kill(stage: str, done: float, total: float) -> None:
        if done >= 150:
            raise _Killed

    arguments = (model, tokens(8, 24), tokens(3, 24, seed=9))
    with pytest.raises(_Killed):
        heal(_student(model), *arguments, minutes=4, state=state, on_progress=kill)
    found = heal(_student(model), *arguments, minutes=4, state=state)
    assert len(found.curve) == 2
    assert found.seconds <= 240


class _Killed(BaseException):
    pass


@pytest.mark.usefixtures("_quick")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    model = teacher()
    state = tmp_path / "healing.pt"
    training, held_out = tokens(16, 24, seed=5), tokens(3, 24, seed=9)

    def kill(now: str, done: float, total: float) -> None:
        if state.exists() and done > 3:
            raise _Killed

    with pytest.raises(_Killed):
        heal(_student(model), model, training, held_out, minutes=0.08, state=state, on_progress=kill)
    content = torch.load(state, weights_only=True)
    student = _student(model)
    times: list[float] = []
    found = heal(
        student,
        model,
        training,
        held_out,
        minutes=0.08,
        state=state,
        on_progress=lambda _, done, __: times.append(done),
    )
    assert times[0] >= content["spent"]
    assert found.tokens >= content["tokens"]
    assert found.kl_after <= content["best_kl"]
    assert _kl(model, student, held_out) == pytest.approx(found.kl_after, rel=1e-3)
    # What it ended with is taken as it is.
    again = heal(
        _student(model),
        model,
        training,
        held_out,
        minutes=0.08,
        state=state,
        on_progress=lambda *_: pytest.fail("a finished healing learnt once more"),
    )
    assert again == found


@pytest.mark.usefixtures("_quick")
def test_a_full_disk_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")  # torch's words for it

    model = teacher()
    monkeypatch.setattr(healing.torch, "save", fills)
    arguments = (_student(model), model, tokens(4, 24), tokens(3, 24, seed=9))
    with pytest.raises(MLAError, match=r"healing\.pt cannot be written: unexpected pos"):
        heal(*arguments, minutes=0.05, state=tmp_path / "healing.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_quick")
def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    model = teacher()
    state = tmp_path / "healing.pt"

    def kill(now: str, done: float, total: float) -> None:
        if state.exists():
            raise _Killed

    with pytest.raises(_Killed):
        heal(
            _student(model),
            model,
            tokens(16, 24),
            tokens(3, 24, seed=9),
            minutes=0.05,
            state=state,
            on_progress=kill,
        )
    with pytest.raises(MLAError, match="another healing"):
        heal(_student(model), model, tokens(16, 24, seed=7), tokens(3, 24, seed=9), minutes=0.05, state=state)
    # Other weights of the same shapes: neither the other text's nor another teacher's healing is taken.
    other = teacher(seed=1)
    for student, original in ((_student(other), model), (_student(model), other)):
        with pytest.raises(MLAError, match="another healing"):
            heal(student, original, tokens(16, 24), tokens(3, 24, seed=9), minutes=0.05, state=state)


def test_arguments_are_checked() -> None:
    model = teacher()
    with pytest.raises(MLAError, match="above 0, got 0"):
        heal(_student(model), model, tokens(2, 24), tokens(2, 24), minutes=0)
    with pytest.raises(MLAError, match="windows, tokens"):
        heal(_student(model), model, tokens(2, 24)[0], tokens(2, 24), minutes=1)

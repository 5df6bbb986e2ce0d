"""The steps of a healing: their gradient, what they cast and read, and that they change only what learns."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3ForCausalLM

from mla.convert import convert, healing
from mla.convert.arithmetic import mixed
from mla.convert.healing import heal
from tests.convert.tiny import VOCABULARY, teacher, tokens


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only runs when it is read: as many steps on a busy machine as on an idle one."""
    seconds = itertools.count(0.0, 0.03)
    monkeypatch.setattr("mla.convert.healing.time", SimpleNamespace(monotonic=lambda: next(seconds)))


def _student(model: torch.nn.Module) -> DeepseekV3ForCausalLM:
    return convert(model, calibration=tokens(6, 24), rank=6, rope=6)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_gradient_is_that_of_the_divergence(
    dtype: torch.dtype, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "_ROWS", 5)  # does not divide the rows
    chance = torch.Generator().manual_seed(0)
    head, other = (0.2 * torch.randn(VOCABULARY, 48, generator=chance) for _ in range(2))
    hidden, reference = (torch.randn(2, 6, 48, generator=chance) for _ in range(2))
    hidden.requires_grad_()
    truth, guess = ((x @ w.T).log_softmax(-1) for x, w in ((reference, other), (hidden, head)))
    kl = (truth.exp() * (truth - guess)).sum(-1).mean()
    (expected,) = torch.autograd.grad(kl, hidden)
    assert healing._kl(head, other, hidden.detach(), reference) == pytest.approx(kl.item(), rel=1e-6)
    found = healing._slope(head.to(dtype), other.to(dtype), hidden.detach(), reference)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < allowed


class _Casts(TorchDispatchMode):
    """How often a weight that no step changes was cast, by its shape."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        cast = function is torch.ops.aten._to_copy.default
        self.count += cast and arguments[0].shape in self.shapes
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_does_not_learn_is_cast_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps there are."""
    monkeypatch.setattr("mla.convert.healing.faster_dtype", lambda _: torch.bfloat16)
    model = teacher(kind, intermediate_size=65)
    students = [_student(model) for _ in range(2)]
    shapes = {torch.Size(shape) for shape in ((VOCABULARY, 48), (48, VOCABULARY), (65, 48), (48, 65))}
    if kind == "qwen2":
        shapes |= {layer.self_attn.q_a_proj.weight.shape for layer in students[0].model.layers}
    found = []
    windows = tokens(1, 24, seed=5)  # one: what the teacher makes of it is kept
    for student, minutes in zip(students, (0.01, 0.03), strict=True):
        with _Casts(shapes) as casts:
            healed = heal(student, model, windows, tokens(3, 24, seed=9), minutes=minutes)
        found.append((healed.tokens, casts.count))
    assert found[1][0] > found[0][0] > 0
    assert found[1][1] == found[0][1] > 0


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_step_is_what_autocast_alone_makes_of_it(kind: str) -> None:
    """Weights that are cast beforehand change no digit."""
    model = teacher(kind)
    student = _student(model)
    trained = [layer.self_attn.kv_b_proj.weight for layer in student.model.layers]
    student.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)

    def gradients() -> list[torch.Tensor]:
        with mixed(torch.bfloat16, student.device):
            hidden = student.model(input_ids=tokens(2, 24), use_cache=False).last_hidden_state
        return list(torch.autograd.grad(hidden.square().sum(), trained))

    expected = gradients()
    with healing._Frozen(student, torch.bfloat16):
        assert student.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        found = gradients()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class _StoppedError(Exception):
    pass


def test_what_does_not_learn_is_the_same_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cast while a step runs, and nothing of that is left whatever ends the step."""
    monkeypatch.setattr("mla.convert.healing.faster_dtype", lambda _: torch.bfloat16)
    model = teacher()
    student = _student(model)
    before = dict(student.named_parameters())
    kept = {name: parameter.detach().clone() for name, parameter in before.items()}

    def fails(mlp: Any, _: Any) -> None:
        if mlp.up_proj.weight.dtype == torch.bfloat16:  # a step, no measurement
            raise _StoppedError

    student.model.layers[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(_StoppedError):
        heal(student, model, tokens(4, 24), tokens(3, 24, seed=9), minutes=0.05)
    for name, parameter in student.named_parameters():
        assert parameter is before[name]
        assert parameter.dtype == torch.float32
        if "self_attn" not in name:  # those rounded while the latent norm was out
            assert torch.equal(parameter, kept[name]), name


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of every pass of the teacher over a window to learn from: what its products gave."""
    found: list[torch.dtype] = []
    real = healing._hidden

    def told(model: Any, ids: torch.Tensor) -> torch.Tensor:
        if isinstance(model, DeepseekV3ForCausalLM) or len(ids) > 1:  # it measures
            return real(model, ids)
        product = model.model.layers[0].mlp.up_proj
        with product.register_forward_hook(lambda *call: found.append(call[2].dtype)):
            return real(model, ids)

    monkeypatch.setattr(healing, "_hidden", told)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_reads_what_is_learnt_from_in_the_faster_dtype(
    dtype: torch.dtype, passes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mla.convert.healing.faster_dtype", lambda _: dtype)
    model = teacher()
    heal(_student(model), model, tokens(4, 24), tokens(3, 24, seed=9), minutes=0.05)
    assert passes == [dtype] * 4


def test_windows_that_are_alike_are_read_once(passes: list[torch.dtype]) -> None:
    """A shorter text's are repeated."""
    model = teacher()
    some, other = tokens(2, 24), tokens(5, 24, seed=5)
    found = heal(_student(model), model, torch.cat([some, other, some]), tokens(3, 24, seed=9), minutes=0.1)
    assert found.tokens > 9 * 24
    assert len(passes) == 7


def test_as_many_outputs_are_kept_as_there_is_room_for(
    passes: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "_TOKENS_PER_STEP", 24)
    monkeypatch.setattr(healing, "_KEPT", 3 * 24 * 48 * 4 + 1)
    monkeypatch.setattr("mla.convert.healing.faster_dtype", lambda _: torch.float32)
    model = teacher()
    found = heal(_student(model), model, tokens(4, 24), tokens(3, 24, seed=9), minutes=0.05)
    rounds = found.tokens // (4 * 24)
    assert rounds > 2
    assert 3 + rounds <= len(passes) <= 3 + rounds + 1

"""What a conversion needs at least is known from the configuration."""

from __future__ import annotations

import importlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla.convert import Request, budget_for, convert, run
from mla.convert.memory import least_memory, models_without_weights
from tests.convert.tiny import Letters, teacher, tokens

RUN = importlib.import_module("mla.convert.run")  # the package shows the function of this name


def numbers(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "split_query"), [("llama", False), ("llama", True), ("qwen2", False)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_counted_exactly(kind: str, tied: bool, split_query: bool) -> None:
    model = teacher(kind, tie_word_embeddings=tied)
    student = convert(model, calibration=tokens(1, 8), rank=10, rope=6, split_query=split_query)
    budget = budget_for(model.config, cache=None, rank=10, rope=6)
    empty = models_without_weights(model.config, budget, split_query)
    assert [numbers(each) for each in empty] == [numbers(model), numbers(student)]
    assert {each.device.type for each in empty} == {"meta"}


def test_statistics_text_and_training_count() -> None:
    model = teacher(num_hidden_layers=3)
    config = model.config
    budget = budget_for(config, cache=0.5, rank=None, rope=None)
    student = convert(model, calibration=tokens(1, 8), cache=0.5)
    weights = 4 * (numbers(model) + numbers(student))
    starts = config.vocab_size + 1  # every token may begin a text, and the named one
    # Two covariances of every head over 48 numbers, measured and as terms; 48 of width, two and four times.
    statistics = 2 * 2 * 4 * 48 * 48 * 8
    trained = 16 * sum(numbers(layer.self_attn) for layer in student.model.layers)
    for windows, heal, more in (
        (2, False, statistics + 2 * (2 * 16 + starts) * 48 * 4),
        (2, True, trained),
        (99, True, 4 * (99 * 16 + starts) * 48 * 4),
    ):
        found = least_memory(config, budget, windows=windows, window=16, split_query=False, heal=heal)
        assert found - weights == more


class _Held(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.device.type == "cpu":
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.most = max(self.most, self.now)

        def goes() -> None:
            self.known.discard(place)
            self.now -= size

        weakref.finalize(storage, goes)


# Wide heads: the statistics are the largest thing; long text: the streams.
@pytest.mark.parametrize(("heads", "windows", "products"), [(24, 2, 1.35), (4, 96, 1.1)])
def test_it_is_what_a_conversion_holds(
    heads: int, windows: int, products: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted on the tensors that are alive: no less, and not much more for products under way."""
    monkeypatch.setattr("mla.convert.statistics._LOGITS", 64**2)  # a head at a time, as in windows of 1,024
    wide = {"hidden_size": 96, "intermediate_size": 32, "head_dim": 4, "num_attention_heads": heads}
    model = teacher(num_key_value_heads=heads, num_hidden_layers=3, **wide)
    calibration = tokens(windows, 64)
    budget = budget_for(model.config, cache=0.25, rank=None, rope=None)
    size = {"windows": windows, "window": 64, "split_query": False, "heal": False}
    least = least_memory(model.config, budget, **size) - 4 * numbers(model)
    with _Held() as held:
        student = convert(model, calibration=calibration, cache=0.25)
    assert held.now > 4 * numbers(student)
    assert least <= held.most <= products * least


def test_a_result_in_bf16_is_not_held_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is saved: least_memory counts two models, and no copy of one of them."""
    copies: list[list[str]] = []
    real = RUN.save

    def told(student: torch.nn.Module, *given: Any, **more: Any) -> None:
        held = {value.data_ptr() for value in student.state_dict().values()}

        def written(weights: dict[str, torch.Tensor], *_: Any, **__: Any) -> None:
            copies.append([name for name, value in weights.items() if value.data_ptr() not in held])

        monkeypatch.setattr("mla.convert.saving.save_torch_state_dict", written)
        real(student, *given, **more)

    monkeypatch.setattr(RUN, "save", told)
    request = Request(cache=0.5, windows=2, window=16, dtype="bfloat16")
    run("tiny", teacher(), Letters(), tmp_path / "out", request)
    assert copies == [[]]

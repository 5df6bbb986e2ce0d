"""Our rotary tables and rotation against every family's own, in the model's own forward pass."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from mla.config import MLAConfig, RopeConfig
from mla.errors import MLAError
from mla.ops.rope import apply_rope, rope_table
from tests.families import FAMILY_NAMES, ROPE_SCALINGS, VARIANTS, Variant, token_ids

CASES = [Variant(name, "base", {}) for name in FAMILY_NAMES] + VARIANTS
ROTATING = [case for case in CASES if case.family not in ("kimi_linear", "glm5_next")]


def rotary_of(model: PreTrainedModel) -> nn.Module:
    found = [
        module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RotaryEmbedding") and "vision" not in name
    ]
    assert len(found) == 1
    return found[0]


def table_for(config: MLAConfig, rotary: nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rope_table(
        config.rope,
        config.qk_rope_head_dim,
        positions,
        max_position_embeddings=config.max_position_embeddings,
        log_frequency_scale=getattr(rotary, "alpha", None),
    )


@pytest.mark.parametrize("case", ROTATING, ids=lambda case: case.id)
def test_same_angles_and_same_scores_as_the_model(case: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.build()
    config = MLAConfig.from_transformers(model.config)
    rotary = rotary_of(model)

    # Within the original length, across it, and far beyond; ascending, because the stock dynamic scaling
    # keeps the state of the longest sequence it has seen.
    for start, count in ((0, 8), (28, 8), (60, 8), (500, 9)):
        positions = torch.arange(start, start + count)[None]
        for layer in (0, 1) if config.groups else (0,):
            own = config.at_layer(layer)
            if own.rope.layout == "none":
                continue
            cos, sin = table_for(own, rotary, positions)
            with torch.device("meta"):  # the tables lie where the positions do
                assert torch.equal(table_for(own, rotary, positions)[0], cos)
            extra = (model.config.layer_types[layer],) if hasattr(rotary, "layer_types") else ()
            stock = rotary(torch.zeros(1), positions, *extra)
            half = own.qk_rope_head_dim // 2
            theirs = (stock.real, stock.imag) if torch.is_tensor(stock) else (t[..., :half] for t in stock)
            for ours, expected in zip((cos, sin), theirs, strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)

            # A short call takes the stock dynamic scaling back to the original frequencies.
            rotary(torch.zeros(1), torch.arange(4)[None], *extra)

    # Products of rotated keys show the layout; the keys are those that the model caches.
    hidden: dict[int, torch.Tensor] = {}
    rotated: dict[int, torch.Tensor] = {}
    layers = [module for module in model.modules() if hasattr(module, "expand_kv")]
    for module in layers:

        def before(module: Any, args: Any, kwargs: Any) -> None:
            hidden[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        def expand(c_kv: Any, k_rope: Any, module: Any = module, stock: Any = module.expand_kv) -> Any:
            rotated[module.layer_idx] = k_rope
            return stock(c_kv, k_rope)

        module.register_forward_pre_hook(before, with_kwargs=True)
        monkeypatch.setattr(module, "expand_kv", expand)
    with torch.no_grad():
        model(token_ids(1, 40))
        checked = 0
        for module in layers:
            own = config.at_layer(module.layer_idx)
            if module.kv_a_proj_with_mqa is None or own.rope.layout == "none":
                continue
            k_rope = module.kv_a_proj_with_mqa(hidden[module.layer_idx])[..., own.kv_lora_rank :]
            if hasattr(module, "k_rope_only_layernorm"):
                k_rope = module.k_rope_only_layernorm(k_rope)
            ours = apply_rope(k_rope, *table_for(own, rotary, torch.arange(40)[None]), own.rope.layout)
            theirs = rotated[module.layer_idx][:, 0]
            torch.testing.assert_close(ours @ ours.mT, theirs @ theirs.mT, atol=1e-4, rtol=1e-4)
            checked += 1
        assert checked


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_on_the_distance_only(layout: str) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 1, 10, dtype=torch.float64)
    rope = RopeConfig(layout=layout)

    def score(i: int, j: int) -> torch.Tensor:
        tables = [rope_table(rope, 10, torch.tensor([pos]), dtype=torch.float64) for pos in (i, j)]
        return apply_rope(q, *tables[0], layout) @ apply_rope(k, *tables[1], layout).mT

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=0)
    torch.testing.assert_close(score(5, 5), q @ k.mT, atol=1e-6, rtol=0)


def test_the_layouts_differ_by_a_permutation() -> None:
    x = torch.randn(2, 4, 5, 8)
    cos, sin = rope_table(RopeConfig(layout="half"), 8, torch.arange(5))
    pairs = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    half = apply_rope(x, cos, sin, "half")
    interleaved = apply_rope(x[..., pairs], cos, sin, "interleaved")
    torch.testing.assert_close(half[..., pairs], interleaved)
    assert apply_rope(x, cos, sin, "none") is x


def test_low_precision_input_is_rotated_in_fp32() -> None:
    x = torch.randn(1, 1, 6, 8).bfloat16()
    cos, sin = rope_table(RopeConfig(layout="half"), 8, torch.arange(6))
    out = apply_rope(x, cos, sin, "half")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope(x.float(), cos, sin, "half").bfloat16())
    assert (
        rope_table(RopeConfig(layout="half"), 8, torch.arange(6), dtype=torch.float16)[0].dtype == torch.half
    )


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5)])
@pytest.mark.parametrize("dim", [0, 2, 6])
def test_any_shape_of_positions(shape: tuple[int, ...], dim: int) -> None:
    for rope_type in ("default", "dynamic"):
        rope = RopeConfig(layout="half", rope_type=rope_type, factor=2.0)
        table = rope_table(rope, dim, torch.zeros(shape, dtype=torch.long), max_position_embeddings=4)
        assert [t.shape for t in table] == [(*shape, dim // 2)] * 2


def test_longrope_switches_at_the_original_length() -> None:
    rope = RopeConfig(
        layout="half",
        rope_type="longrope",
        original_max_position_embeddings=10,
        factor=4.0,
        short_factor=(1.0, 1.0),
        long_factor=(2.0, 4.0),
    )
    one = torch.tensor([1])
    short, long = (rope_table(rope, 4, one, seq_len=length)[1] for length in (10, 11))
    scale = rope.attention_scaling()
    torch.testing.assert_close(short / scale, torch.tensor([[1.0, 0.01]]).sin())
    torch.testing.assert_close(long / scale, torch.tensor([[0.5, 0.0025]]).sin())


def test_mistakes_are_named() -> None:
    rope = RopeConfig(layout="half")
    cos, sin = rope_table(rope, 8, torch.arange(3))
    with pytest.raises(MLAError, match="even number, got 7"):
        rope_table(rope, 7, torch.arange(3))
    with pytest.raises(MLAError, match="layout"):
        apply_rope(torch.zeros(3, 8), cos, sin, "diagonal")
    with pytest.raises(MLAError, match="tables"):
        apply_rope(torch.zeros(3, 6), cos, sin, "half")
    with pytest.raises(MLAError, match="max_position_embeddings"):
        rope_table(RopeConfig(layout="half", rope_type="dynamic", factor=2.0), 8, torch.arange(3))
    values = dict(ROPE_SCALINGS["longrope"], layout="half", theta=1e4, short_factor=(1.0,) * 4)
    del values["rope_theta"]
    with pytest.raises(MLAError, match="expected 2 factors, got 4"):
        rope_table(RopeConfig(**values), 4, torch.arange(3))


def test_every_family_module_is_importable() -> None:
    for name in FAMILY_NAMES:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        assert any(hasattr(item, "expand_kv") for item in vars(module).values() if isinstance(item, type))

"""What cannot be stored is refused before any work, with the reason."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mla.budget import choose_budget
from mla.convert import budget_for, calibration_size, check, check_convertible, convert
from mla.convert.text import check_window
from mla.errors import MLAError

from .tiny import teacher, tokens

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen2Config(use_sliding_window=True, sliding_window=4096), "4096.*max_position_embeddings"),
        (Qwen3Config(), "QK-norm"),
        (GPT2Config(), "gpt2"),
        (DeepseekV3Config(), "already"),
        (LlamaConfig(mlp_bias=True), "mlp_bias"),
        (LlamaConfig(quantization_config={"quant_method": "awq", "bits": 4}), "quantised.*made from"),
        (LlamaConfig(rope_parameters=_YARN), "yarn.*original_max_position_embeddings"),
        (LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "linear"),
        (
            LlamaConfig(
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            ),
            "partial",
        ),
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), "4096.*max_position_embeddings"),
    ],
)
def test_refused(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(MLAError, match=reason) as caught:
        check_convertible(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (("qwen3", "gemma3_text", "olmo2", "olmo3", "qwen3_moe", "gemma3", "qwen3_vl"), "QK-norm"),
        (("qwen3_moe", "qwen2_moe", "mixtral", "granitemoe", "gpt_oss"), "experts"),
        (("gpt_oss",), "sinks"),
        (("smollm3",), "no RoPE"),
        (("phi3",), "fused"),
        (("granite", "granitemoe"), "multipliers"),
        (("cohere",), "side by side"),
        (("gemma",), "scaled"),
        (("gemma2",), "caps logits"),
        (("gemma3", "qwen3_vl", "llama4"), "more than text"),
        (("qwen2_vl", "qwen2_5_vl", "mllama"), "language model is of a type of its own"),
        (("llava", "llava_next", "mistral3", "smolvlm"), "more than text.*saved by itself"),
    ],
)
def test_families_that_people_will_try(kinds: tuple[str, ...], reason: str) -> None:
    for kind in kinds:
        config = CONFIG_MAPPING[kind]()  # the name is one of Transformers'
        with pytest.raises(MLAError, match=f"cannot convert a {kind} model: .*{reason}") as caught:
            check_convertible(config)
        assert "\n" not in str(caught.value)


def test_every_reason_is_tested_by_a_name_that_transformers_knows() -> None:
    assert not set(check._REASONS) - set(CONFIG_MAPPING.keys())


def test_odd_head_dim_is_refused() -> None:
    config = LlamaConfig()
    config.head_dim = 33  # newer Transformers refuse it themselves on construction
    with pytest.raises(MLAError, match="odd"):
        check_convertible(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        LlamaConfig(attention_bias=True),
        Qwen2Config(),
        Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=40, num_hidden_layers=32),
        MistralConfig(sliding_window=None),
        MistralConfig(sliding_window=4096, max_position_embeddings=4096),
    ],
)
def test_accepted(config: PreTrainedConfig) -> None:
    check_convertible(config)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "cache"),
        ({"cache": 0.5, "rank": 100, "rope": 32}, "not all three"),
        ({"cache": 0.0}, r"\(0, 1\]"),
        ({"cache": 1.5}, r"\(0, 1\]"),
        ({"rank": 0}, "rank"),
        ({"rope": 7}, "even"),
        ({"rope": 130}, "128"),
        ({"cache": 0.5, "rank": 191}, "leaves 1"),
        ({"cache": 0.1, "rope": 64}, "at least"),
        ({"rank": 4096, "rope": 48}, "4144 numbers per token and layer, more than the original's 384"),
        ({"rank": 353, "rope": 32}, "385 numbers"),
        ({"rank": 384}, "more than the original's 384"),
    ],
)
def test_budgets_that_make_no_sense(asked: dict[str, float], reason: str) -> None:
    given = {"cache": None, "rank": None, "rope": None} | asked
    with pytest.raises(MLAError, match=reason):
        choose_budget(**given, groups=3, head_dim=64, hidden=576, theta=1e5)


@pytest.mark.parametrize(
    ("asked", "total"),
    [
        ({"cache": 0.5}, 192),
        ({"cache": 0.3125}, 120),
        ({"cache": 0.125}, 48),
        ({"cache": 0.02}, 8),
        ({"cache": 1.0}, 384),
        ({"rank": 160, "rope": 32}, 192),
        ({"rank": 352, "rope": 32}, 384),
        ({"cache": 0.5, "rope": 32}, 192),
        ({"cache": 0.5, "rank": 150}, 192),
    ],
)
def test_budgets_spend_what_was_given(asked: dict[str, float], total: int) -> None:
    given = {"cache": None, "rank": None, "rope": None} | asked
    budget = choose_budget(**given, groups=3, head_dim=64, hidden=576, theta=1e5)
    assert budget.rank + budget.rope == total
    assert budget.rope % 2 == 0
    assert budget.theta == pytest.approx(1e5 ** max(0.5, budget.rope / 64))


@pytest.mark.parametrize(
    ("cache", "windows"), [(1.0, 24), (0.5, 24), (1 / 3, 24), (0.32, 64), (0.25, 64), (0.24, 128), (0.1, 128)]
)
def test_small_caches_are_calibrated_on_more_text(cache: float, windows: int) -> None:
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    budget = budget_for(config, cache=cache, rank=None, rope=None)
    assert calibration_size(config, budget) == (windows, 1024)


def test_a_model_without_positions_reads_any_window() -> None:
    check_window(MambaConfig(), 10**6)
    with pytest.raises(MLAError, match="window: expected 2 or more, got 1"):
        check_window(MambaConfig(), 1)


def test_what_is_given_of_the_calibration_stays() -> None:
    config = LlamaConfig(max_position_embeddings=100)
    assert calibration_size(config) == (246, 100)  # no window is longer than the model reads
    assert calibration_size(config, windows=7) == (7, 100)
    assert calibration_size(config, window=50) == (492, 50)
    long = LlamaConfig(max_position_embeddings=65_536)
    assert calibration_size(long, window=24_576) == (2, 24_576)
    assert calibration_size(long, window=16_384, texts=3) == (3, 16_384)
    for window in (101, 1, 0):
        with pytest.raises(MLAError, match=f"window: expected 2 to 100 tokens, .* got {window}"):
            calibration_size(config, window=window)


@pytest.mark.parametrize("asked", [{"rank": 64}, {"rope": 32}])
def test_one_of_two_is_enough(asked: dict[str, int]) -> None:
    given = {"cache": None, "rank": None, "rope": None} | asked
    budget = choose_budget(**given, groups=3, head_dim=64, hidden=576, theta=1e5)
    assert budget.rank > 0
    assert budget.rope > 0


@pytest.mark.parametrize(
    "calibration",
    [
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(2, 8),
        torch.zeros(0, 8, dtype=torch.int64),
        torch.full((1, 8), 97),
        torch.full((1, 8), -1),
    ],
)
def test_bad_calibration(calibration: torch.Tensor) -> None:
    with pytest.raises(MLAError, match="calibration"):
        convert(teacher(), cache=0.5, calibration=calibration)


def test_one_token_per_window_is_refused() -> None:
    with pytest.raises(MLAError, match="calibration"):
        convert(teacher(), cache=0.5, calibration=tokens(2, 1))

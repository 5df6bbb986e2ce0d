"""Where the target can hold the teacher exactly, the conversion is exact, also after saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from mla import absorb
from mla.convert import convert, save
from mla.convert.checkpoint import head_dim

from .tiny import divergence, teacher, tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"head_dim": 20},  # wider than hidden / heads
        {"head_dim": 8, "tie_word_embeddings": False},
        {"num_attention_heads": 1, "head_dim": 16},
        {"rms_norm_eps": 1e-6},
        {"rms_norm_eps": 9.999999747378752e-06},  # 1e-5 as a GGUF file holds it
        {"rms_norm_eps": 1e-3},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_one_key_value_head_with_all_of_rope_is_exact(
    kind: str, changes: dict[str, object], tmp_path: Path
) -> None:
    original = teacher(kind, num_key_value_heads=1, **changes)
    d = head_dim(original.config)
    student = convert(original, rank=d, rope=d, calibration=tokens(2, 24))
    ids = tokens(3, 200, seed=5)
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(student(ids).logits, expected, atol=1e-4, rtol=1e-4)
        folder = save(student, None, tmp_path / "student", report={"source": "tiny"})
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(loaded, DeepseekV3ForCausalLM)
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_biases_of_queries_keys_values_and_output_are_exact(tmp_path: Path) -> None:
    original = teacher(num_key_value_heads=1, attention_bias=True)
    assert original.model.layers[0].self_attn.o_proj.bias.abs().max() > 0.5
    student = convert(original, rank=12, rope=12, calibration=tokens(2, 24))
    ids = tokens(3, 200, seed=5)
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(student(ids).logits, expected, atol=1e-4, rtol=1e-4)
        folder = save(student, None, tmp_path / "student", report={"source": "tiny"}, dtype=torch.bfloat16)
        half = AutoModelForCausalLM.from_pretrained(folder)
        rounded = original.to(torch.bfloat16)
        apart = divergence(expected, half(ids).logits.float())
        # What bf16 takes from the original it may take from the converted twice.
        assert apart < 4 * divergence(expected, rounded(ids).logits.float())


def test_the_whole_cache_of_one_head_is_chosen_exactly() -> None:
    original = teacher(num_key_value_heads=1)
    student = convert(original, cache=1.0, calibration=tokens(1, 8))
    assert (student.config.kv_lora_rank, student.config.qk_rope_head_dim) == (12, 12)
    with torch.no_grad():
        ids = tokens(1, 64)
        torch.testing.assert_close(student(ids).logits, original(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_cached_decoding_equals_the_full_pass(kind: str) -> None:
    original = teacher(kind, num_key_value_heads=1)
    student = convert(original, rank=12, rope=12, calibration=tokens(1, 16))
    prompt = tokens(1, 10)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = original.generate(prompt, **options)
    assert torch.equal(student.generate(prompt, **options), expected)
    absorb(student)
    assert torch.equal(student.generate(prompt, **options), expected)


def test_the_teacher_is_left_alone() -> None:
    original = teacher()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    convert(original, cache=0.5, calibration=tokens(2, 24))
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("groups", [2, 4])
def test_loss_falls_with_the_budget(groups: int) -> None:
    original = teacher(num_key_value_heads=groups)
    ids = tokens(4, 96, seed=9)
    losses = []
    for cache in (0.25, 0.5, 0.75, 1.0):
        student = convert(original, cache=cache, calibration=tokens(8, 96))
        full = 2 * groups * 12
        assert student.config.kv_lora_rank + student.config.qk_rope_head_dim <= round(cache * full)
        with torch.no_grad():
            losses.append(divergence(original(ids).logits, student(ids).logits))
    assert losses == sorted(losses, reverse=True), losses
    # The heads of a random model share nothing, so the one rotary key stays a bottleneck at any rank.
    assert losses[-1] < 0.5 * losses[0], losses


def test_bf16_teacher_converts_to_an_fp32_student() -> None:
    original = teacher(num_key_value_heads=1)
    half = teacher(num_key_value_heads=1).to(torch.bfloat16)
    student = convert(half, rank=12, rope=12, calibration=tokens(1, 16))
    assert student.dtype == torch.float32
    ids = tokens(1, 64)
    with torch.no_grad():
        rounded = original
        rounded.load_state_dict(half.float().state_dict())
        torch.testing.assert_close(student(ids).logits, rounded(ids).logits, atol=1e-4, rtol=1e-4)


def test_progress_and_determinism() -> None:
    seen: list[tuple[str, int, int]] = []
    original = teacher()
    first = convert(original, cache=0.5, calibration=tokens(2, 24), on_progress=lambda *a: seen.append(a))
    assert seen == [("converting", 1, 2), ("converting", 2, 2)]
    second = convert(original, cache=0.5, calibration=tokens(2, 24))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name

"""Every trap of the target checkpoint, one test each."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, GenerationConfig

from mla.convert import convert, save
from mla.convert.checkpoint import LATENT_GAIN, LATENT_NORM_EPS, LATENT_SCALE
from mla.errors import MLAError

from .tiny import divergence, teacher, tokens


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    return teacher()


@pytest.fixture(scope="module")
def student(original: torch.nn.Module) -> DeepseekV3ForCausalLM:
    return convert(original, rank=20, rope=8, calibration=tokens(4, 48))


@pytest.fixture(scope="module")
def folder(student: DeepseekV3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(student, None, tmp_path_factory.mktemp("out") / "student", report={"source": "tiny"})


def test_config_is_stock_and_dense(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 2,
        "num_hidden_layers": 2,
        "q_lora_rank": None,
        "rope_interleave": True,
        "attention_bias": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-6,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 256,
    }
    assert {key: config.get(key, "absent") for key in expected} == expected
    assert isinstance(config["n_routed_experts"], int)
    assert config["qk_nope_head_dim"] > 0
    assert config["rope_parameters"]["rope_type"] == "default"
    assert config["rope_parameters"]["rope_theta"] == pytest.approx(10_000 ** (8 / 12))
    assert "auto_map" not in config
    assert "quantization_config" not in config


def test_every_weight_is_written_and_expected(folder: Path, student: DeepseekV3ForCausalLM) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert written == set(student.state_dict())
    assert "lm_head.weight" in written
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in loaded.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, student.state_dict()[name]), name


FRESH = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache
from mla import absorb

folder, dtype, file = sys.argv[1:]
ids = torch.arange(3, 3 + 80).view(2, 40)

def logits(model):
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :32], past_key_values=cache).logits]
    parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(32, 40)]
    return torch.cat(parts, dim=1)

with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = {"stock": logits(model), "absorbed": logits(absorb(model))}
save_file(found, file)
print(type(model).__name__, model.dtype)
"""


@pytest.mark.parametrize(
    ("dtype", "apart", "lost"), [(torch.float32, 2e-5, 1e-7), (torch.bfloat16, 0.25, 1e-3)]
)
def test_a_fresh_process_loads_it_and_absorbs_it(
    student: DeepseekV3ForCausalLM, dtype: torch.dtype, apart: float, lost: float, tmp_path: Path
) -> None:
    """Stock Transformers without a warning, and absorbed: a prompt and tokens after it, the same logits."""
    folder, file = tmp_path / "out", tmp_path / "logits.safetensors"
    save(student, None, folder, report={"source": "tiny"}, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), name, str(file)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == ["DeepseekV3ForCausalLM", str(dtype)]
    for word in ("newly initialized", "not used", "MISSING", "UNEXPECTED", "Warning"):
        assert word not in done.stderr, done.stderr
    found = {name: logits.float() for name, logits in load_file(file).items()}
    with torch.no_grad():
        here = student(torch.arange(3, 3 + 80).view(2, 40)).logits
    for first, second in itertools.combinations([here, *found.values()], 2):
        torch.testing.assert_close(first, second, atol=apart, rtol=0)
        assert divergence(first, second) < lost


def test_the_latent_norm_is_the_identity(student: DeepseekV3ForCausalLM) -> None:
    assert pytest.approx(math.sqrt(LATENT_NORM_EPS)) == LATENT_SCALE * LATENT_GAIN
    assert pytest.approx(2.0**-30, rel=0.03) == LATENT_SCALE
    gain = torch.tensor(LATENT_GAIN)
    assert gain.to(torch.bfloat16).float() == gain, "a gain that bf16 rounds tilts every key and value"
    for layer in student.model.layers:
        block = layer.self_attn
        assert block.kv_a_layernorm.variance_epsilon == LATENT_NORM_EPS
        x = torch.randn(64, 48)
        raw = (x @ block.kv_a_proj_with_mqa.weight.detach().T)[:, :20]
        plain = raw.double() / LATENT_SCALE
        normed = block.kv_a_layernorm(raw).detach().double()
        assert float((normed - plain).norm() / plain.norm()) < 1e-6


def test_the_latent_norm_in_bf16_costs_no_more_than_rounding(student: DeepseekV3ForCausalLM) -> None:
    block = student.model.layers[0].self_attn
    latent = torch.randn(256, 20)
    raw = (latent * LATENT_SCALE).to(torch.bfloat16)
    norm = type(block.kv_a_layernorm)(20).to(torch.bfloat16)
    norm.weight.data.fill_(LATENT_GAIN)
    error = norm(raw).detach().double() - latent.double()
    assert float(error.norm() / latent.norm()) < 3e-3
    bias = float((norm(raw).detach().double() * latent).sum() / latent.double().square().sum()) - 1
    assert abs(bias) < 3e-4


def test_both_norm_eps_conventions_agree(student: DeepseekV3ForCausalLM) -> None:
    # vLLM reads rms_norm_eps for the latent norm, Transformers has 1e-6: they must be the same number.
    assert student.config.rms_norm_eps == student.model.layers[0].self_attn.kv_a_layernorm.variance_epsilon


def test_the_residual_stream_absorbs_the_change_of_eps(original: torch.nn.Module) -> None:
    # Small embeddings, where 1e-5 and 1e-6 differ visibly.
    small = teacher(num_key_value_heads=1, initializer_range=0.02, num_attention_heads=4)
    ids = tokens(2, 64)
    with torch.no_grad():
        expected = small(ids).logits
        student = convert(small, rank=12, rope=12, calibration=tokens(1, 16))
        torch.testing.assert_close(student(ids).logits, expected, atol=1e-5, rtol=1e-4)
        for module in small.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-6
        assert float((small(ids).logits - expected).abs().max()) > 1e-3, "the test shows nothing"


def test_a_split_query_is_the_same_query(original: torch.nn.Module) -> None:
    split = convert(original, rank=12, rope=12, calibration=tokens(4, 24), split_query=True)
    whole = convert(original, rank=12, rope=12, calibration=tokens(4, 24))
    assert split.config.q_lora_rank == original.config.hidden_size
    ids = tokens(2, 24, seed=3)
    with torch.no_grad():
        expected = whole(ids).logits
        torch.testing.assert_close(split(ids).logits, expected, atol=1e-5, rtol=1e-4)
        rounded = [float((model.bfloat16()(ids).logits - expected).norm()) for model in (whole, split)]
    assert rounded[1] < 1.3 * rounded[0]


def test_a_split_query_has_no_room_for_biases() -> None:
    with pytest.raises(MLAError, match=r"llama\.cpp"):
        convert(teacher("qwen2"), rank=12, rope=12, calibration=tokens(4, 24), split_query=True)


def test_bf16_round_trip(student: DeepseekV3ForCausalLM, original: torch.nn.Module, tmp_path: Path) -> None:
    save(student, None, tmp_path / "half", report={"source": "tiny"}, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    ids = tokens(2, 96)
    with torch.no_grad():
        assert divergence(student(ids).logits, loaded(ids).logits.float()) < 5e-3
        assert divergence(student(ids).logits, loaded.float()(ids).logits) < 5e-3


def test_generation_config_is_carried_over(original: torch.nn.Module, tmp_path: Path) -> None:
    original.generation_config.temperature = 0.7
    original.generation_config.do_sample = True
    student = convert(original, cache=0.5, calibration=tokens(1, 16))
    save(student, None, tmp_path / "out", report={"source": "tiny"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generation_config.eos_token_id == original.generation_config.eos_token_id


def test_a_generation_config_that_contradicts_itself_is_carried_over(
    student: DeepseekV3ForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some are published: Transformers warns when it loads one, and may refuse to save it."""
    published = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "pad_token_id": -1}
    monkeypatch.setattr(student, "generation_config", GenerationConfig(**published))
    out = save(student, None, tmp_path / "out", report={"source": "tiny"})
    found = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert {name: getattr(found, name) for name in published} == published

"""A GGUF file's RoPE scaling reaches the model, or the file is refused."""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mla.convert import check_convertible
from mla.errors import MLAError
from mla.integrations.loading import load_config, load_model
from tests.cli.conftest import make_tokenizer

THETA = 500_000.0
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": THETA}


def llama(rope: dict[str, object]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of queries and keys: pairs side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def divisors(rope: dict[str, float]) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py computes them."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    found = []
    for frequency in 1.0 / (THETA ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32)):
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(found, dtype=np.float32)


def write(
    file: Path,
    model: LlamaForCausalLM,
    *,
    freqs: np.ndarray | None = None,
    keys: dict[str, object] | None = None,
) -> Path:
    """The model as a GGUF file, with the scaling that is given."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = json.loads(make_tokenizer().backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(tokenizer["model"]["vocab"]))
    writer.add_token_merges([])
    for key, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = permuted(value, 2 if "q_proj" in name else 1)
        stem, _, end = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{end}", value.numpy())
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_llama3_is_read_off_its_divisors(tmp_path):
    original, unscaled = llama(LLAMA3), llama(PLAIN)
    file = write(tmp_path / "model.gguf", original, freqs=divisors(LLAMA3))
    config = load_config(str(file))
    assert config.rope_parameters == LLAMA3
    check_convertible(config)
    model = load_model(str(file), dtype="float32")
    assert torch.equal(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    ids = torch.randint(256, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = original(ids).logits
        torch.testing.assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        assert float((unscaled(ids).logits - wanted).abs().max()) > 0.01, "the test shows nothing"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope.scaling.type": "none"},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 1.0},
    ],
)
def test_files_without_a_scaling_open(tmp_path, keys):
    model = load_model(str(write(tmp_path / "model.gguf", llama(PLAIN), keys=keys)), dtype="float32")
    assert torch.equal(model.model.rotary_emb.inv_freq, llama(PLAIN).model.rotary_emb.inv_freq)
    check_convertible(model.config)  # which says that the file was quantised, as the weights no longer are


@pytest.mark.parametrize(
    ("keys", "freqs", "told"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, "linear, factor 4"),
        ({"rope.scale_linear": 2.0}, None, "linear, factor 2"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, None, "yarn, factor 8"),
        ({}, divisors({**LLAMA3, "high_freq_factor": 3.0}), r"rope_freqs\.weight"),
        ({}, divisors(LLAMA3)[:8], r"rope_freqs\.weight"),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            divisors(LLAMA3),
            r"rope_freqs\.weight, linear",
        ),
    ],
)
def test_other_scalings_are_refused(tmp_path, keys, freqs, told):
    file = write(tmp_path / "model.gguf", llama(PLAIN), keys=keys, freqs=freqs)
    for load in (load_config, load_model):
        with pytest.raises(MLAError, match=rf"RoPE scaling \({told}.*config\.json and safetensors"):
            load(str(file))

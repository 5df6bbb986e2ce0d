"""The module against Transformers' ``DeepseekV3Attention``: same state dict, same outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

from mla.cache import LatentCache
from mla.config import MLAConfig
from mla.nn import MultiheadLatentAttention, RMSNorm
from tests.nn.cases import SIZES, YARN, random

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
VARIANTS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "half": {"rope_interleave": False},
    "query compression": {"q_lora_rank": 24},
    "query compression, half, bias": {
        "q_lora_rank": 24,
        "rope_interleave": False,
        "attention_bias": True,
    },
    "bias": {"attention_bias": True},
    "yarn": {"rope_parameters": {"rope_theta": 10000.0, **YARN}, "max_position_embeddings": 128},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "another model epsilon": {"rms_norm_eps": 1e-2},  # the latent norms keep 1e-6
}


def make_pair(**changes: Any) -> tuple[MultiheadLatentAttention, DeepseekV3Attention, Any]:
    options = {
        "q_lora_rank": None,
        "num_key_value_heads": SIZES["num_attention_heads"],
        "num_hidden_layers": 1,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = DeepseekV3Config(**{**SIZES, **options, **changes})
    theirs = DeepseekV3Attention(config, layer_idx=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + (parameter.ndim == 1))
    ours = MultiheadLatentAttention(MLAConfig.from_transformers(config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, DeepseekV3RotaryEmbedding(config)


def causal_mask(s: int, t: int) -> torch.Tensor:
    return torch.full((s, t), -torch.inf).triu(t - s + 1)[None, None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@pytest.mark.parametrize("recompute_kv", [False, True])
def test_outputs_and_gradients(variant, path, recompute_kv):
    ours, theirs, rotary = make_pair(**VARIANTS[variant])
    ours.recompute_kv = recompute_kv
    positions = torch.arange(19)[None] + 7
    results = {}
    for name in ("ours", "theirs"):
        x = random(2, 19, SIZES["hidden_size"]).requires_grad_()
        if name == "ours":
            out = ours(x, position_ids=positions, path=path)
        else:
            out, _ = theirs(x, rotary(x, positions), causal_mask(19, 19))
        (out * random(*out.shape, seed=1)).mean().backward()
        results[name] = (out, x.grad)
    torch.testing.assert_close(results["ours"][0], results["theirs"][0], **CLOSE)
    torch.testing.assert_close(results["ours"][1], results["theirs"][1], **CLOSE)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **CLOSE, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_incremental_decoding(variant):
    ours, theirs, rotary = make_pair(**VARIANTS[variant])
    x = random(2, 14, SIZES["hidden_size"])
    cache, their_cache, start = LatentCache(), DynamicCache(), 0
    for part in x.split([6, 1, 1, 4, 2], dim=1):
        end = start + part.shape[1]
        positions = torch.arange(start, end)[None]
        want, _ = theirs(part, rotary(part, positions), causal_mask(end - start, end), their_cache)
        torch.testing.assert_close(ours(part, cache=cache), want, **CLOSE)
        start = end


@torch.no_grad()
def test_left_padding():
    ours, theirs, rotary = make_pair()
    x = random(2, 9, SIZES["hidden_size"])
    padding = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    positions = (padding.cumsum(-1) - 1).clamp_min(0)
    mask = causal_mask(9, 9) + torch.zeros(2, 1, 1, 9).masked_fill(padding[:, None, None] == 0, -1e9)
    want, _ = theirs(x, rotary(x, positions), mask)
    got = ours(x, attention_mask=padding)
    torch.testing.assert_close(got[padding == 1], want[padding == 1], **CLOSE)


@torch.no_grad()
def test_temperature_of_the_queries():
    """Mistral 4: the same module with queries that grow with their position."""
    mistral4 = pytest.importorskip("transformers.models.mistral4.modeling_mistral4")
    config = mistral4.Mistral4Config(
        **SIZES,
        q_lora_rank=24,
        num_key_value_heads=SIZES["num_attention_heads"],
        num_hidden_layers=1,
        attn_implementation="eager",
        rope_parameters={"rope_theta": 10000.0, **YARN, "llama_4_scaling_beta": 0.5},
    )
    theirs = mistral4.Mistral4Attention(config, layer_idx=0)
    ours = MultiheadLatentAttention(MLAConfig.from_transformers(config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, positions = random(1, 50, SIZES["hidden_size"]), torch.arange(50)[None]
    rotation = mistral4.Mistral4RotaryEmbedding(config)(x, positions)
    want, _ = theirs(x, rotation, causal_mask(50, 50), positions)
    cache = LatentCache()
    got = torch.cat([ours(part, cache=cache) for part in x.split([30, 1, 19], dim=1)], dim=1)
    torch.testing.assert_close(got, want, **CLOSE)


@torch.no_grad()
def test_half_precision():
    """Both round; both stay as near to the fp32 result as bf16 allows."""
    ours, theirs, rotary = make_pair(q_lora_rank=24)
    x = random(2, 19, SIZES["hidden_size"])
    want = ours(x)
    ours, theirs, x = ours.to(torch.bfloat16), theirs.to(torch.bfloat16), x.to(torch.bfloat16)
    their_error = theirs(x, rotary(x, torch.arange(19)[None]), causal_mask(19, 19))[0].float() - want
    error = ours(x).float() - want
    assert error.square().mean() <= 1.5 * their_error.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_the_same_to_the_bit(dtype):
    ours, theirs = RMSNorm(40).to(dtype), DeepseekV3RMSNorm(40).to(dtype)
    weight = random(40, seed=1).to(dtype)
    ours.load_state_dict({"weight": weight}, strict=True)
    theirs.load_state_dict({"weight": weight}, strict=True)
    x = random(5, 40).to(dtype)
    assert torch.equal(ours(x), theirs(x))

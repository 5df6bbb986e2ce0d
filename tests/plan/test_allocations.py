"""Predicted bytes and parameters against tensors that are really there."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mla.cache import LatentCache
from mla.convert import budget_for
from mla.errors import MLAError
from mla.integrations.transformers import absorb
from mla.plan import Question, get_hardware, load_shape, make_plan, read_shape
from tests.families import FAMILY_NAMES, VARIANTS, Variant, build, make_config, token_ids

CASES = [Variant(name, "base", {}) for name in FAMILY_NAMES]
CASES += [case for case in VARIANTS if case.label in ("odd-dims", "full", "no-sharing", "wide-rope")]


def planned(model, tokens, cache_format="fp32"):
    shape = read_shape(model.config.to_dict(), name="tiny", source="test")
    return make_plan(shape, get_hardware("h100"), Question(context=tokens, cache_format=cache_format))


def tensors(value):
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in tensors(inner)]
    return []


def held(cache):
    """Bytes of every tensor a cache holds, positions aside: they are no part of a latent."""
    found = [
        tensor
        for layer in cache.layers
        for name, value in vars(layer).items()
        if name != "indexer_position_ids"
        for tensor in tensors(value)
        if tensor.numel() > 1
    ]
    return sum(tensor.nbytes for tensor in found)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bytes_that_transformers_allocates(case):
    model = case.build()
    for tokens in (3, 24):
        cache = DynamicCache(config=model.config)
        model(token_ids(1, tokens), past_key_values=cache)
        assert planned(model, tokens)["sequence_bytes_mla"] == held(cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3", "deepseek_v32", "mistral_large4"])
def test_bytes_that_the_latent_cache_allocates(name):
    if name not in FAMILY_NAMES:
        pytest.skip(f"{name} is not in this Transformers")
    model = build(name)
    absorb(model)
    cache = LatentCache(model.config, capacity=24)
    model(token_ids(2, 24), past_key_values=cache)
    plan = planned(model, 24)
    assert 2 * plan["sequence_bytes_mla"] == cache.nbytes


def classic(kv, cls=LlamaForCausalLM, config=LlamaConfig, **more):
    torch.manual_seed(0)
    return cls(
        config(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv,
            head_dim=12,
            max_position_embeddings=128,
            **more,
        )
    )


@torch.no_grad()
@pytest.mark.parametrize(("kv", "kind"), [(4, "mha"), (2, "gqa"), (1, "mqa")])
@pytest.mark.parametrize(
    ("cls", "config"), [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)]
)
def test_models_without_latents(kv, kind, cls, config):
    model = classic(kv, cls, config)
    cache = DynamicCache(config=model.config)
    model(torch.arange(20)[None], past_key_values=cache)
    plan = planned(model, 20)
    assert plan.shape.kind == kind.upper()
    assert plan[f"sequence_bytes_{kind}"] == held(cache)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    assert plan[f"parameters_{kind}"] == parameters


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite"])
def test_parameters_of_mla_models(name):
    model = build(name)
    counted = sum(
        p.numel() for part, p in model.named_parameters() if "norm" not in part and not part.endswith("bias")
    )
    assert planned(model, 8)["parameters_mla"] == counted


@pytest.mark.parametrize("name", ["kimi_linear", "bailing_hybrid", "deepseek_v32"])
def test_parameters_of_hybrid_and_sparse_models(name):
    if name not in FAMILY_NAMES:
        pytest.skip(f"{name} is not in this Transformers")
    model = build(name)
    counted = sum(p.numel() for part, p in model.named_parameters() if p.ndim > 1)
    assert planned(model, 8)["parameters_mla"] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("asked", [{"cache": 0.5}, {"rank": 128}, {"rank": 20}], ids=str)
@pytest.mark.parametrize(
    ("kv", "width", "hidden"),
    [(8, 128, 4096), (3, 64, 576), (32, 64, 2048), (1, 128, 4096), (16, 256, 3072)],
    ids=["llama-3-8b", "smollm2", "mha", "mqa", "gemma-7b"],
)
def test_the_mla_column_is_what_the_converter_makes(kv, width, hidden, asked):
    config = LlamaConfig(hidden_size=hidden, num_attention_heads=kv, num_key_value_heads=kv, head_dim=width)
    made = budget_for(config, **{"cache": None, "rank": None, "rope": None, **asked})
    shape = read_shape(config.to_dict(), name="x", source="x", rank=asked.get("rank"))
    assert [(group["r"], group["p"]) for group in shape.groups] == [(made.rank, made.rope)]
    assert any(f"rank {made.rank}, rotary key {made.rope}" in note for note in shape.notes)


def test_a_rank_that_the_converter_refuses_is_no_column():
    with pytest.raises(MLAError, match=r"rank 2000 and rope 128 are 2128 numbers .* original's 2048"):
        load_shape("llama-3.1-8b", rank=2000)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_bare_config_json_means_the_class_defaults(name):
    config = type(make_config(name).get_text_config())()
    full = read_shape({**config.to_dict(), **_used(config)}, name="x", source="x")
    bare = read_shape({"model_type": config.model_type}, name="x", source="x")
    assert bare.groups == full.groups
    for key in ("linear_layers", "state_numbers", "conv_numbers"):
        assert bare.inputs[key] == full.inputs[key]


def _used(config):
    """DeepSeek-V2's class has experts and no default for how many of them a token visits."""
    return {"num_experts_per_tok": 6} if getattr(config, "num_experts_per_tok", 0) is None else {}

"""MLAConfig against the stock models of every family, and against real config.json files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig

from mla.config import MLAConfig, RopeConfig
from mla.errors import MLAError
from mla.families import FAMILIES as ROWS
from mla.formats import CACHE_FORMATS
from tests.families import FAMILY_NAMES, VARIANTS, Variant, make_config, token_ids

CASES = [Variant(name, "base", {}) for name in FAMILY_NAMES] + VARIANTS


def held_bytes(cache: DynamicCache) -> tuple[int, int]:
    """Bytes of latents and of indexer keys in a stock cache."""
    latents = indexers = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            latents += layer.keys.nbytes + layer.values.nbytes
        if getattr(layer, "indexer_keys", None) is not None:
            indexers += layer.indexer_keys.nbytes
    return latents, indexers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_agrees_with_the_stock_model(case: Variant) -> None:
    model = case.build()
    config = MLAConfig.from_transformers(model.config)
    layers = [module for module in model.modules() if hasattr(module, "expand_kv")]
    assert layers
    for module in layers:
        own = config.at_layer(module.layer_idx)
        assert own.softmax_scale == pytest.approx(module.scaling, rel=1e-12)
        assert own.num_attention_heads == module.num_heads
        assert own.q_lora_rank == getattr(module, "q_lora_rank", None)
        assert own.kv_lora_rank == module.kv_lora_rank
        assert own.qk_nope_head_dim == module.qk_nope_head_dim
        assert own.qk_rope_head_dim == module.qk_rope_head_dim
        assert own.v_head_dim == module.v_head_dim
        assert own.sliding_window == getattr(module, "sliding_window", None)
        assert own.attention_bias == (module.o_proj.bias is not None)
        if module.kv_a_layernorm is not None:
            assert own.rms_norm_eps == module.kv_a_layernorm.variance_epsilon
    storing = {m.layer_idx for m in layers if m.kv_a_proj_with_mqa is not None}
    assert set(config.mla_layers) == storing
    indexing = {m.layer_idx for m in layers if getattr(m, "indexer", None) is not None}
    assert set(config.indexer_layers) == indexing

    with torch.no_grad():
        for tokens in (1, 4, 24):
            cache = DynamicCache(config=model.config)
            model(token_ids(1, tokens), past_key_values=cache)
            latents, indexers = held_bytes(cache)
            assert config.cache_bytes(tokens, "fp32") == latents + indexers
            if tokens == 1:
                assert config.latent_bytes_per_token("fp32") == latents
                assert config.indexer_bytes_per_token("fp32") == indexers
                assert config.cache_bytes_per_token("fp32") == latents + indexers
                per_layer = [config.cache_bytes_per_token_and_layer("fp32", i) for i in range(len(cache))]
                assert sum(per_layer) == latents + indexers


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_bare_config_json_means_the_class_defaults(name: str) -> None:
    config = type(make_config(name).get_text_config())()
    full = MLAConfig.from_transformers(config)
    assert MLAConfig.from_dict({"model_type": config.model_type}) == full


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_saved_folder_reads_like_the_object(name: str, tmp_path: Path) -> None:
    config = make_config(name)
    config.save_pretrained(tmp_path)
    expected = MLAConfig.from_transformers(config)
    assert MLAConfig.from_pretrained(tmp_path) == expected
    assert MLAConfig.from_pretrained(tmp_path / "config.json") == expected


_LEGACY: list[tuple[str, dict[str, Any]]] = [
    ("kimi_linear", {"linear_attn_config": {"full_attn_layers": [2, 5], "kda_layers": [1, 3, 4, 6]}}),
    ("kimi_linear", {"model_max_length": 99, "rope_theta": 5.0}),
    ("glm_moe_dsa", {"index_topk_freq": 3, "index_skip_topk_offset": 1}),
    ("glm_moe_dsa", {"index_topk_pattern": "FSSFSF"}),
    ("glm5_next", {"layer_types": ["linear_attention"] * 3 + ["full_attention"] * 3, "index_topk_freq": 2}),
    ("bailing_hybrid", {"layer_group_size": 3, "rope_theta": 77.0}),
    ("longcat_flash", {"num_layers": 3}),
    ("mistral_large4", {"no_rope_layer_interval": 3, "kv_source_layers": [0, 1, 2, 0, 1, 2]}),
    ("mistral_large4", {"no_rope_layers": [1] * 6}),
    ("dots3_note", {"use_dsa": False, "swa_kv_lora_rank": 96, "swa_rope_theta": 9.0}),
    ("dots3_note", {"use_sliding_window": False}),
    ("dots3_note", {"sliding_window_size": 7, "swa_head_dim": 288, "swa_qk_nope_head_dim": 224}),
    ("dots3_note", {"layer_types": ["full_attention", "sliding_attention"] * 3}),
    ("minicpm3", {"v_head_dim": None, "hidden_size": 400}),
    ("deepseek_v2", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 123.0}),
    ("axk1", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_interleave": False}),
    ("mistral4", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("hy_v4", {"head_dim": 256, "rope_theta": 1e6}),
]


@pytest.mark.parametrize(("name", "keys"), _LEGACY, ids=lambda value: value if isinstance(value, str) else "")
def test_released_json_keys_mean_what_the_class_makes_of_them(name: str, keys: dict[str, Any]) -> None:
    if name not in FAMILY_NAMES:
        pytest.skip(f"{name} is not in this Transformers")
    text_class = type(make_config(name).get_text_config())
    layers = {} if "num_layers" in keys else {"num_hidden_layers": 6}
    raw = {**layers, **keys}
    expected = MLAConfig.from_transformers(text_class(**json.loads(json.dumps(raw))))
    assert MLAConfig.from_dict({"model_type": text_class.model_type, **raw}) == expected


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("glm_moe_dsa", {"indexer_types": ["full"] * 3, "layer_types": ["indexed_attention"] * 3}),
        ("glm_moe_dsa", {"index_topk_pattern": "FSF"}),
        ("glm5_next", {"layer_types": ["linear_attention"] + ["full_attention"] * 2}),
        ("dots3_note", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}),
        ("mistral_large4", {"kv_source_layers": [0, 0, 2], "no_rope_layers": [1, 1, 0]}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_lists_longer_than_the_model(name: str, lists: dict[str, Any]) -> None:
    raw = {"model_type": name, "num_hidden_layers": 2}
    cut = {key: entries[:2] for key, entries in lists.items()}
    assert MLAConfig.from_dict({**raw, **lists}) == MLAConfig.from_dict({**raw, **cut})


def test_plm() -> None:
    text = {**DEEPSEEK_V3, "model_type": "plm", "rope_scaling": None}
    del text["q_lora_rank"]
    config = MLAConfig.from_dict(text)
    assert config.q_lora_rank is None
    assert config.rope.layout == "interleaved"


def test_every_family_of_transformers_has_a_row() -> None:
    """A family is a model whose code has the seam that expands latents into keys and values."""
    code = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    families = {file.parent.name for file in code if "expand_kv" in file.read_text(encoding="utf-8")}
    assert families == set(FAMILY_NAMES)
    assert families <= set(ROWS)


DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "v_head_dim": 128,
}


def test_deepseek_v3() -> None:
    config = MLAConfig.from_dict(DEEPSEEK_V3)
    assert config.latent_dim == 576
    assert config.qk_head_dim == 192
    assert config.cache_bytes_per_token_and_layer() == 1152
    assert config.cache_bytes_per_token("bf16") == 1152 * 61
    assert config.cache_bytes_per_token("fp32") == 2304 * 61
    assert config.cache_bytes(1000) == 1152 * 61 * 1000
    assert config.rope.rope_type == "yarn"
    assert config.rope.layout == "interleaved"
    assert config.rope.attention_scaling() == 1.0
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_deepseek_v2_lite() -> None:
    text = {
        **DEEPSEEK_V3,
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "q_lora_rank": None,
        "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    }
    config = MLAConfig.from_dict(text)
    assert config.q_lora_rank is None
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


def test_minicpm3_with_longrope() -> None:
    text = {
        "model_type": "minicpm3",
        "hidden_size": 2560,
        "kv_lora_rank": 256,
        "max_position_embeddings": 32768,
        "num_attention_heads": 40,
        "num_hidden_layers": 62,
        "num_key_value_heads": 40,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0 + i / 10 for i in range(16)],
            "short_factor": [1.0 + i / 20 for i in range(16)],
            "original_max_position_embeddings": 32768,
        },
    }
    config = MLAConfig.from_dict(text)
    assert config.rope.layout == "half"
    assert config.v_head_dim == 64
    assert config.softmax_scale == pytest.approx(96**-0.5)
    assert config.rope.attention_scaling(config.max_position_embeddings) == 1.0
    assert config.cache_bytes_per_token_and_layer() == 2 * (256 + 32)


def test_moonlight() -> None:
    text = {**DEEPSEEK_V3, "num_hidden_layers": 27, "rope_scaling": None, "rope_theta": 50000.0}
    config = MLAConfig.from_dict(
        {**text, "q_lora_rank": None, "hidden_size": 2048, "num_attention_heads": 16}
    )
    assert config.rope == RopeConfig(layout="interleaved", theta=50000.0)
    assert config.softmax_scale == pytest.approx(192**-0.5)


def test_glm_4_7_flash() -> None:
    text = {
        "model_type": "glm4_moe_lite",
        "hidden_size": 2048,
        "kv_lora_rank": 512,
        "max_position_embeddings": 202752,
        "num_attention_heads": 20,
        "num_hidden_layers": 47,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "v_head_dim": 256,
    }
    config = MLAConfig.from_dict(text)
    assert config.rope == RopeConfig(layout="interleaved", theta=1e6)
    assert config.softmax_scale == pytest.approx(1 / 16)
    assert config.rms_norm_eps == 1e-6


def test_wrappers_and_aliases() -> None:
    inner = {**DEEPSEEK_V3, "model_type": "kimi_k2"}
    config = MLAConfig.from_dict({"model_type": "kimi_k25", "text_config": inner, "vision_config": {}})
    assert config.model_type == "kimi_k2"
    assert config.rope.layout == "interleaved"


def test_unknown_model_type_with_mla_keys() -> None:
    text = {**DEEPSEEK_V3, "model_type": "brand_new"}
    with pytest.raises(MLAError, match=r"'brand_new'.*rope_interleave"):
        MLAConfig.from_dict(text)
    assert MLAConfig.from_dict({**text, "rope_interleave": False}).rope.layout == "half"
    with pytest.raises(MLAError, match="index_head_dim"):
        MLAConfig.from_dict({**text, "rope_interleave": False, "index_head_dim": 128})


@pytest.mark.parametrize(("groups", "kind"), [(32, "MHA"), (8, "GQA"), (1, "MQA")], ids=["mha", "gqa", "mqa"])
def test_other_attention_is_named_and_told_what_to_do(groups: int, kind: str) -> None:
    with pytest.raises(
        MLAError, match=rf"'llama'.*{kind} \(32 query heads, {groups} .*mla convert MODEL OUT"
    ):
        MLAConfig.from_transformers(LlamaConfig(num_key_value_heads=groups))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": "512"}, "kv_lora_rank: expected an integer of at least 1, got '512'"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim: expected an even number, got 63"),
        ({"qk_head_dim": 128}, "qk_head_dim: expected .* 192, got 128"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "magic": 1}}, "unknown RoPE parameter magic"),
        ({"rope_scaling": {"type": "su"}}, "rope_type: expected one of .* got 'su'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "disagree"),
        ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.7}}, "partial_rotary_factor 0.7"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 61 entries, got 1"),
        ({"layer_types": ["linear_attention"] * 61}, "at least one layer with latents"),
        ({"layer_types": ["mamba"] * 61}, "layer_types: expected .* got mamba"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"model_type": "deepseek_v2", "rope_interleave": False}, "always uses 'interleaved'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLAError, match=message):
        MLAConfig.from_dict({**DEEPSEEK_V3, **change})


def test_bad_arguments() -> None:
    config = MLAConfig.from_dict(DEEPSEEK_V3)
    with pytest.raises(MLAError, match="cache format: expected one of fp32, fp16, bf16, int8, got 'int3'"):
        config.cache_bytes_per_token("int3")
    with pytest.raises(MLAError, match="layer: expected an index below 61, got 61"):
        config.at_layer(61)
    with pytest.raises(MLAError, match="layout"):
        RopeConfig(layout="sideways")
    with pytest.raises(MLAError, match="got dict"):
        MLAConfig.from_transformers({})
    assert set(CACHE_FORMATS) == {"fp32", "fp16", "bf16", "int8"}


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(MLAError, match="does not exist"):
        MLAConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(MLAError, match=r"has no config\.json"):
        MLAConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(MLAError, match="not readable JSON"):
        MLAConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MLAError, match="expected a JSON object, got list"):
        MLAConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3))
    assert MLAConfig.from_pretrained(str(tmp_path)).kv_lora_rank == 512


def test_offline_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    def refuse(*args: object) -> str:
        raise OfflineModeIsEnabled("offline mode is enabled\nmore text")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(MLAError, match=r"some/model is neither .* offline mode is enabled$"):
        MLAConfig.from_pretrained("some/model")


def test_level_0_needs_no_torch() -> None:
    code = "import sys, mla.config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]

"""Odd configurations, names and numbers: an answer or an MLAError that says what to do, never a traceback."""

import json

import pytest

from mla.config import MLAConfig
from mla.errors import MLAError
from mla.families import FAMILIES
from mla.plan import Question, get_hardware, known_models, load_shape, make_plan, read_shape
from mla.plan.report import sentences, table
from tests.plan.cases import plan

V3, V32 = known_models()["deepseek-v3"]["config"], known_models()["deepseek-v3.2"]["config"]
LLAMA = known_models()["llama-3.1-8b"]["config"]
YARN = V3["rope_scaling"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({**V3, "qk_nope_head_dim": None}, "qk_nope_head_dim: expected an integer of at least 0, got None"),
        ({**V3, "qk_rope_head_dim": "64"}, "qk_rope_head_dim: expected an integer of at least 0, got '64'"),
        ({**V32, "index_topk": None}, "index_topk: expected an integer of at least 1, got None"),
        (
            {**V3, "rope_scaling": {**YARN, "factor": "40"}},
            "RoPE factor: expected a number above 0, got '40'",
        ),
        ({**V3, "rope_scaling": {**YARN, "original_max_position_embeddings": "4k"}}, "expected a number"),
        ({**V3, "rope_theta": "big"}, "rope_theta: expected a number, got 'big'"),
        ({**V3, "layer_types": 5}, "layer_types: expected a list of names"),
        (
            {**LLAMA, "num_key_value_heads": "4"},
            "num_key_value_heads: expected an integer of at least 1, got '4'",
        ),
        ({**LLAMA, "vocab_size": "big"}, "vocab_size: expected an integer of at least 0, got 'big'"),
        (
            {**LLAMA, "hidden_size": 10**400},
            "hidden_size: expected an integer up to .* got one of 401 digits",
        ),
        ({**LLAMA, "max_position_embeddings": 1.5}, "max_position_embeddings: expected an integer"),
        ({**LLAMA, "head_dim": -1}, "head_dim: expected an integer of at least 0, got -1"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_configs(raw, message):
    with pytest.raises(MLAError, match=message):
        read_shape(raw, name="x", source="x")


ODD = (None, "4", "big", True, -1, 0, 1, 7, 1.5, [], [1], {}, {"a": 1}, 10**400, float("nan"))


def said(raw):
    """What refuses a config, None if it is planned."""
    try:
        read_shape(raw, name="x", source="x")
    except MLAError as error:
        return str(error)
    return None


#: Keys that families read beside the sizes of their class, as their classes have them.
INDEXERS = {
    "indexer_types": None,
    "index_topk_pattern": None,
    "index_topk_freq": 1,
    "index_skip_topk_offset": 2,
}
READ = {
    "longcat_flash": {"num_layers": 2},
    "mistral_large4": {
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "kv_source_layers": None,
        **INDEXERS,
    },
    "glm_moe_dsa": INDEXERS,
    "glm5_next": {"index_kpool": 16, **INDEXERS},
    "dots3_note": {"per_layer_config": {"0": {}}, "swa_qk_rope_head_dim": 64, "sliding_window_size": 512},
    "bailing_hybrid": {"linear_head_dim": 128},
    "hy_v4": {"indexer_types": None},
    "kimi_linear": {
        "linear_attn_config": known_models()["kimi-linear-48b-a3b"]["config"]["linear_attn_config"]
    },
}
CONFIGS = {
    name: {"head_dim": 128, "sliding_window": None, **known_models()[name]["config"]}
    for name in ("deepseek-v3.2", "kimi-linear-48b-a3b", "qwen3-30b-a3b", "plm-1.8b", "minicpm3-4b")
}
CONFIGS |= {
    name: {"model_type": name, **FAMILIES[name].defaults, "layer_types": None, **more}
    for name, more in READ.items()
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_with_every_odd_value(name):
    config = CONFIGS[name]
    assert said(config) is None
    nested = {key: value for key, value in config.items() if isinstance(value, dict)}
    places = [{**config, key: odd} for key in config for odd in ODD]
    places += [{**config, key: {**nested[key], k: odd}} for key in nested for k in nested[key] for odd in ODD]
    refused = [message for message in map(said, places) if message is not None]
    assert 0.3 < len(refused) / len(places) < 0.9


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("glm_moe_dsa", {"index_topk_freq": "4"}, "index_topk_freq: expected an integer of at least 0"),
        (
            "glm_moe_dsa",
            {"index_topk_pattern": 5},
            "index_topk_pattern: expected a list of at least 78, got '5'",
        ),
        ("glm_moe_dsa", {"index_topk_pattern": "FS"}, "index_topk_pattern: expected a list of at least 78"),
        ("glm_moe_dsa", {"indexer_types": ["none"] * 78}, "indexer_types: expected full .F. or shared .S."),
        ("longcat_flash", {"num_layers": "2"}, "num_layers: expected an integer of at least 1, got '2'"),
        (
            "kimi_linear",
            {"linear_attn_config": {"full_attn_layers": None, "kda_layers": None}},
            "full_attn_layers: ",
        ),
        (
            "mistral_large4",
            {"no_rope_layer_interval": 0},
            "no_rope_layer_interval: expected .* at least 1, got 0",
        ),
        ("mistral_large4", {"kv_source_layers": [0]}, "kv_source_layers: expected a list of at least 72"),
        ("mistral_large4", {"kv_source_layers": [1] * 72}, "kv_source_layers: layer 0 has to read its own"),
        ("dots3_note", {"per_layer_config": [1]}, "per_layer_config: expected an object, got .1."),
        (
            "bailing_hybrid",
            {"layer_group_size": 0},
            "layer_group_size: expected an integer of at least 1, got 0",
        ),
    ],
)
def test_odd_layers(name, change, message):
    with pytest.raises(MLAError, match=f"^{message}"):
        read_shape({**CONFIGS[name], **change}, name="x", source="x")


def test_null_is_as_if_the_key_were_not_there():
    for name, key in (("glm_moe_dsa", "index_topk_freq"), ("longcat_flash", "num_layers")):
        without = {k: v for k, v in CONFIGS[name].items() if k != key}
        shapes = [read_shape(raw, name="x", source="x") for raw in (without, {**without, key: None})]
        assert shapes[0] == shapes[1]


def test_a_deepseek_v2_without_latents():
    # language_config of deepseek-ai/DeepSeek-OCR.
    inner = {
        "model_type": "deepseek_v2", "use_mla": False, "kv_lora_rank": None, "q_lora_rank": None,
        "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0, "hidden_size": 1280,
        "num_attention_heads": 10, "num_key_value_heads": 10, "num_hidden_layers": 12, "vocab_size": 129280,
        "intermediate_size": 6848, "moe_intermediate_size": 896, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    for raw in ({"model_type": "DeepseekOCR", "language_config": inner}, inner):
        shape = read_shape(raw, name="x", source="x")
        answer = make_plan(shape, get_hardware("h100"), Question(context=64))
        assert (shape.kind, answer["token_bytes_mha"]) == ("MHA", 12 * 10 * 2 * 128 * 2)
        assert answer["parameters_mha"] == pytest.approx(2.9e9, rel=0.05)
        with pytest.raises(MLAError, match="not an MLA model: it has MHA"):
            MLAConfig.from_dict(raw)
    del inner["kv_lora_rank"]
    assert read_shape(inner, name="x", source="x").kind == "MHA"
    with pytest.raises(MLAError, match="not an MLA model"):
        MLAConfig.from_dict(inner)


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_experts", "num_experts_per_tok"])
def test_odd_mixtures_in_a_plan(key):
    config = known_models()["qwen3-30b-a3b"]["config"]
    odd = [{**config, key: value} for value in (0, 1, 2, 127, 129)]
    messages = [said(raw) for raw in odd]
    for raw in (raw for raw, message in zip(odd, messages, strict=True) if message is None):
        shape = read_shape(raw, name="x", source="x")
        answer = make_plan(shape, get_hardware("h100"), Question(context=64, batch=3))
        assert table(answer)
        assert sentences(answer)
    assert all("num_experts_per_tok" in message for message in messages if message)


@pytest.mark.parametrize("option", ["context", "batch", "query_tokens", "tensor_parallel"])
@pytest.mark.parametrize(("value", "message"), [(10**401, "up to .* got one of 402 digits"), (0, "got 0")])
def test_numbers_of_a_question(option, value, message):
    name = f"--{option.replace('_', '-')}: expected an integer"
    with pytest.raises(MLAError, match=f"{name} .*{message}"):
        plan("youtu", **{option: value})
    with pytest.raises(MLAError, match=f"--rank: expected an integer .*{message}"):
        plan("youtu", rank=value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "~nosuchuser/model",
            "'~nosuchuser/model': .*home directory.* expected a folder, a file or a Hub id",
        ),
        ("a" * 300, "aaa': File name too long; expected a folder"),
    ],
)
def test_names(name, message):
    with pytest.raises(MLAError, match=message) as caught:
        load_shape(name)
    assert len(str(caught.value)) < 200


def test_files_that_are_no_config(tmp_path):
    weights = tmp_path / "model.GGUF"
    weights.write_text(json.dumps(LLAMA))  # refused by its name alone: it is not looked into
    with pytest.raises(MLAError, match=r"model\.GGUF is no config\.json: give the folder or Hub id"):
        load_shape(str(weights))
    large = tmp_path / "config.json"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    for name in (large, tmp_path):
        with pytest.raises(MLAError, match=r"is no config\.json"):
            load_shape(str(name))
    large.write_text("[" * 100_000)
    with pytest.raises(MLAError, match="not readable JSON"):
        load_shape(str(large))

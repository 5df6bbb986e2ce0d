"""Kinds of layers where a config.json has no ``layer_types``: as Transformers derives them, or refused."""

import pytest
from transformers import DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mla.errors import MLAError
from mla.families import LAYER_PATTERNS
from mla.plan import Question, get_hardware, make_plan, read_shape
from mla.plan.layers import _READ, RULES
from mla.plan.shape import _CLASS_DEFAULTS
from mla.plan.weights import _FIRST_DENSE, parameters

BASE = {"hidden_size": 64, "num_hidden_layers": 13, "num_attention_heads": 4, "num_key_value_heads": 2}
BASE |= {"vocab_size": 99, "intermediate_size": 64, "head_dim": 16}
#: Every key that some rule reads, each with a value that is no class's default.
TOLD = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3, "sliding_window_pattern": 3}
TOLD |= {"full_attention_interval": 5, "global_attn_every_n_layers": 2, "attention_chunk_size": 16}
TOLD |= {"no_rope_layer_interval": 3}
LINEAR = {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_num_value_heads": 4}
LINEAR |= {"linear_value_head_dim": 8}


def shape(**raw):
    return read_shape({**BASE, **raw}, name="x", source="x")


def windows(found):
    """Layers by window, and how many linear ones."""
    groups = {int(group["window"]): int(group["layers"]) for group in found.groups}
    return groups, int(found.inputs["linear_layers"])


@pytest.mark.parametrize("told", [{}, TOLD], ids=["defaults", "told"])
@pytest.mark.parametrize("model_type", RULES)
def test_as_transformers_derives_them(model_type, told):
    told = {k: v for k, v in told.items() if k not in LAYER_PATTERNS or model_type in _READ.get(k, ())}
    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config() if hasattr(config, "text_config") else config
    theirs = DynamicCache(config=type(text)(num_hidden_layers=13, **told)).layers
    softmax = [layer for layer in theirs if "Linear" not in type(layer).__name__]
    sizes = [getattr(layer, "sliding_window", None) or 0 for layer in softmax]
    expected = {size: sizes.count(size) for size in sizes}, 13 - len(softmax)
    assert windows(shape(model_type=model_type, **LINEAR, **told)) == expected


@pytest.mark.parametrize(
    ("raw", "groups", "linear"),
    [
        (
            {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6},
            {0: 2, 512: 11},
            0,
        ),
        ({"model_type": "gemma2", "sliding_window": None}, {0: 13}, 0),
        ({"model_type": "llama4_text", "no_rope_layers": [1, 0] * 7}, {0: 6, 8192: 7}, 0),
        ({"model_type": "qwen3_next", "full_attention_interval": 4, **LINEAR}, {0: 3}, 10),
        ({"model_type": "qwen2", "sliding_window": 32}, {0: 13}, 0),
        ({"model_type": "llama"}, {0: 13}, 0),
        ({"model_type": "new", "sliding_window": 8, "use_sliding_window": False}, {0: 13}, 0),
        ({"model_type": "minimax_m2", "attn_type_list": [1] * 13}, {0: 13}, 0),
        ({"layer_types": ["attention"] * 13}, {0: 13}, 0),
    ],
)
def test_by_hand(raw, groups, linear):
    assert windows(shape(**raw)) == (groups, linear)


def test_windows_and_states_in_the_cache():
    gemma = shape(model_type="gemma3_text", sliding_window=512)
    answer = make_plan(gemma, get_hardware("h100"), Question(context=10000))
    assert answer["sequence_bytes_gqa"] == (2 * 10000 + 11 * 511) * 2 * 2 * 16 * 2
    llama4 = shape(model_type="llama4_text")
    assert any("Chunks of 8,192 tokens" in note for note in llama4.notes)


@pytest.mark.parametrize(
    "strange",
    [
        {"attn_layer_period": 8},
        {"hybrid_override_pattern": "M-M*"},
        {"layers_block_type": ["mamba", "attention"], "num_hidden_layers": None},
        {"attn_type_list": [0] * 12 + [1]},
        {"block_configs": [{}]},
        {"compress_ratios": [4, 128]},
        {"attention_chunk_size": 8192},
        {"num_kv_shared_layers": 2},
        {"full_attention_interval": 4},
        {"sliding_window_pattern": 6},
        {"global_head_dim": 512},
        {"swa_num_key_value_heads": 8},
        {"sparse_attention_config": {"block": 1}},
        {"v_head_dim": 8},
        {"sliding_window": 128},
        {"attn_layer_indices": [9]},  # Bamba
        {"_block_types": ["recurrent", "attention"]},  # RecurrentGemma
        {"layer_group_size": 5},  # Ring-linear
        {"cross_attention_layers": [3]},  # Llama 3.2 Vision
        {"use_cla": True},  # Hunyuan-Large
        {"mamba_d_ssm": 64},  # Falcon-H1
    ],
    ids=lambda strange: next(iter(strange)),
)
def test_patterns_that_no_rule_knows_are_refused(strange):
    key = next(iter(strange))
    with pytest.raises(MLAError, match=f"^{key}: "):
        shape(model_type="new", **strange)
    without = {**dict.fromkeys(strange, None), "num_hidden_layers": 13}
    assert windows(shape(model_type="new", **without)) == ({0: 13}, 0)


def test_windows_without_a_size_are_refused():
    with pytest.raises(MLAError, match="expected sliding_window in tokens"):
        shape(model_type="new", layer_types=["sliding_attention"] * 13)
    with pytest.raises(MLAError, match="sliding_window: expected at least 2 tokens, got 1"):
        shape(model_type="mistral", sliding_window=1)


@pytest.mark.parametrize(
    ("raw", "kind", "groups"),
    [
        ({"num_key_value_heads": None}, "MHA", 4),
        ({"num_key_value_heads": None, "multi_query": True}, "MQA", 1),
        ({"model_type": "gpt_bigcode", "num_key_value_heads": None}, "MQA", 1),
        ({"model_type": "falcon", "num_key_value_heads": None}, "MQA", 1),
        ({"model_type": "falcon", "num_key_value_heads": None, "num_kv_heads": 2}, "MQA", 1),
        (
            {"model_type": "falcon", "num_key_value_heads": None, "num_kv_heads": 2}
            | {"new_decoder_architecture": True, "multi_query": True},
            "GQA",
            2,
        ),
        ({"model_type": "falcon", "num_key_value_heads": None, "multi_query": False}, "MHA", 4),
    ],
)
def test_key_value_heads(raw, kind, groups):
    found = shape(**raw)
    assert (found.kind, found.groups[0]["own_groups"]) == (kind, groups)
    answer = make_plan(found, get_hardware("h100"), Question(context=10))
    assert answer[f"token_bytes_{kind.lower()}"] == 13 * groups * 32 * 2


@pytest.mark.parametrize("model_type", sorted({*RULES, *_CLASS_DEFAULTS} & {*CONFIG_MAPPING}))
def test_heads_are_as_wide_as_the_class_makes_them(model_type):
    config = CONFIG_MAPPING[model_type]().get_text_config()
    width = (
        type(config)(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).to_dict().get("head_dim")
    )
    raw = {name: value for name, value in BASE.items() if name != "head_dim"}
    raw |= {"model_type": model_type, "layer_types": ["full_attention"] * 13}
    found = read_shape(raw, name="x", source="x")
    assert {group["w"] for group in found.groups} == {width or 64 // 4}


@pytest.mark.parametrize(
    ("alone", "wrapped"), [("glm5_next", "glm5_next_text"), ("dots3_note", "dots3_note_text")]
)
def test_a_wrapper_has_as_many_dense_layers(alone, wrapped):
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    for first in ({}, {"first_k_dense_replace": 2}):
        both = [
            parameters({**BASE, **experts, **first, "model_type": name}, layers=13, notes=[])
            for name in (alone, wrapped)
        ]
        assert both[0] == both[1]
    assert _FIRST_DENSE[alone] > 0


def test_ranks_keep_their_proportion():
    raw = {"model_type": "dots3_note", "num_hidden_layers": 8, "vocab_size": 1000}
    usual, half = (read_shape(raw, name="x", source="x", rank=rank) for rank in (None, 256))
    assert {group["r"] for group in usual.groups} == {512, 1024}
    assert [group["r"] * 2 for group in half.groups] == [group["r"] for group in usual.groups]

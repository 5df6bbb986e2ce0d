"""Parameters outside of attention in every spelling, and the formats in which they are stored."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mla.errors import MLAError
from mla.plan import WEIGHT_BYTES, Question, get_hardware, known_models, make_plan, read_shape
from mla.plan.page import page
from mla.plan.report import assumptions
from mla.plan.weights import TIED_BY_DEFAULT

LLAMA = known_models()["llama-3.1-8b"]["config"]


def total(raw, which="parameters"):
    found = read_shape(raw, name="x", source="x")
    question = Question(context=16, batch=2, weight_format="bf16")
    return make_plan(found, get_hardware("h100"), question)[f"{which}_{found.kind.lower()}"]


def llama4(experts, step):
    return {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 48, "head_dim": 128,
            "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 8192,
            "intermediate_size_mlp": 16384, "interleave_moe_layer_step": step, "num_local_experts": experts,
            "num_experts_per_tok": 1, "vocab_size": 202048, "attention_chunk_size": 8192,
        },
    }  # fmt: skip


HUNYUAN_A13B = {
    "model_type": "hunyuan_v1_moe", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "moe_topk": [8] * 32,
    "moe_intermediate_size": [3072] * 32, "num_experts": 64, "num_shared_expert": [1] * 32,
    "vocab_size": 128167, "tie_word_embeddings": True,
}  # fmt: skip
ERNIE_21B = {
    "model_type": "ernie4_5_moe", "hidden_size": 2560, "num_hidden_layers": 28, "num_attention_heads": 20,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_k": 6, "moe_layer_start_index": 1,
    "moe_layer_interval": 1, "moe_layer_end_index": -1, "vocab_size": 103424,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "published", "active"),
    [
        (llama4(128, 2), 400e9, 17e9),
        (llama4(16, 1), 109e9, 17e9),  # 0.9 of it a vision encoder, which is not counted
        (HUNYUAN_A13B, 80e9, 13e9),
        (ERNIE_21B, 21.8e9, 3e9),
    ],
    ids=["maverick", "scout", "hunyuan-a13b", "ernie-21b"],
)
def test_published_mixtures(raw, published, active):
    assert total(raw) == pytest.approx(published, rel=0.015)
    assert total(raw, "active_parameters") == pytest.approx(active, rel=0.12)


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 16}
WIDE = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
ERNIE = {**WIDE, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2}
HYBRID = {**WIDE, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_conv_kernel_dim": 2}
HYBRID |= {"linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_num_value_heads": 4}
HYBRID |= {"linear_value_head_dim": 8}
LLAMA4 = {**WIDE, "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("starcoder2", {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}),
        ("gpt_bigcode", GPT2),
        ("falcon", SMALL),
        ("falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80}),
        ("falcon", {**SMALL, "multi_query": False}),
        ("apertus", WIDE),
        ("ernie4_5_moe", {**ERNIE, "moe_layer_interval": 2}),
        ("ernie4_5_moe", {**ERNIE, "moe_layer_start_index": 2}),
        ("ernie4_5_moe", {**ERNIE, "moe_layer_end_index": 2}),
        (
            "hunyuan_v1_moe",
            {**WIDE, "num_experts": 4, "moe_topk": [2] * 4, "moe_intermediate_size": [48] * 4},
        ),
        ("llama4_text", {**LLAMA4, "moe_layers": [1, 2, 3]}),
        ("llama4_text", {**LLAMA4, "moe_layers": [1, 3, 99]}),
        ("qwen3_5_text", HYBRID),
        ("llama4_text", {**LLAMA4, "interleave_moe_layer_step": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parameters_that_transformers_builds(model_type, options):
    config = CONFIG_MAPPING[model_type](**options, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    skipped = re.compile(
        "norm|ln_|wpe|bias|alpha|A_log"
    )  # wpe: GPT-2's positions, which the planner does not count
    counted = sum(p.numel() for name, p in model.named_parameters() if not skipped.search(name))
    saved, written = config.to_dict(), {"model_type": model_type, **options}
    assert total(saved) == total(written) == counted


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [
        ({"tie_word_embeddings": True}, {}, 1),
        ({}, {}, 0),
        ({"tie_word_embeddings": False}, {"model_type": "gemma3_text"}, 0),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, 0),
    ],
)
def test_whether_embeddings_are_tied_may_stand_outside(outer, inner, tied):
    told = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    found = read_shape({"model_type": "x", **outer, "text_config": {**told, **inner}}, name="x", source="x")
    assert found.inputs["tied"] == tied


def test_families_that_tie_by_default():
    for model_type in sorted(TIED_BY_DEFAULT - {"minicpm3", "youtu"}):
        assert CONFIG_MAPPING[model_type]().tie_word_embeddings is True, model_type


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"intermediate_size": [1024] * 16 + [2048] * 16},
            "intermediate_size: expected one number, or the same 32",
        ),
        ({"intermediate_size": [1024] * 3}, "intermediate_size: expected one number, or the same 32"),
        (
            {"num_experts": 8, "num_experts_per_tok": 9},
            "num_experts_per_tok: expected at most the 8 experts, got 9",
        ),
        ({"num_experts": 8, "num_experts_per_tok": 2, "moe_latent_size": 64}, "moe_latent_size: the planner"),
        (
            {"num_experts": 8, "num_experts_per_tok": 2, "mlp_layer_types": 5},
            "mlp_layer_types: expected a list",
        ),
    ],
)
def test_mixtures_that_cannot_be_counted(change, message):
    with pytest.raises(MLAError, match=message):
        total({**LLAMA, **change})


def grouped(*weights):
    return {"config_groups": {f"group_{i}": {"weights": each} for i, each in enumerate(weights)}}


INT4 = {"num_bits": 4, "type": "int", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": "float16", "torch_dtype": None}, "fp16"),
        ({"torch_dtype": "float32"}, "fp32"),
        ({"torch_dtype": None}, "bf16"),
        ({"torch_dtype": "float8_e4m3fn"}, "fp8"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "int4"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "int8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "int4"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "int8"),
        ({"quantization_config": {"quant_method": "compressed-tensors", **grouped(INT4, INT4)}}, "int4"),
        ({"quantization_config": {"quant_method": "compressed-tensors", **grouped(FP8)}}, "fp8"),
        ({"quantization_config": grouped({**INT4, "type": "float", "group_size": 16})}, "nvfp4"),
        ({"quantization_config": grouped({**INT4, "type": "float"})}, "mxfp4"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "nvfp4"),
        ({"quantization_config": {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}}, "fp8"),
        ({"quantization_config": {"quant_method": "quanto", "weights": "int8"}}, "int8"),
    ],
)
def test_formats_of_checkpoints(change, expected):
    found = read_shape({**LLAMA, **change}, name="x", source="x")
    assert found.weight_format == expected
    answer = make_plan(found, get_hardware("h100"), Question(context=16))
    assert answer["weight_bytes"] == WEIGHT_BYTES[expected]


GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 32,
    "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128, "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}  # fmt: skip
ALONE = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    "left_out",
    [
        {"modules_to_not_convert": ALONE},
        {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"]},
        {"quantization": {"exclude_modules": [f"model.layers.{i}.self_attn*" for i in range(24)]}},
        {"ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(24)]},
    ],
    ids=lambda left_out: next(iter(left_out)),
)
def test_experts_in_a_format_of_their_own(left_out):
    found = read_shape(
        {**GPT_OSS_20B, "quantization_config": {"quant_method": "mxfp4", **left_out}}, name="x", source="x"
    )
    assert (found.weight_format, found.other_format) == ("mxfp4", "bf16")
    assert not any("unquantised" in note for note in found.notes)
    answer = make_plan(found, get_hardware("h100"), Question(context=16))
    experts = 24 * 32 * 3 * 2880 * 2880
    others = answer["parameters_gqa"] - experts
    assert answer["weights_device_gqa"] == experts * 0.53125 + others * 2 == pytest.approx(13.75e9, rel=2e-3)
    read = experts * 4 / 32 * 0.53125 + (others - 201088 * 2880) * 2
    assert answer["weights_moved_gqa"] == answer["weights_moved_device_gqa"] == pytest.approx(read)
    split = make_plan(found, get_hardware("h100"), Question(context=16, tensor_parallel=8))
    assert split["weights_device_gqa"] == answer["weights_device_gqa"] / 8
    assert "in bf16 with experts in mxfp4, cache" in assumptions(answer)
    assert "in bf16 with experts in mxfp4, cache" in page(answer)
    same = make_plan(found, get_hardware("h100"), Question(context=16, weight_format="mxfp4"))
    assert same["weights_device_gqa"] == same["parameters_gqa"] * 0.53125


@pytest.mark.parametrize(
    ("raw", "left_out", "said"),
    [
        (LLAMA, ["lm_head"], "lm_head"),
        (LLAMA, ALONE, "embed, lm_head, self_attn"),
        (GPT_OSS_20B, ["model.layers.0.self_attn", "re:.*shared_experts.*"], "self_attn, shared_experts"),
        (GPT_OSS_20B, ["model.layers.0.post_attention_layernorm", "mlp.gate", "vision_tower.attn"], None),
        (LLAMA, "lm_head", None),
        (LLAMA, [5, None], None),
    ],
)
def test_what_is_not_quantised_is_noted(raw, left_out, said):
    stated = {"quant_method": "fp8", "modules_to_not_convert": left_out}
    found = read_shape({**raw, "quantization_config": stated}, name="x", source="x")
    assert found.weight_format == found.other_format == "fp8"
    notes = [note for note in found.notes if "unquantised" in note]
    assert [f"({said})" in note for note in notes] == ([True] if said else [])


def test_the_dtype_beside_a_text_config():
    wrapper = {"dtype": "float16", "text_config": {**LLAMA, "torch_dtype": None}}
    assert read_shape(wrapper, name="x", source="x").weight_format == "fp16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quant_method 'gptq', bits 3"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quant_method 'torchao'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", **grouped(INT4, FP8)}},
            "compressed-tensors",
        ),
        ({"quantization_config": grouped({"num_bits": [4], "type": None})}, "without quant_method"),
        ({"quantization_config": {"quant_algo": "MIXED_PRECISION"}}, "MIXED_PRECISION"),
        ({"quantization_config": "int3"}, "int3"),
        ({"torch_dtype": "auto"}, "dtype 'auto'"),
    ],
)
def test_unknown_formats_are_asked_for(change, said):
    found = read_shape({**LLAMA, **change}, name="x", source="x")
    with pytest.raises(MLAError, match=f"--weight-format: expected one of fp32, .* config.json has .*{said}"):
        make_plan(found, get_hardware("h100"), Question(context=16))
    answer = make_plan(found, get_hardware("h100"), Question(context=16, weight_format="int4"))
    assert answer["weight_bytes"] == 0.5625

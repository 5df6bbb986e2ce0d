"""Names, folders, hybrid and sparse models, refusals."""

import json
import re
import subprocess
import sys

import pytest

from mla.errors import MLAError
from mla.plan import (
    Question,
    all_hardware,
    get_hardware,
    known_models,
    load_shape,
    make_plan,
    read_shape,
)
from mla.plan.known import known_hardware
from mla.plan.weight_format import WEIGHT_BYTES
from tests.plan.cases import plan


@pytest.mark.parametrize(
    "name",
    ["deepseek-v3", "DeepSeek V3", "deepseek_v3", "deepseek-ai/DeepSeek-V3", "DeepSeek-R1", "DEEPSEEKV3"],
)
def test_forgiving_names(name):
    assert load_shape(name).name == "DeepSeek-V3"


def test_every_known_model_plans_on_every_machine():
    for name in known_models():
        shape = load_shape(name)
        assert re.search(r" of [\w.-]+/[\w.-]+", shape.source), "a source names the repository"
        assert shape.weight_format in WEIGHT_BYTES
        for key, row in known_hardware().items():
            assert row["source"]
            answer = plan(name, key, context=min(1024, shape.max_context))
            assert 0 < answer["step_time_mla"] < float("inf")
            assert answer["tokens_per_second_mla"] > 0
            assert answer["sequence_bytes_mla"] > 0


@pytest.mark.parametrize(("name", "near"), [("deepsek-v3", "deepseek-v3"), ("lama-3.1-8b", "llama-3.1-8b")])
def test_unknown_models_get_the_nearest_names(name, near):
    with pytest.raises(MLAError, match=f"unknown model '{name}'; nearest: {near}"):
        load_shape(name)


def test_unknown_hardware():
    with pytest.raises(MLAError, match="unknown hardware 'h10'; nearest: h100"):
        get_hardware("h10")
    with pytest.raises(MLAError, match="known: h100, h200"):
        get_hardware("zzzzzzzz")


def test_a_folder_and_a_file(tmp_path):
    config = known_models()["deepseek-v3"]["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "other.json").write_text(json.dumps(config))
    for path, name in (("", tmp_path.name), ("config.json", tmp_path.name), ("other.json", "other")):
        shape = load_shape(str(tmp_path / path))
        assert shape.groups == load_shape("deepseek-v3").groups
        assert shape.name == name
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(MLAError, match="not readable JSON"):
        load_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MLAError, match="expected a JSON object, got list"):
        load_shape(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MLAError, match=r"has no config\.json"):
        load_shape(str(tmp_path / "empty"))


def test_hybrid_layers_keep_a_state_of_fixed_size():
    short, long = plan("kimi-linear", context=100), plan("kimi-linear", context=200)
    assert short.shape.groups[0]["layers"] == 7
    state = 20 * (32 * 128 * 128 * 4 + 3 * 32 * 128 * 4 * 2)
    assert short["state_bytes_all"] == state
    assert short["sequence_bytes_mla"] == 100 * 7 * 576 * 2 + state
    assert long["sequence_bytes_mla"] - short["sequence_bytes_mla"] == 100 * 7 * 576 * 2
    assert short["linear_ops"] == 20 * 6 * 32 * 128 * 128


def test_sparse_indexers():
    sparse, dense = plan("deepseek-v3.2", context=65536), plan("deepseek-v3", context=65536)
    assert sparse["token_bytes_mla"] == 61 * (576 + 128) * 2
    assert sparse["attended"] == 2048
    assert sparse["attend_ops_mla"] == 128 * (2 * 1088 * 2048 + 262144)
    assert sparse["index_ops"] == 61 * 65536 * 2 * 64 * 128
    assert sparse["cache_moved_mla"] == 61 * (2048 * 1152 + 65536 * 256)
    assert sparse["attention_ops_mla"] < dense["attention_ops_mla"] / 5
    assert plan("deepseek-v3.2", context=1000)["attended"] == 1000


def test_mtp_layers_are_counted_apart():
    v3 = plan("deepseek-v3")
    assert v3["mtp_bytes"] == 1152
    assert v3["token_bytes_mla"] == 61 * 1152
    assert plan("kimi-k2")["mtp_bytes"] == 0
    sparse = plan("deepseek-v3.2")  # with an indexer of its own
    assert sparse["mtp_bytes"] == 1152 + 128 * 2 == sparse["token_bytes_mla"] / 61


def test_windows():
    raw = {**known_models()["mistral-7b"]["config"], "sliding_window": 512}
    shape = read_shape(raw, name="x", source="x")
    assert shape.groups[0]["window"] == 512
    answer = make_plan(shape, get_hardware("h100"), Question(context=10000))
    assert answer["sequence_bytes_gqa"] == 511 * 32 * 2048 * 2
    assert answer["attended"] == 512


def test_qwen3_next_is_a_hybrid_too():
    raw = {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 1000, "intermediate_size": 512,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "linear_num_key_heads": 16,
        "linear_key_head_dim": 128, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    shape = read_shape(raw, name="x", source="x")
    assert shape.inputs["linear_layers"] == 3
    assert shape.inputs["state_numbers"] == 32 * 128 * 128
    del raw["linear_num_value_heads"]
    with pytest.raises(MLAError, match="3 linear-attention layers whose state"):
        read_shape(raw, name="x", source="x")


#: config.json of THUDM/glm-4-9b-chat, without what the planner need not read.
GLM4_9B = {
    "model_type": "chatglm", "hidden_size": 4096, "num_layers": 40, "num_attention_heads": 32,
    "ffn_hidden_size": 13696, "kv_channels": 128, "multi_query_attention": True, "multi_query_group_num": 2,
    "padded_vocab_size": 151552, "seq_length": 131072, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"num_hidden_layers": 40, "vocab_size": 151552}], ids=["bare", "both"])
def test_chatglm_names_groups_of_its_own(more):
    shape = read_shape({**GLM4_9B, **more}, name="x", source="x")
    answer = make_plan(shape, get_hardware("h100"), Question(context=1000))
    assert (shape.kind, shape.max_context) == ("GQA", 131072)
    assert answer["token_bytes_gqa"] == 40 * 2 * 2 * 128 * 2
    assert answer["parameters_gqa"] == pytest.approx(9.4e9, rel=1e-3)
    plain = read_shape({**GLM4_9B, "multi_query_attention": False}, name="x", source="x")
    assert plain.kind == "MHA"


@pytest.mark.parametrize("key", ["multi_query_group_num", "num_query_groups", "n_kv_heads", "kv_n_heads"])
def test_group_keys_that_no_rule_reads_are_no_mha(key):
    raw = {**known_models()["llama-3.1-8b"]["config"], "num_key_value_heads": None, key: 4}
    with pytest.raises(MLAError, match=f"{key}: .* add num_key_value_heads"):
        read_shape(raw, name="x", source="x")


def test_the_longest_context_is_told_or_not_known():
    bare = {
        k: v for k, v in known_models()["llama-3.1-8b"]["config"].items() if k != "max_position_embeddings"
    }
    latent = {k: v for k, v in known_models()["plm-1.8b"]["config"].items() if k != "max_position_embeddings"}
    for raw, longest in (
        ({**bare, "model_type": "gemma3_text"}, 131072),
        ({**bare, "model_type": "falcon"}, 2048),
        (bare, None),
        ({**bare, "max_position_embeddings": 8192}, 8192),
        (latent, None),
        ({**latent, "model_type": "deepseek_v3"}, 4096),
    ):
        assert read_shape(raw, name="x", source="x").max_context == longest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads: expected an integer"),
        ({"num_key_value_heads": 5}, "expected a divisor of 32 heads, got 5"),
        ({"layer_types": ["mamba"] * 32}, "layer_types: expected 32 of"),
        ({"num_experts": 8}, "no num_experts_per_tok"),
    ],
)
def test_configs_that_cannot_be_counted(change, message):
    with pytest.raises(MLAError, match=message):
        read_shape({**known_models()["llama-3.1-8b"]["config"], **change}, name="x", source="x")


def test_memory_is_what_drivers_report_or_binary():
    assert get_hardware("h100").memory == 81_559 * 2**20
    assert get_hardware("macbook-air-m3").memory == 16 * 2**30
    for hardware in all_hardware():
        assert hardware.memory % 2**20 == 0, f"{hardware.name}: decimal gigabytes are no memory's size"


def test_a_machine_without_memory_is_not_measured(monkeypatch):
    """A thread that finds none must not leave the others waiting for it."""

    def none(size):
        raise MemoryError

    monkeypatch.setattr("mla.plan.hardware.bytearray", none, raising=False)
    with pytest.raises(MLAError, match="this machine cannot be measured: no memory for"):
        get_hardware("this machine")
    monkeypatch.undo()
    monkeypatch.setattr("mla.plan.hardware.free_memory", lambda: 0)
    assert get_hardware("this machine").bandwidth > 0


def test_this_machine_is_measured(monkeypatch):
    monkeypatch.setattr("mla.plan.hardware._MEBIBYTES", 4)
    here = get_hardware("this machine")
    assert here.memory > 1e8
    assert 1e8 < here.bandwidth < 1e13
    assert here.peak("fp32") > 1e8
    assert "measured" in here.source
    assert "estimated" in here.source
    assert "threads copied 4 MiB" in here.note


def test_peaks_fall_back_to_what_the_machine_has():
    machines = {hardware.name: hardware for hardware in all_hardware()}
    intel = next(hardware for name, hardware in machines.items() if "155H" in name)
    assert intel.peak("bf16") == intel.peak("fp32")
    h100 = next(hardware for name, hardware in machines.items() if "H100" in name)
    assert h100.peak("fp8") == 2 * h100.peak("bf16")
    assert h100.peak("int4") == h100.peak("bf16")


def test_planning_needs_no_torch():
    code = (
        "import sys\nfrom mla.plan import *\nimport mla.plan.page, mla.plan.report\n"
        "answer = make_plan(load_shape('deepseek-v3'), get_hardware('h100'), Question(context=99))\n"
        "mla.plan.page.page(answer)\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

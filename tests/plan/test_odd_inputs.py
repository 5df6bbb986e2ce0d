"""Odd configurations, names and numbers: an answer or an MLAError that says what to do, never a traceback."""

import json

import pytest

from mla.errors import MLAError
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


@pytest.mark.parametrize(
    "name", ["deepseek-v3.2", "kimi-linear-48b-a3b", "qwen3-30b-a3b", "plm-1.8b", "minicpm3-4b"]
)
def test_every_key_with_every_odd_value(name):
    config = {"head_dim": 128, "sliding_window": None, **known_models()[name]["config"]}
    answers = {(key, str(odd)): said({**config, key: odd}) for key in config for odd in ODD}
    refused = [message for message in answers.values() if message is not None]
    assert 0.3 < len(refused) / len(answers) < 0.9


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

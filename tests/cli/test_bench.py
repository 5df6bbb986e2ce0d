"""``mla bench``: what it times is right first, and every figure is of what it says."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mla import absorb
from mla.errors import MLAError
from mla.integrations import speed
from mla.integrations import transformers as integration
from mla.integrations.speed import measure_speed
from tests.families import build


def test_both_ways_at_every_context(mla, mla_folder):
    options = ("--context", 40, "--context", 300, "--tokens", 3, "--stock", "--cache-format", "int8")
    run = mla("bench", mla_folder, *options, "--json")
    found = json.loads(run.out)
    assert (found["dtype"], found["cache_format"], found["threads"]) == ("float32", "int8", 1)
    assert [(each["way"], each["context"]) for each in found["speeds"]] == [
        ("absorbed", 40),
        ("stock", 40),
        ("absorbed", 300),
        ("stock", 300),
    ]
    assert all(each["prefill"] > 0 < each["decode"] for each in found["speeds"])
    config = json.loads((mla_folder / "config.json").read_text())
    r, p, layers = config["kv_lora_rank"], config["qk_rope_head_dim"], config["num_hidden_layers"]
    bytes_of = {each["way"]: each["cache_bytes_per_token"] for each in found["speeds"]}
    assert bytes_of == {"absorbed": layers * (r + 4 + 2 * p), "stock": layers * 4 * (r + p)}


def test_the_table_and_the_default_contexts(mla, mla_folder):
    run = mla("bench", mla_folder, "--tokens", 2)  # of 512 positions
    assert run.status == 0
    assert "510" in run.out
    assert "stock" not in run.out
    assert "answers compared with Transformers' first" in run.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", 1), "--tokens: expected at least 2, got 1"),
        (("--context", 500), "--context: expected 1 to 496 beside 16 tokens to write, got [500]"),
        (("--cache-format", "fp3"), "fp3"),
    ],
)
def test_mistakes(mla, mla_folder, options, words):
    run = mla("bench", mla_folder, *options)
    assert (run.status, words in run.err) == (2, True)


def test_no_figure_without_the_right_answers(mla, mla_folder, monkeypatch):
    honest = integration.up_projections
    monkeypatch.setattr(
        integration, "up_projections", lambda weight, h, n: [1.01 * each for each in honest(weight, h, n)]
    )
    run = mla("bench", mla_folder)
    assert (run.status, run.out) == (2, "")
    assert "absorbed, the model does not give its own answers: model.layers.0.self_attn differs by" in run.err


def test_stock_is_stock_also_of_an_absorbed_model(mla_folder, monkeypatch):
    model, ran = absorb(AutoModelForCausalLM.from_pretrained(mla_folder)), []
    timed = speed._time
    monkeypatch.setattr(
        speed, "_time", lambda *given: ran.append((given[3], integration.is_absorbed(model))) or timed(*given)
    )
    measure_speed(model, [20], cache_format="fp32", tokens=2, ways=("stock", "absorbed"))
    assert ran == [("stock", False), ("absorbed", True)]
    assert not integration.is_absorbed(model)


def test_a_cache_that_does_not_fit_is_refused_before_anything_is_timed(mla_folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(mla_folder)
    monkeypatch.setattr("mla.integrations.loading.free_memory", lambda: 10**5)
    monkeypatch.setattr(speed, "_time", lambda *given: pytest.fail("timed"))
    with pytest.raises(MLAError, match="a cache of 502 tokens"):
        measure_speed(model, [20, 500], cache_format="fp32", tokens=2)


def test_the_model_is_left_as_it_was(mla_folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(mla_folder)
    measure_speed(model, [20], cache_format="fp32", tokens=2, ways=("stock", "absorbed"))
    assert not integration.is_absorbed(model)
    read = []
    monkeypatch.setattr(speed, "read_prompt", lambda model, tokens, cache, check: read.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_speed(model, [20], cache_format="fp32", tokens=2)
    assert read
    assert not integration.is_absorbed(model)
    assert torch.is_grad_enabled()


def test_a_sparse_indexers_keys_are_bytes_of_either_way():
    stock, absorbed = measure_speed(
        build("deepseek_v32"), [40], cache_format="fp32", tokens=2, ways=("stock", "absorbed")
    )
    assert stock.cache_bytes_per_token == absorbed.cache_bytes_per_token

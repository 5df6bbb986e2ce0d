"""The verbs on a tiny model: right answers on standard output, notes for people on standard error."""

import io
import json
import math
import signal
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla.cli.session import Sampling, Session
from mla.integrations import transformers as integration


@torch.no_grad()
def test_generate_writes_what_transformers_writes(mla, mla_folder):
    tokenizer = AutoTokenizer.from_pretrained(mla_folder)
    model = AutoModelForCausalLM.from_pretrained(mla_folder)
    ids = tokenizer("Once upon", return_tensors="pt")["input_ids"]
    want = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    run = mla("generate", mla_folder, "Once upon", "--raw", "--max-new-tokens", 12)
    assert run.status == 0
    assert run.out == want + "\n"
    assert "cache bytes per token" in run.err


def test_generate_json(mla, mla_folder):
    run = mla("generate", mla_folder, "Hi", "--json", "--max-new-tokens", 5)
    answer = json.loads(run.out)
    assert answer["new_tokens"] == 5
    assert answer["prompt_tokens"] == len("user: Hi\nassistant: ")
    assert answer["cache_bytes_per_token"] == 3 * (32 + 8) * 4
    assert answer["cache_bytes"] == answer["cache_bytes_per_token"] * (answer["prompt_tokens"] + 5)


@pytest.mark.parametrize(("name", "bytes_per_layer"), [("bf16", 80), ("int8", 52)])
def test_generate_on_a_narrower_cache(mla, mla_folder, name, bytes_per_layer):
    run = mla("generate", mla_folder, "Hi", "--json", "--max-new-tokens", 5, "--cache-format", name)
    assert json.loads(run.out)["cache_bytes_per_token"] == 3 * bytes_per_layer


def test_an_unknown_cache_format_is_refused(mla, mla_folder, tmp_path):
    (tmp_path / "text").write_text("Once upon a time. " * 20)
    for verb, *rest in (["generate", "Hi"], ["eval", "--text", tmp_path / "text", "--window", 32]):
        run = mla(verb, mla_folder, *rest, "--cache-format", "int3")
        assert run.status == 2
        assert "cache format: expected one of fp32, fp16, bf16, int8, got 'int3'" in run.err


def test_generate_draws_by_seed(mla, mla_folder):
    options = ("--max-new-tokens", 20, "--temperature", 1.5)
    texts = [mla("generate", mla_folder, "Hi", *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_hot_draws_are_from_all_tokens(mla_folder):
    """Not from the 50 likeliest only, which is Transformers' default."""
    session = Session(str(mla_folder), dtype="auto", device="cpu")
    ids = session.encode([{"role": "user", "content": "Hi"}])
    draws = (session.answer(ids, Sampling(1, 1e4, 1.0, seed)) for seed in range(120))
    assert len({answer.text for answer in draws}) > 50


def test_generate_reads_standard_input(mla, mla_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi"))
    piped = mla("generate", mla_folder, "-", "--max-new-tokens", 5)
    assert piped.out == mla("generate", mla_folder, "Hi", "--max-new-tokens", 5).out


def test_generate_stops_at_the_limit(mla, mla_folder):
    run = mla("generate", mla_folder, "x" * 500, "--raw", "--max-new-tokens", 100, "--json")
    assert json.loads(run.out)["new_tokens"] == 512 - 500


def test_chat_keeps_its_latents(mla, mla_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAnd then?\n/reset\nHello\n/exit\n"))
    run = mla("chat", mla_folder, "--max-new-tokens", 6, "--temperature", 0)
    assert run.status == 0
    reused = [int(line.split("(")[1].split()[0]) for line in run.err.splitlines() if "from the cache" in line]
    assert reused[0] == 0
    assert reused[1] >= len("user: Hello\nassistant: ")  # the first turn's latents
    assert 0 < reused[2] < reused[1]  # after /reset the common beginning is still there
    lines = run.out.splitlines()
    assert lines[0] == lines[-1]


def test_chat_json_is_a_line_an_answer(mla, mla_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nMore\n"))
    lines = mla("chat", mla_folder, "--max-new-tokens", 6, "--json").out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["new_tokens"] for answer in answers] == [6, 6]
    assert answers[1]["reused_tokens"] > 0


def test_chat_answers_as_without_a_cache(mla, mla_folder, monkeypatch):
    """The second turn on rolled-back latents says what a fresh process says to the whole conversation."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nMore\n"))
    run = mla("chat", mla_folder, "--max-new-tokens", 6, "--temperature", 0)
    tokenizer = AutoTokenizer.from_pretrained(mla_folder)
    model = AutoModelForCausalLM.from_pretrained(mla_folder)
    messages, out = [], ""
    for line in ("Hello", "More"):
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"]
        text = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
        messages.append({"role": "assistant", "content": text})
        out += text + "\n"
    assert run.out == out


class Terminal(io.StringIO):
    """Lines that somebody types."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C means what it means at a terminal, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c(monkeypatch, *tokens):
    """While the second of three layers computes these tokens, counted from 1."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

    forward, calls = DeepseekV3MLP.forward, []

    def pressed(self, *arguments):
        calls.append(self)
        for _ in range([3 * token - 1 for token in tokens].count(len(calls))):
            signal.raise_signal(signal.SIGINT)
        return forward(self, *arguments)

    monkeypatch.setattr(DeepseekV3MLP, "forward", pressed)


@torch.no_grad()
@pytest.mark.parametrize("token", [1, 4])
def test_ctrl_c_stops_an_answer(mla, mla_folder, monkeypatch, token):
    """What was read is not read again, and what was said belongs to the conversation."""
    options = ("--max-new-tokens", 6, "--temperature", 0)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as pressing:
        press_ctrl_c(pressing, token)
        pressing.setattr(sys, "stdin", Terminal("Tell me a story\nAnd then?\n"))
        run = mla("chat", mla_folder, *options)
    assert run.status == 0
    assert signal.getsignal(signal.SIGINT) is before

    tokenizer = AutoTokenizer.from_pretrained(mla_folder)
    model = AutoModelForCausalLM.from_pretrained(mla_folder)

    def write(messages, count):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = ids["input_ids"]
        return tokenizer.decode(model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :])

    messages = [{"role": "user", "content": "Tell me a story"}]
    messages.append({"role": "assistant", "content": write(messages, token)})
    messages.append({"role": "user", "content": "And then?"})
    assert run.out == messages[1]["content"] + "\n" + write(messages, 6) + "\n"
    reused = [int(line.split("(")[1].split()[0]) for line in run.err.splitlines() if "from the cache" in line]
    assert reused[1] >= len("user: Tell me a story\nassistant: ")


def test_ctrl_c_while_a_long_message_is_read(mla, mla_folder, monkeypatch):
    """It is as if the message had not been sent, and what was read of it is not read again."""
    monkeypatch.setattr("mla.integrations.prefixes._STEP", 16)
    options = ("--max-new-tokens", 6, "--temperature", 0)
    with monkeypatch.context() as pressing:
        press_ctrl_c(pressing, 2)  # the second step of many
        pressing.setattr(sys, "stdin", Terminal("Tell me a story of a fox and a dog\nTell me nothing\n"))
        run = mla("chat", mla_folder, *options)
    assert run.status == 0
    monkeypatch.setattr(sys, "stdin", Terminal("Tell me nothing\n"))
    assert run.out == mla("chat", mla_folder, *options).out
    assert f"({len('user: Tell me ')} from the cache)" in run.err


@pytest.mark.parametrize(("stdin", "tokens"), [(Terminal, (2, 2)), (io.StringIO, (2,))])
def test_ctrl_c_twice_or_of_a_script_ends_the_program(mla, mla_folder, monkeypatch, stdin, tokens):
    press_ctrl_c(monkeypatch, *tokens)
    monkeypatch.setattr(sys, "stdin", stdin("Hello\nMore\n"))
    run = mla("chat", mla_folder, "--max-new-tokens", 6)
    assert run.status == 130


def test_chat_goes_on_after_a_message_that_is_too_long(mla, mla_folder, monkeypatch):
    lines = "Hello\n" + "x" * 600 + "\nMore\n"
    options = ("--max-new-tokens", 6, "--temperature", 0)
    monkeypatch.setattr(sys, "stdin", Terminal(lines))
    run = mla("chat", mla_folder, *options)
    assert run.status == 0
    assert "the model takes 512 with the answer; /reset starts anew" in run.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nMore\n"))
    assert run.out == mla("chat", mla_folder, *options).out
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))  # a script must see it
    assert mla("chat", mla_folder, *options).status == 2


@torch.no_grad()
def test_eval(mla, mla_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    run = mla("eval", mla_folder, "--text", text, "--window", 32, "--json", "--against", mla_folder)
    result = json.loads(run.out)
    model = AutoModelForCausalLM.from_pretrained(mla_folder)
    ids = AutoTokenizer.from_pretrained(mla_folder)(text.read_text(), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    want = sum(float(model(w[None], labels=w[None]).loss) for w in windows) / len(windows)
    assert result["tokens"] == len(windows) * 31
    assert result["perplexity"] == pytest.approx(math.exp(want), rel=1e-4)
    assert result["kl"] == pytest.approx(0, abs=1e-5)
    assert result["agreement"] == 1.0
    table = mla("eval", mla_folder, "--text", text, "--window", 32, "--max-tokens", 64, "--stock")
    assert "perplexity" in table.out


def test_eval_of_a_model_that_is_not_mla(mla, llama_folder, mla_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    run = mla("eval", mla_folder, "--text", text, "--window", 32, "--json", "--against", llama_folder)
    assert json.loads(run.out)["kl"] > 0.1


def test_doctor_calls_a_good_model_safe(mla, mla_folder):
    run = mla("doctor", mla_folder)
    assert run.status == 0
    assert run.out.startswith(f"safe: {mla_folder} (deepseek_v3) absorbed equals stock to ")
    assert "in 3 attentions at positions 0..63 and 448..511" in run.out
    assert "model.layers.2.self_attn" in run.err
    report = json.loads(mla("doctor", mla_folder, "--json").out)
    assert report["safe"]
    assert report["bytes_per_token"] == [480.0, 480.0]


def test_doctor_finds_a_defect(mla, mla_folder, monkeypatch):
    """A wrong attention in one layer only, as a changed family would have."""
    honest = integration.up_projections

    def wrong(weight, h, n):
        w_uk, w_uv = honest(weight, h, n)
        return w_uk * 1.01, w_uv

    monkeypatch.setattr(integration, "up_projections", wrong)
    run = mla("doctor", mla_folder)
    assert run.status == 1
    assert run.out.startswith(f"NOT safe: {mla_folder} (deepseek_v3): model.layers.0.self_attn differs by")
    assert not json.loads(mla("doctor", mla_folder, "--json").out)["safe"]


def test_doctor_leaves_the_model_as_it_was(mla_folder):
    from mla.integrations.doctor import diagnose

    model = AutoModelForCausalLM.from_pretrained(mla_folder)
    assert diagnose(model, torch.randint(256, (1, 20))).safe
    assert not integration.is_absorbed(model)
    integration.absorb(model, path="absorbed")
    assert diagnose(model, torch.randint(256, (1, 20))).safe
    assert integration.absorbed_path(model) == "absorbed"
    with pytest.raises(ZeroDivisionError):
        diagnose(model, torch.randint(256, (1, 20)), on_progress=lambda done, total: 1 / 0)
    assert integration.absorbed_path(model) == "absorbed"

"""``mla serve`` as clients meet it: the openai package against a real server on a tiny model."""

import io
import json
import random
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mla.errors import MLAError
from tests.cli.serving import Server

KEY = "secret"
LONG = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture(scope="module")
def server(mla_folder, tmp_path_factory):
    """Its memory holds 833 tokens, little more than one conversation: caches come and go all the time."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with Server(mla_folder, log, "--memory", "400kB", MLA_API_KEY=KEY) as server:
        yield server
        assert server.process.poll() is None
        assert "Traceback" not in server.notes()


@pytest.fixture(scope="module")
def client(server):
    return server.client(KEY)


@pytest.fixture(scope="module")
def reference(mla_folder):
    """(tokenizer, model) as stock Transformers runs them."""
    return AutoTokenizer.from_pretrained(mla_folder), AutoModelForCausalLM.from_pretrained(mla_folder)


@pytest.fixture(scope="module")
def chat(server, client):
    """``chat("Hi", max_tokens=8)`` asks greedily."""

    def ask(text, **options):
        options = {"temperature": 0, "max_tokens": 12, **options}
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=server.model, messages=messages, **options)

    return ask


@pytest.fixture(scope="module")
def complete(server, client):
    def ask(prompt, **options):
        options = {"temperature": 0, "max_tokens": 12, **options}
        return client.completions.create(model=server.model, prompt=prompt, **options)

    return ask


@torch.no_grad()
def greedy(reference, prompt, new=12):
    tokenizer, model = reference
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


def test_says_what_fits(server):
    assert "833 tokens of context fit into 0.00 GiB at 480 bytes each (fp32)" in server.notes()
    assert "one request takes up to 512" in server.notes()


def test_models(client, server):
    (model,) = client.models.list().data
    assert model.id == server.model
    assert model.max_model_len == 512


def test_chat_says_what_transformers_says(chat, reference):
    answer = chat("Hello")
    (choice,) = answer.choices
    assert choice.message.content == greedy(reference, "user: Hello\nassistant: ")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    prompt = len("user: Hello\nassistant: ")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 12, prompt + 12)


def test_a_stream_is_the_same_answer(chat):
    for text in ("Hello", "Bonjour", "Guten Tag"):
        whole = chat(text, max_tokens=40)
        *chunks, last = chat(text, max_tokens=40, stream=True, stream_options={"include_usage": True})
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert last.choices == []
        assert last.usage.completion_tokens == 40
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        plain = list(chat(text, max_tokens=40, stream=True))
        assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_a_stream_ends_as_openai_ends_it(server):
    body = {"prompt": "Hi", "max_tokens": 2, "stream": True}
    request = urllib.request.Request(
        server.url + "/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_stop(chat, complete):
    text = chat("Hello", max_tokens=40).choices[0].message.content
    stop = text[10:13]
    for stops in (stop, ["never", stop]):
        answer = chat("Hello", max_tokens=40, stop=stops)
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
    chunks = list(chat("Hello", max_tokens=40, stop=[stop], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    chunks = list(chat("Hello", max_tokens=40, stop=[text[-1] + "never"], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text  # sent at last
    raw = complete("user: Hello\nassistant: ", max_tokens=40, stop=stop)
    assert (raw.choices[0].text, raw.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


def test_seed_and_temperature(chat):
    one, same, other = (
        chat("Hello", max_tokens=30, temperature=1.5, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    )
    assert one == same != other
    nucleus = chat("Hello", max_tokens=30, temperature=1.5, top_p=0.0).choices[0].message.content
    assert nucleus == chat("Hello", max_tokens=30).choices[0].message.content
    biased = chat("Hello", max_tokens=3, logit_bias={"65": 100})
    assert len(set(biased.choices[0].message.content)) == 1


def test_completions_of_several_prompts(complete, reference):
    prompts = ["Once upon", "Hello", LONG]
    answer = complete(prompts)
    assert [choice.text for choice in answer.choices] == [greedy(reference, prompt) for prompt in prompts]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    ids = reference[0](prompts)["input_ids"]
    assert [choice.text for choice in complete(ids).choices] == [choice.text for choice in answer.choices]
    assert complete(ids[0]).choices[0].text == answer.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in complete(LONG, stream=True))
    assert streamed == answer.choices[2].text


@torch.no_grad()
def test_echo_and_logprobs(complete, reference):
    """What lm-eval's local-completions model reads."""
    tokenizer, model = reference
    ids = tokenizer(LONG, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 128  # more than one step of scores
    answer = complete(ids[0].tolist(), max_tokens=1, echo=True, logprobs=2)
    (choice,) = answer.choices
    assert choice.text[: len(LONG)] == LONG
    scores = choice.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == ids.shape[1] + 1
    assert (scores.token_logprobs[0], scores.top_logprobs[0]) == (None, None)
    full = torch.cat([ids, model.generate(ids, max_new_tokens=1, do_sample=False)[:, -1:]], 1)
    want = model(full[:, :-1]).logits.log_softmax(-1)
    right = want[0].gather(1, full[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor(scores.token_logprobs[1:]), right, atol=1e-4)
    for top, row in zip(scores.top_logprobs[1:], want[0], strict=True):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
    only = complete(LONG, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert only.text == LONG
    assert only.logprobs.token_logprobs == pytest.approx(scores.token_logprobs[:-1])
    new = complete("Hello", max_tokens=5, logprobs=0).choices[0].logprobs
    assert len(new.token_logprobs) == 5
    assert all(list(top) == [token] for top, token in zip(new.top_logprobs, new.tokens, strict=True))


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": MESSAGES, "model": "other"}, 404, "The model `other` does not exist"),
        ({"messages": []}, 400, "messages: expected a list of at least one message"),
        ({}, 400, "messages: expected"),
        ({"messages": [{"content": "Hi"}]}, 400, "messages[0]: expected an object with role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "this server reads text"),
        ({"messages": MESSAGES, "n": 2}, 400, "n: this server supports 1 only, got 2"),
        ({"messages": MESSAGES, "logprobs": True}, 400, "logprobs: this server supports False only"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, 400, "response_format: this"),
        ({"messages": MESSAGES, "frequency_penalty": 0.5}, 400, "frequency_penalty: this server supports 0"),
        ({"messages": MESSAGES, "nonsense": 1}, 400, "nonsense is not supported by this server"),
        ({"messages": MESSAGES, "generation_config": "{}"}, 400, "generation_config is not supported"),
        ({"messages": MESSAGES, "temperature": 3}, 400, "temperature: expected a number from 0 to 2"),
        ({"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens: expected an integer from 1, got '0'"),
        ({"messages": MESSAGES, "max_tokens": "9"}, 400, "max_tokens: expected an integer"),
        ({"messages": MESSAGES, "max_tokens": 500}, 400, "maximum context length is 512 tokens here"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "maximum context length is 512"),
        ({"messages": MESSAGES, "stop": [""]}, 400, "stop: expected a text or a list of texts"),
        ({"messages": MESSAGES, "logit_bias": {"a": 1}}, 400, "logit_bias: expected an object of numbers"),
        ({"messages": MESSAGES, "logit_bias": {"999": 1}}, 400, "logit_bias: expected token ids from 0"),
        ({"prompt": [256]}, 400, "prompt: expected token ids from 0 to 255, got '256'"),
        ({"prompt": {}}, 400, "prompt: expected a string, token ids, or a list of either"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": "Hi", "stream": True, "logprobs": 1}, 400, "echo and logprobs are not available"),
        ({"prompt": ["Hi", "Ho"], "stream": True}, 400, "several prompts are not available with stream"),
        ({"prompt": "Hi", "suffix": "there"}, 400, "suffix: this server supports '' only"),
        ({"prompt": "Hi", "best_of": 3}, 400, "best_of: this server supports 1 only"),
    ],
)
def test_refusals(server, client, body, status, message):
    path = "/completions" if "prompt" in body else "/chat/completions"
    with pytest.raises(openai.APIStatusError) as refusal:
        client.post(path, body={"model": server.model, **body}, cast_to=object)
    assert refusal.value.status_code == status
    assert message in refusal.value.body["message"]
    assert refusal.value.body["type"] == "invalid_request_error"


def status_of(server, path, data=None, key=KEY):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        root = server.url.removesuffix("/v1")
        with urllib.request.urlopen(urllib.request.Request(root + path, data, headers)) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_other_ways_to_ask_wrongly(server):
    for data in (b"{", b"[]", b'"text"'):
        status, body = status_of(server, "/v1/chat/completions", data)
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    for path in ("/v1/responses", "/load_model", "/reset", "/docs", "/v1/nothing"):
        status, body = status_of(server, path, b"{}")
        assert status == 404
        assert path in body["error"]["message"]
    assert status_of(server, "/health")[0] == 200


def test_api_key(server):
    for path in ("/v1/models", "/v1/chat/completions", "/v1/nothing"):
        status, body = status_of(server, path, key="wrong")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    assert status_of(server, "/health", key="wrong")[0] == 200


def test_the_beginning_of_a_conversation_is_not_read_twice(chat, client, server):
    first = chat(LONG)
    assert first.usage.prompt_tokens_details.cached_tokens < 20
    messages = [
        {"role": "user", "content": LONG},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And then?"},
    ]
    body = {"model": server.model, "messages": messages, "max_tokens": 5, "temperature": 0}
    second = client.chat.completions.create(**body)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    chat("x" * 480)  # needs the room of all that is kept
    again = client.chat.completions.create(**body)
    assert again.usage.prompt_tokens_details.cached_tokens < 20
    assert again.choices == second.choices


def test_nobody_waits_for_answers_to_clients_that_have_gone(chat, server):
    """Ten long answers, each abandoned, would keep the next client waiting for ten times as long as one."""
    impatient = server.client(KEY, http_client=openai.DefaultHttpxClient(timeout=0.3))
    body = {"model": server.model, "messages": MESSAGES, "max_tokens": 240, "temperature": 0}

    def abandon(number):
        if number % 2:
            with pytest.raises(openai.APITimeoutError):
                impatient.with_options(timeout=0.3).chat.completions.create(**body)
        else:
            stream = chat("Hi", max_tokens=240, stream=True)
            next(iter(stream))
            stream.close()

    alone = time.monotonic()
    chat("Hi", max_tokens=240)
    alone = time.monotonic() - alone
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(abandon, range(10)))
    start = time.monotonic()
    chat("Hello")
    assert time.monotonic() - start < 5 * alone


def test_sixteen_at_once_are_answered_as_if_alone(chat, complete):
    draw = random.Random(0)
    asked = [
        (draw.choice([chat, complete]), "".join(draw.choices("abc de", k=draw.randrange(1, 200))), {
            "max_tokens": draw.randrange(1, 12),
            "temperature": draw.choice([0, 1.2]),
            "seed": number,
        })
        for number in range(20)
    ]  # fmt: skip

    def text(question):
        ask, prompt, options = question
        choice = ask(prompt, **options).choices[0]
        return choice.message.content if ask is chat else choice.text

    def streamed(question):
        ask, prompt, options = question
        choices = [chunk.choices[0] for chunk in ask(prompt, stream=True, **options)]
        return "".join((c.delta.content or "") if ask is chat else c.text for c in choices)

    alone = [text(question) for question in asked]
    many = [(number, draw.choice([text, streamed])) for number in list(range(20)) * 3]
    draw.shuffle(many)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: one[1](asked[one[0]]), many))
    assert answers == [alone[number] for number, _ in many]


def test_prefixes_survive_the_server(mla_folder, tmp_path):
    options = ("--cache-dir", tmp_path / "cache", "--cache-format", "int8")
    body = {"prompt": LONG, "max_tokens": 8, "temperature": 0}

    def ask(log):
        with Server(mla_folder, tmp_path / log, *options) as server:
            answer = server.client().completions.create(model=server.model, **body)
            deadline = time.monotonic() + 120
            while not list((tmp_path / "cache").glob("*.safetensors")) and time.monotonic() < deadline:
                time.sleep(0.05)
            server.stop(signal.SIGKILL)
            return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens, server.notes()

    text, cached, _ = ask("one")
    assert cached == 0
    assert ask("two")[:2] == (text, len(LONG) - 1)
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    again, cached, notes = ask("three")
    assert (again, cached) == (text, 0)
    assert "is damaged" in notes
    assert notes.count("computed again") == 1


def test_mistakes_on_the_command_line(mla, mla_folder, llama_folder):
    def says(run, *parts):
        assert run.status == 2
        (line,) = run.err.strip().splitlines()
        assert all(part in line for part in ("mla: error: ", *parts)), line

    says(mla("serve", mla_folder, "--engine", "sglang"), "--engine: expected one of auto, transformers, vllm")
    says(mla("serve", mla_folder, "--port", 70000), "--port: expected 0 to 65535, got 70000")
    says(mla("serve", mla_folder, "--memory", "much"), "--memory: expected something like 80GB")
    says(mla("serve", mla_folder, "--cache-dir-size", "x"), "--cache-dir-size: expected something like 80GB")
    says(mla("serve", mla_folder, "--api-key", ""), "--api-key: expected a key")
    says(mla("serve", llama_folder, "--port", 0), "is not an MLA model")
    says(mla("serve", mla_folder, "--port", 0, "--max-model-len", 9999), "--max-model-len: expected 1 to 512")
    says(mla("serve", mla_folder, "--port", 0, "--cache-format", "int3"), "cache format: expected one of")
    says(mla("serve", mla_folder, "--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid")
    for host in ("a..b", "a" * 64 + ".org"):
        says(
            mla("serve", mla_folder, "--host", host),
            f"--host: expected an address or a host's name, got {host}",
        )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says(mla("serve", mla_folder, "--port", port), f"cannot listen on 127.0.0.1 port {port}", "in use")


@pytest.mark.parametrize(
    ("options", "guarded"),
    [((), True), (("--host", "0.0.0.0"), False), (("--api-key", "k"), False)],
)
def test_who_listens_to_this_machine_keeps_other_names_out(mla, mla_folder, monkeypatch, options, guarded):
    from mla.cli import serve

    seen = []
    monkeypatch.setattr(serve, "_run", lambda app, *_: seen.append(app._guard.by_local_names))
    assert mla("serve", mla_folder, "--engine", "transformers", "--port", 0, *options).status == 0
    assert seen == [guarded]


def test_of_two_servers_on_a_port_the_second_is_refused_before_it_loads():
    from mla.cli import serve

    with serve._listen("127.0.0.1", 0) as first:  # which is loading its model now
        port = first.getsockname()[1]
        with pytest.raises(MLAError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            serve._listen("127.0.0.1", port)


def test_save_and_load_cache(mla, mla_folder, tmp_path):
    options = ("--raw", "--max-new-tokens", 8, "--json")
    plain = json.loads(mla("generate", mla_folder, LONG, *options).out)
    file = tmp_path / "prefix"
    first = mla("generate", mla_folder, LONG, *options, "--save-cache", file, "--load-cache", file)
    assert f"mla: {file}: no such file; the prefix is computed again" in first.err
    again = json.loads(mla("generate", mla_folder, LONG, *options, "--load-cache", file).out)
    assert (again["text"], again["reused_tokens"]) == (plain["text"], len(LONG) - 1)
    part = json.loads(mla("generate", mla_folder, LONG[:100] + "!", *options, "--load-cache", file).out)
    assert part["reused_tokens"] == 100
    assert part["text"] == json.loads(mla("generate", mla_folder, LONG[:100] + "!", *options).out)["text"]
    other = mla("generate", mla_folder, LONG, *options, "--load-cache", file, "--cache-format", "int8")
    assert "its cache format is fp32, expected int8; the prefix is computed again" in other.err
    assert json.loads(other.out)["reused_tokens"] == 0
    missing = mla("generate", mla_folder, "Hi", "--save-cache", tmp_path / "none" / "file")
    assert missing.status == 2
    assert "--save-cache: expected a file in a folder that exists" in missing.err


def test_a_chat_goes_on_from_a_file_and_leaves_one(mla, mla_folder, tmp_path, monkeypatch):
    file = tmp_path / "talk"

    def talk(typed, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        options = ("--system", LONG, "--max-new-tokens", 4, "--temperature", 0, "--json", *options)
        return mla("chat", mla_folder, *options)

    silent = talk("/exit\n", "--save-cache", file)
    assert (silent.status, file.exists()) == (2, False)
    assert f"{file}: nothing has been read yet that could be saved" in silent.err
    first = talk("Hello\nMore\n/exit\n", "--save-cache", file, "--load-cache", file)
    assert f"mla: {file}: no such file; the prefix is computed again" in first.err
    again = talk("Hello\nMore\n", "--load-cache", file)
    before, after = ([json.loads(line) for line in run.out.splitlines()] for run in (first, again))
    assert [answer["text"] for answer in after] == [answer["text"] for answer in before]
    assert (before[0]["reused_tokens"], after[0]["reused_tokens"]) == (0, after[0]["prompt_tokens"] - 1)
    file.unlink()
    ended = talk(f"Hello\n{LONG * 20}\n", "--save-cache", file)  # what has been read is kept all the same
    assert (ended.status, file.exists()) == (2, True)
    assert "the prompt has" in ended.err
    missing = talk("Hello\n", "--save-cache", tmp_path / "none" / "file")
    assert missing.status == 2
    assert "--save-cache: expected a file in a folder that exists" in missing.err


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_cache_that_cannot_be_kept_costs_no_answer(mla, mla_folder, tmp_path, monkeypatch, form):
    def full(self, file, identity):
        raise MLAError(f"{file} cannot be written: No space left on device")

    monkeypatch.setattr("mla.integrations.prefixes.Prefixes.save", full)
    run = mla("generate", mla_folder, "Hi", "--max-new-tokens", 2, "--save-cache", tmp_path / "file", *form)
    assert (run.status, "No space left on device" in run.err) == (2, True)
    assert run.out.strip()


def test_a_cache_of_another_model_is_not_used(mla, mla_folder, tmp_path):
    sibling = shutil.copytree(mla_folder, tmp_path / "sibling")
    model = AutoModelForCausalLM.from_pretrained(sibling)
    with torch.no_grad():
        model.model.layers[0].self_attn.kv_b_proj.weight.mul_(1.001)
    model.save_pretrained(sibling)
    file = tmp_path / "prefix"
    mla("generate", mla_folder, LONG, "--max-new-tokens", 2, "--save-cache", file)
    run = mla("generate", sibling, LONG, "--max-new-tokens", 2, "--load-cache", file, "--json")
    assert json.loads(run.out)["reused_tokens"] == 0
    assert "belongs to another model or setting: its weights is" in run.err

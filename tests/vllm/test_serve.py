"""``mla serve --engine vllm``: the openai package against vLLM's own server with the plugin in it."""

import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.cli.serving import VLLMServer
from tests.vllm import models

pytestmark = pytest.mark.vllm

KEY = "secret"
LIMIT = 256
QUESTIONS = ["Why is the sky blue?", "Name three rivers.", "What is 7 times 8?", "Write a haiku about rain."]


def status_of(url):
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = models.converted()
    if model is None:
        pytest.skip("needs a converted model with its tokenizer: make vllm")
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ("--dtype", "float32", "--max-model-len", LIMIT, "--memory", "1GiB")
    with VLLMServer(model, log, *options, MLA_API_KEY=KEY, VLLM_NO_USAGE_STATS="1") as server:
        yield server
        assert server.process.poll() is None
        assert "Traceback" not in server.notes()
        server.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client(KEY)


@pytest.fixture(scope="module")
def chat(server, client):
    def ask(text, **options):
        options = {"temperature": 0, "max_tokens": 16, **options}
        messages = [{"role": "user", "content": text}]
        return client.chat.completions.create(model=server.model, messages=messages, **options)

    return ask


def test_the_plugin_attends(server):
    assert "mla: attention on latents in C++" in server.notes()
    assert "CPU KV cache size: " in server.notes()  # how many tokens fit


def test_models(server, client):
    assert [model.id for model in client.models.list().data] == [server.model]


def test_chat_says_what_transformers_says(server, chat):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.model)
    reference = models.Reference(server.model)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer = chat(question, extra_body={"ignore_eos": True})
        expected = tokenizer.decode(reference.greedy(ids, 16), skip_special_tokens=True)
        assert answer.choices[0].message.content == expected
        assert answer.usage.prompt_tokens == len(ids)


def test_streams_add_up_to_the_answer(chat, server, client):
    whole = chat(QUESTIONS[0]).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in chat(QUESTIONS[0], stream=True)]
    assert len(parts) > 2
    assert "".join(parts) == whole
    options = {"model": server.model, "prompt": "The river", "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stream = client.completions.create(stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_at_once_as_alone(chat):
    alone = [chat(question).choices[0].message.content for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: chat(text).choices[0].message.content, QUESTIONS * 2))
    assert together == alone * 2


def test_a_wrong_key_is_refused(server):
    with pytest.raises(openai.AuthenticationError):
        server.client("wrong").models.list()
    # vLLM by itself asks below /v1 only.
    for path, status in (("invocations", 401), ("tokenize", 401), ("metrics", 401), ("health", 200)):
        assert status_of(server.url.replace("/v1", f"/{path}")) == status


def test_what_cannot_fit_is_refused_and_the_server_lives(chat):
    with pytest.raises(openai.BadRequestError, match=str(LIMIT)):
        chat("word " * 2 * LIMIT)
    assert chat(QUESTIONS[0]).choices[0].message.content


def test_a_client_that_goes_away_disturbs_nobody(chat):
    expected = chat(QUESTIONS[1]).choices[0].message.content
    for _ in range(4):
        stream = chat(QUESTIONS[0], stream=True, max_tokens=150)
        next(iter(stream))
        stream.close()
    assert chat(QUESTIONS[1]).choices[0].message.content == expected

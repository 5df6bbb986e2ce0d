"""The application behind a real port: what the openai package makes of errors, wherever they come from."""

import threading
import time

import openai
import pytest
import torch
import uvicorn

from mla.errors import MLAError
from mla.integrations.serving.app import build_app
from tests.integrations.serving.test_generation import make_engine

NAME = "/models/of mine/tiny"


@pytest.fixture(scope="module")
def engine():
    engine = make_engine()
    engine.name = NAME
    return engine


@pytest.fixture(scope="module")
def client(engine):
    server = uvicorn.Server(uvicorn.Config(build_app(engine), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    server.should_exit = True
    thread.join(timeout=30)


def chat(client, **options):
    messages = [{"role": "user", "content": "Hi"}]
    return client.chat.completions.create(model=NAME, messages=messages, max_tokens=4, **options)


def complete(client, **options):
    return client.completions.create(model=NAME, prompt="Hi", max_tokens=4, **options)


@pytest.fixture(params=[chat, complete])
def ask(request, client):
    return lambda **options: request.param(client, **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(MLAError('no "room"'), 503), (RuntimeError('no "room"'), 500)]
)
def test_what_fails_before_the_first_token_has_a_status(ask, engine, monkeypatch, stream, error, status):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(engine.model, "generate", broken)
    with pytest.raises(openai.InternalServerError) as told:
        ask(stream=stream)
    assert told.value.status_code == status
    assert told.value.body == {"message": 'no "room"', "type": "server_error", "param": None, "code": None}


def test_what_fails_later_is_raised_from_the_stream(ask, engine, monkeypatch):
    read = threading.Event()

    def breaks(ids, streamer, **kwargs):
        streamer.put(ids)
        streamer.put(torch.tensor([65]))
        assert read.wait(timeout=60)
        raise MLAError('no "room" any more')

    monkeypatch.setattr(engine.model, "generate", breaks)
    stream = iter(ask(stream=True))
    choices = [next(stream).choices[0]]
    if hasattr(choices[0], "delta"):  # of chats the first chunk says only who speaks
        choices.append(next(stream).choices[0])
    read.set()
    with pytest.raises(openai.APIError, match='no "room" any more') as told:
        list(stream)
    assert told.value.body["type"] == "server_error"


def test_a_fault_outside_generation_is_told_too(ask, engine, monkeypatch):
    monkeypatch.setattr(engine, "check_length", lambda *_: 1 // 0)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError") as told:
        ask()
    assert told.value.body["type"] == "server_error"


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in "fg"]
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant: ",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<end>", "content": "text"},
    },
}


def test_tools_are_refused_where_no_call_could_be_read(client):
    for options in ({}, {"parallel_tool_calls": False}):
        with pytest.raises(openai.BadRequestError, match="a response_template that reads tool calls") as told:
            chat(client, tools=TOOLS, **options)
        assert told.value.body["param"] == "tools"
    assert chat(client, tools=TOOLS, tool_choice="none").choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "names"),
    # A stop string ends what is said: within a call it is a part of the call.
    [({}, "fg"), ({"parallel_tool_calls": False}, "f"), ({"stop": ["x", "arg"]}, "fg")],
)
def test_tool_calls(client, engine, monkeypatch, stream, options, names):
    text = "".join(f'<tool_call>{{"name": "{name}", "arguments": {{"x": 1}}}}</tool_call>' for name in "fg")

    def calls(ids, streamer, stopping_criteria, **kwargs):
        streamer.put(ids)
        for token in engine.tokenizer(text)["input_ids"]:
            streamer.put(torch.tensor([token]))
            if stopping_criteria[0](ids, None):
                break
        streamer.end()

    monkeypatch.setattr(engine.model, "generate", calls)
    monkeypatch.setattr(engine.tokenizer, "response_template", TEMPLATE, raising=False)
    answer = chat(client, tools=TOOLS, stream=stream, **options)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    parts = [choice.delta if stream else choice.message for choice in choices]
    found = [call.function for part in parts for call in part.tool_calls or []]
    assert [(call.name, call.arguments) for call in found] == [(name, '{"x": 1}') for name in names]
    assert choices[-1].finish_reason == "tool_calls"
    assert not any(part.content for part in parts)


def test_a_model_by_its_name(client):
    model = client.models.retrieve(NAME)
    assert (model.id, model.object, model.max_model_len) == (NAME, "model", 512)
    assert model == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="The model `other/one` does not exist") as told:
        client.models.retrieve("other/one")
    assert told.value.body["code"] == "model_not_found"

"""The application behind a real port: what the openai package makes of errors, wherever they come from."""

import asyncio
import contextlib
import socket
import threading
import time

import openai
import pytest
import torch
import uvicorn

from mla.errors import MLAError
from mla.integrations.serving import app as application
from mla.integrations.serving.app import build_app
from tests.integrations.serving.test_generation import make_engine
from tests.integrations.serving.test_text import TEMPLATE

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

    def breaks(ids, stopping_criteria, **kwargs):
        stopping_criteria[0](torch.tensor([[65]]), None)
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

    def calls(ids, stopping_criteria, **kwargs):
        for token in engine.tokenizer(text)["input_ids"]:
            if stopping_criteria[0](torch.tensor([[token]]), None):
                break

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


def raw(client, head, chunks):
    """The first bytes that come back for a request written by hand, until the other side hangs up."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head.encode() + b"\r\n\r\n")
            for chunk in chunks:
                connection.sendall(chunk)
        with contextlib.suppress(ConnectionError):
            return connection.recv(1000).decode()
    return ""


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_without_end_is_refused(client, monkeypatch, path):
    monkeypatch.setattr(application, "_MOST_BODY", 10**6)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    sent = []

    def endless():
        while len(sent) < 10**5:
            sent.append(None)
            yield b"1000\r\n" + b" " * 0x1000 + b"\r\n"

    answer = raw(client, head, endless())
    assert len(sent) < 10**5
    assert not answer or "HTTP/1.1 413" in answer  # an answer may be lost where a connection is cut
    assert chat(client).choices


def test_a_body_that_is_too_long_is_refused_in_openais_words(client, monkeypatch):
    monkeypatch.setattr(application, "_MOST_BODY", 1000)
    for ask in (chat, complete):
        with pytest.raises(
            openai.APIStatusError, match=r"body of the request: expected up to 1000 bytes"
        ) as told:
            ask(client, stop="x" * 1000)
        assert told.value.status_code == 413
        assert told.value.body["type"] == "invalid_request_error"
        assert ask(client).choices


async def status(app, path="/v1/completions", method="POST", **headers):
    """The status of a request with these headers, and the answer."""
    received, sent = [{"type": "http.request", "body": b'{"prompt": "Hi", "max_tokens": 2}'}], []

    async def receive():
        return received.pop() if received else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": given}
    await app({**scope, "query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


JSON = {"content_type": "application/json"}


@pytest.mark.anyio
async def test_pages_of_other_names_are_not_answered(engine):
    """Their names may point here by now: to the browser it is the page's own server that answers."""
    local = build_app(engine, host="127.0.0.1")
    for host in ("127.0.0.1", "127.0.0.2:8000", "localhost:80", "LOCALHOST", "[::1]", "[::1]:8000"):
        assert (await status(local, **JSON, host=host))[0] == 200, host
    assert (await status(local, **JSON))[0] == 200  # HTTP/1.0 has none, browsers have
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil", "localhost.evil", "[::2]:80", ":80"):
        for path, method in (("/v1/completions", "POST"), ("/v1/models", "GET"), ("/health", "GET")):
            code, answer = await status(local, path, method, **JSON, host=host)
            assert (code, "expected 127.0.0.1, [::1] or localhost" in answer) == (403, True), host
    # With a key nobody needs to be kept out by name, and other addresses have names of their own.
    key = {"authorization": "Bearer k", "host": "model.example"}
    assert (await status(build_app(engine, "k", host="127.0.0.1"), **JSON, **key))[0] == 200
    assert (await status(build_app(engine, host="0.0.0.0"), **JSON, host="model.example"))[0] == 200


@pytest.mark.anyio
async def test_bodies_that_pages_may_send_unasked_are_refused(engine):
    app = build_app(engine)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert (await status(app, path))[0] == 415
        for kind in ("text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"):
            code, answer = await status(app, path, content_type=kind)
            assert (code, f"Content-Type: expected application/json, got {kind}" in answer) == (415, True)
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        assert (await status(app, content_type=kind))[0] == 200


@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/models"])
@pytest.mark.anyio
async def test_a_body_that_nobody_asked_for_is_not_kept(engine, path):
    """The application answers before the body has been read."""
    app, received, sent = build_app(engine), [], []

    async def receive():
        received.append(None)
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []}
    await app({**scope, "query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send)
    assert sent[0]["status"] in (404, 405)
    assert len(received) <= 2


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 10**5 + "]" * 10**5}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 900 + "]" * 900}}]},
    ],
)
def test_what_is_nested_too_deep_is_the_clients_error(client, message):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", **message}]
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model=NAME, messages=messages, max_tokens=4)
    assert "nesting" in told.value.body["message"]

"""What is put before vLLM's server, over an application that answers everything."""

import pytest
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse

from mla.integrations.vllm.middleware import Gate

PATHS = ("/v1/models", "/invocations", "/tokenize", "/metrics", "/docs", "/healthy", "/ping/x")


@pytest.fixture
def client(monkeypatch):
    """Makes a client of a server with this key."""

    async def answer(request):
        return PlainTextResponse("answer")

    async def talk(socket):
        await socket.accept()
        await socket.close()

    def start(key, host="127.0.0.1:8000", **options):
        monkeypatch.setenv("VLLM_API_KEY", key)
        routes = [
            WebSocketRoute("/v1/realtime", talk),
            Route("/{path:path}", answer, methods=["GET", "POST"]),
        ]
        app = Starlette(routes=routes)
        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
        app.add_middleware(Gate)  # as vLLM does it
        return TestClient(app, base_url=f"http://{host}", **options)

    return start


@pytest.mark.parametrize("path", PATHS)
def test_the_key_is_asked_for_on_every_path(client, path):
    known = client("k", "model.example")
    assert known.get(path, headers={"Authorization": "Bearer k"}).text == "answer"
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "k"}):
        for refused in (known.get(path, headers=headers), known.post(path, headers=headers, json={})):
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["code"] == "invalid_api_key"


def test_what_needs_no_key(client):
    asked = {"Origin": "https://a.page", "Access-Control-Request-Method": "POST"}
    assert client("k").options("/v1/models", headers=asked).status_code == 200
    assert [client("k").get(path).status_code for path in ("/health", "/ping")] == [200, 200]
    behind = client("k", root_path="/model")
    assert [behind.get(path).status_code for path in ("/model/health", "/model/v1/models")] == [200, 401]


def test_a_socket_needs_the_key_too(client):
    with pytest.raises(WebSocketDenialResponse) as refused, client("k").websocket_connect("/v1/realtime"):
        pass
    assert refused.value.status_code == 401
    with client("k").websocket_connect("/v1/realtime", headers={"Authorization": "Bearer k"}):
        pass


def test_without_a_key_only_this_machines_names_are_answered(client):
    for path in (*PATHS, "/health"):
        for host in ("127.0.0.1", "localhost:8000", "[::1]:8000"):
            assert client("", host).get(path).text == "answer"
        refused = client("", "evil.example:8000").get(path)
        assert refused.status_code == 403
        assert "expected 127.0.0.1, [::1] or localhost" in refused.json()["error"]["message"]

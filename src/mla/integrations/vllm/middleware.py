"""Before vLLM's server: alone it asks for a key on some paths only, and answers to every name."""

import os

from starlette.types import ASGIApp, Receive, Scope, Send

from mla.integrations.serving.guard import Guard, response

#: What says only that the server lives.
_OPEN = {"/health", "/ping"}


class Gate:
    """Asks for the key (``VLLM_API_KEY``) wherever text, tokens or figures could be had; without a key, which
    ``mla serve`` has only on an address of this machine, keeps other sites' pages out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._guard = Guard(os.environ.get("VLLM_API_KEY") or None, "127.0.0.1")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] in ("http", "websocket"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            # Browsers ask with OPTIONS whether they may send a key.
            is_open = path in _OPEN or scope.get("method") == "OPTIONS"
            error = self._guard.refusal(scope, is_open=is_open)
        await (self._app if error is None else response(error))(scope, receive, send)

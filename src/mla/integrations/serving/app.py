"""The application: Transformers' FastAPI app, without the routes that are not ours, behind key and errors."""

import asyncio
import contextlib
import importlib.metadata
import inspect
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from mla.errors import MLAError
from mla.integrations.serving.answers import ChatEndpoint, CompletionEndpoint
from mla.integrations.serving.generation import Engine
from mla.integrations.serving.guard import Guard, response
from mla.integrations.serving.requests import ApiError, check_model

_POSTED = {"/v1/chat/completions", "/v1/completions"}
_ROUTES = _POSTED | {"/v1/models", "/health"}
#: Bytes of a request, refused beyond. A prompt of a million tokens, as ids or as text, has a third of them.
_MOST_BODY = 32 * 2**20
_NEEDED = {"model_manager", "chat_handler", "completion_handler", "generation_state"}


class _OneModel:
    """What the application asks its model manager for: the list of models, and to go."""

    def __init__(self, engine: Engine) -> None:
        self._entry: dict[str, Any] = {
            "id": engine.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "mla",
            "max_model_len": engine.limit,
        }

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [self._entry]

    def retrieve(self, name: str) -> dict[str, Any]:
        """The model by its name, which may be a path; raises ApiError."""
        check_model(name, self._entry["id"])
        return self._entry

    def shutdown(self) -> None:
        """The model goes with the process."""


def build_app(engine: Engine, api_key: str | None = None, *, host: str | None = None) -> ASGIApp:
    """The server's application.

    Args:
        engine: answers the requests.
        api_key: what clients must send with every request below /v1; None asks for nothing.
        host: the address it listens on. One of this machine only is without a key answered to its own names
            only, since a page in a browser here may be anybody's. None answers to every name.

    Raises:
        MLAError: the installed Transformers builds its server in a way that is not known here.
    """
    parameters = set(inspect.signature(build_server).parameters)
    if not parameters >= _NEEDED:
        raise MLAError(
            f"this Transformers builds its server without {', '.join(sorted(_NEEDED - parameters))}; "
            f"install one that mla asks for: pip install '{_wanted()}'"
        )
    # Handlers of routes that are taken away below.
    unused = {name: None for name in parameters - _NEEDED if name.endswith("_handler")}
    models = _OneModel(engine)
    app: FastAPI = build_server(
        model_manager=models,
        chat_handler=ChatEndpoint(engine),
        completion_handler=CompletionEndpoint(engine),
        generation_state=GenerationState(),
        **unused,
    )
    # Among the others are two that load and unload models for anybody who asks.
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in _ROUTES]
    app.add_api_route("/v1/models/{name:path}", models.retrieve)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    # What recurses here is what a client nests; the model runs on a thread that has handlers of its own.
    app.add_exception_handler(RecursionError, _refuse)
    app.add_exception_handler(Exception, _fail)
    return _Gate(app, api_key, host)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """Any refusal in OpenAI's form."""
    if isinstance(error, HTTPException):
        error = ApiError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    elif isinstance(error, RecursionError):
        error = ApiError("the body of the request: expected less nesting, got more than can be read")
    elif not isinstance(error, ApiError):
        error = ApiError("the body of the request: expected a JSON object")
    return JSONResponse(error.body, status_code=error.status)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    """A fault of the server in OpenAI's form; the log has the traceback."""
    fault = ApiError(f"{request.method} {request.url.path}: {type(error).__name__}: {error}", status=500)
    # The error goes on to uvicorn, which logs it and ends the connection: the client must not use it again.
    return JSONResponse(fault.body, status_code=500, headers={"Connection": "close"})


class _Gate:
    """Asks for the key, keeps other sites' pages out, and ends work on a request when its client has gone.

    Transformers' server notices that only while it streams; an answer that is to come whole would be written
    to its end for nobody.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, host: str | None) -> None:
        self._app = app
        self._guard = Guard(api_key, host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif (error := self._refusal(scope)) is not None:
            await response(error)(scope, receive, send)
        else:
            await self._while_connected(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        error = self._guard.refusal(scope, is_open=not scope["path"].startswith("/v1"))
        # A page of any site may send other types without asking first. FastAPI takes none at all for JSON.
        kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
        if error is None and scope["method"] == "POST" and scope["path"] in _POSTED and not _is_json(kind):
            return ApiError(f"Content-Type: expected application/json, got {kind[:80] or 'none'}", status=415)
        return error

    async def _while_connected(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, gone = asyncio.Event(), asyncio.Event()
        size = 0

        async def body() -> Message:
            """What the application receives: a body of bounded size, then nothing until the client goes."""
            nonlocal size
            if not read.is_set():
                message = await receive()
                size += len(message.get("body", b""))
                if size > _MOST_BODY or not message.get("more_body", False):
                    read.set()
                if size <= _MOST_BODY:
                    return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            await read.wait()
            if size > _MOST_BODY:  # nobody waits for the rest, which may have no end
                return
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answer = asyncio.ensure_future(self._app(scope, body, send))
        watcher = asyncio.create_task(watch())
        try:
            await asyncio.wait({answer, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer
            if answer.cancelled() and size > _MOST_BODY:
                wanted = f"the body of the request: expected up to {_MOST_BODY} bytes, got more"
                refusal = JSONResponse(ApiError(wanted, status=413).body, 413, {"Connection": "close"})
                await refusal(scope, receive, send)
        finally:
            watcher.cancel()
            answer.cancel()


def _wanted() -> str:
    """The range of Transformers that this package requires."""
    try:
        asked = importlib.metadata.requires("mla") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        asked = []
    return next((each for each in asked if each.startswith("transformers")), "transformers")


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == "application/json"

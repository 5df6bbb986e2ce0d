"""Who is answered: who knows the key, or, where there is none, who calls this machine by its own names."""

import hmac

from starlette.responses import JSONResponse
from starlette.types import Scope

from mla.integrations.serving.requests import ApiError
from mla.machine import is_local


class Guard:
    """Looks at the headers of a request.

    Args:
        api_key: what clients must send; None asks for nothing.
        host: the address that the server listens on; None answers to every name.
    """

    def __init__(self, api_key: str | None, host: str | None) -> None:
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        # A browser sends the name that a page has. It may have come to point here once the page was loaded:
        # then what the page asks looks to the browser as if it went to the page's own server.
        self.by_local_names = host is not None and is_local(host) and api_key is None

    def refusal(self, scope: Scope, *, is_open: bool) -> ApiError | None:
        """Why a request is not answered; of one that ``is_open`` no key is asked."""
        headers = dict(scope["headers"])
        if not is_open and not self._knows(headers.get(b"authorization", b"")):
            return ApiError("Incorrect API key provided", status=401, code="invalid_api_key")
        host = headers.get(b"host", b"").decode("latin-1")
        if self.by_local_names and host and not is_local(_without_port(host)):
            wanted = "Host: expected 127.0.0.1, [::1] or localhost, since this server is for its own machine"
            return ApiError(f"{wanted}, got {host[:80]}; with --api-key it answers to every name", status=403)
        return None

    def _knows(self, key: bytes) -> bool:
        return self._expected is None or hmac.compare_digest(key, self._expected)


def response(error: ApiError) -> JSONResponse:
    """A refusal in OpenAI's form."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JSONResponse(error.body, error.status, headers)


def _without_port(host: str) -> str:
    """The name or the address in a Host header."""
    name, colon, port = host.rpartition(":")
    name = name if colon and port.isdecimal() else host
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name

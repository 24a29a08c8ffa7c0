"""What a client is told when it is refused, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from tornado.web import HTTPError

from nbengine.errors import NBEngineError, RequestError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class Refusal(HTTPError):  # noqa: N818 - what a client gets, not what went wrong
    """Ends a request with this status; `param` is the field at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status)
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: NBEngineError) -> Refusal:
    """What a client is told of an engine's error."""
    if isinstance(error, RequestError):
        return Refusal(500, str(error), code="request_failed")
    return Refusal(503, str(error), code="engine_unavailable", headers={"Retry-After": "5"})


def own_fault(status: int = 500) -> Refusal:
    """What a client is told of an error of ours."""
    return Refusal(status, "the server met an error; its log says which", code="internal_error")

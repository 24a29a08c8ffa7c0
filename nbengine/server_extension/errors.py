"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from http.client import responses
from typing import Any

from tornado.web import HTTPError

BUSY = 1  # seconds until it is worth asking again for what is not there yet

CODES = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class APIError(HTTPError):
    """An answer in place of the one asked for. The message is for the person at the client, and says what to do."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(status)
        self.message = message
        self.code = code or CODES.get(status)
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> bytes:
        return body(self.status_code, self.message, self.code, self.param)


def body(status: int, message: str, code: str | None, param: str | None = None) -> bytes:
    kind = "invalid_request_error" if status < 500 else "service_unavailable" if status == 503 else "server_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def as_api_error(status: int, error: BaseException | None) -> APIError:
    """Any failure of a handler, with nothing in it that was not meant for the client."""
    if isinstance(error, APIError):
        return error
    told = error.log_message if isinstance(error, HTTPError) and error.log_message and not error.args else None
    return APIError(status, told or responses.get(status, "unknown error"))


def unavailable(message: str, code: str) -> APIError:
    """503: the client may ask again soon, and OpenAI's own does."""
    return APIError(503, message, code=code, retry_after=BUSY)

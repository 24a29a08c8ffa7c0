"""Refusals of the extension's own, beside those that come from engines."""

from __future__ import annotations

from http.client import responses

from tornado.web import HTTPError

from nbengine.serve.refusal import Refusal

SOON = "1"  # seconds until it is worth asking again for what is not there yet; OpenAI's client does by itself


def unavailable(message: str, code: str) -> Refusal:
    """503: it may be there soon."""
    return Refusal(503, message, code=code, headers={"Retry-After": SOON})


def as_refusal(status: int, error: BaseException | None) -> Refusal:
    """Any failure of a handler, with nothing in it that was not meant for the client."""
    if isinstance(error, Refusal):
        return error
    told = error.log_message if isinstance(error, HTTPError) and not error.args else None
    return Refusal(status, told or responses.get(status, "unknown error"))

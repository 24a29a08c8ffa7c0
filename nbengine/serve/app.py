"""Which path is answered by what."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tornado.web import Application

from nbengine.serve.generation import ChatCompletions, Completions
from nbengine.serve.handlers import Detokenize, Health, Load, Metrics, Model, Models, NotFound, OpenAPI, Tokenize, Version

if TYPE_CHECKING:
    from tornado.web import RequestHandler

    from nbengine.serve.listener import Listener

log = logging.getLogger("nbengine.serve")

ROUTES: list[tuple[str, type[RequestHandler]]] = [
    (r"/v1/models", Models),
    (r"/v1/models/(.+)", Model),
    (r"/v1/completions", Completions),
    (r"/v1/chat/completions", ChatCompletions),
    (r"/tokenize", Tokenize),
    (r"/detokenize", Detokenize),
    (r"/health", Health),
    (r"/version", Version),
    (r"/metrics", Metrics),
    (r"/load", Load),
    (r"/openapi\.json", OpenAPI),
]


def application(listener: Listener) -> Application:
    """Tornado's application for one server."""
    settings: dict[str, Any] = {"log_function": _log, "default_handler_class": NotFound, "default_handler_args": {"listener": listener}}
    return Application([(path, handler, {"listener": listener}) for path, handler in ROUTES], **settings)


class _NoHeaders(logging.Filter):
    """Leaves out what tornado quotes of a request that it cannot read: it may be the header with the key."""

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("Malformed HTTP message"):
            record.msg, record.args = "Malformed HTTP message", ()
        return True


NO_HEADERS = _NoHeaders()


def log_no_headers() -> None:
    """From now on, whatever the level of tornado's log."""
    logging.getLogger("tornado.general").addFilter(NO_HEADERS)


def _log(handler: RequestHandler) -> None:
    """One line at debug level: no header, no body."""
    user = getattr(handler, "user", None)
    log.debug(
        "%s %s %d %.1f ms%s", handler.request.method, handler.request.path, handler.get_status(), 1e3 * handler.request.request_time(),
        f" user={user!r}" if user else "",
    )  # fmt: skip

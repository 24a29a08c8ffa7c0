"""What all handlers share: who may ask, and errors that OpenAI's clients understand."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado.web import HTTPError, authenticated

from nbengine.serve.refusal import Refusal
from nbengine.server_extension.refusals import as_refusal

if TYPE_CHECKING:
    from nbengine.server_extension.app import NBEngineApp

KEY = "a Jupyter token of this server is the API key: `jupyter server list` shows it, and JupyterHub's token page makes one"
Method = TypeVar("Method", bound=Callable[..., Any])


def may(action: str) -> Callable[[Method], Method]:
    """The method is for whoever is logged in and may do this ("read", "execute") to the resource `nbengine`."""

    def decorate(method: Method) -> Method:
        checked: Any = authorized(action)
        checked = authenticated(checked(method))

        @functools.wraps(method)
        async def asked(self: OpenAIHandler, *args: str) -> None:
            if self.wrong is not None:
                raise self.wrong
            await checked(self, *args)

        return cast("Method", asked)

    return decorate


class OpenAIHandler(APIHandler):
    """Authenticated as the rest of the server is."""

    auth_resource = "nbengine"
    _track_activity = False  # a scraper of metrics is no activity; what is, `Activity` says
    wrong: HTTPError | None = None  # what was seen to be wrong before the body was there

    @property
    def app(self) -> NBEngineApp:
        return cast("NBEngineApp", self.settings["nbengine"])

    async def prepare(self) -> None:  # type: ignore[override]
        """Before any of the body is read."""
        try:
            await super().prepare()
        except HTTPError as error:
            if error.status_code == 403 and self.current_user is None and self.check_host():
                self.refuse_stranger()
            else:
                raise
        if self.current_user is None and self.request.method != "OPTIONS" and not self._finished:
            self.refuse_stranger()

    def refuse_stranger(self) -> None:
        sent = "the API key is not one of this server's" if "Authorization" in self.request.headers else "no API key was sent"
        raise Refusal(401, f"{sent}: {KEY}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        refusal = as_refusal(status_code, kwargs.get("exc_info", (None, None))[1])
        for name, value in refusal.headers.items():
            self.set_header(name, value)
        self.finish(json.dumps(refusal.body()))

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        """Answers that are no fault of ours stand in the server's log as every request does, where no token is shown."""
        if not isinstance(value, HTTPError):
            super().log_exception(typ, value, tb)

"""What stands in for an engine's server in a kernel, and what the tests read of an answer."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from tornado.httpclient import HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets, bind_unix_socket
from tornado.web import Application, RequestHandler

from nbengine.serve import announce

KERNELS = ["1a2b3c4d-0000-4000-8000-000000000001", "5e6f7a8b-0000-4000-8000-000000000002"]


class Upstream:
    """It answers from a table and remembers what it was asked."""

    def __init__(self, kernel_id: str | None, number: int = 0, *, pid: int | None = None, **told: Any) -> None:
        self.asked: list[HTTPServerRequest] = []
        self.answers: dict[str, Any] = {}
        self.left = asyncio.Event()  # set when a client goes before it has its answer
        self.secret = told.pop("secret", "the-kernels-secret")
        self.models = told.pop("models", ["tales"])
        self.kernel_id = kernel_id
        self.number = number
        self.pid = pid or (os.getppid() if kernel_id == KERNELS[0] else os.getpid())  # two that live, the older one first
        self.told = told
        self.server: HTTPServer | None = None

    @property
    def file(self) -> Path:
        return Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"nbengine-{self.pid}-{self.number}.json"

    async def start(self, socket: str | None = None) -> None:
        self.server = HTTPServer(Application([(".*", _Answer, {"upstream": self})]), max_buffer_size=1 << 30)
        sockets = [bind_unix_socket(socket)] if socket else bind_sockets(0, "127.0.0.1")
        self.server.add_sockets(sockets)
        self.port = None if socket else sockets[0].getsockname()[1]
        self.announce(**({"socket": socket} if socket else {"url": f"http://127.0.0.1:{self.port}"}))

    def announce(self, **told: Any) -> None:
        whole = {
            "version": 1, "pid": self.pid, "started": announce.started(self.pid), "kernel_id": self.kernel_id,
            "secret": self.secret, "models": self.models, "state": "ready", **self.told, **told,
        }  # fmt: skip
        self.told |= told
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(whole))
        self.file.chmod(0o600)

    async def close(self) -> None:
        self.file.unlink(missing_ok=True)
        if self.server is not None:
            self.server.stop()
            await self.server.close_all_connections()


class _Answer(RequestHandler):
    def initialize(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.gone = False

    async def prepare(self) -> None:
        upstream = self.upstream
        upstream.asked.append(self.request)
        if self.request.headers.get("Authorization") != f"Bearer {upstream.secret}":
            self.set_status(401)
            self.finish({"error": {"message": "wrong secret"}})
            return
        answer = upstream.answers.get(self.request.path, 404)
        if callable(answer):
            await answer(self)
        elif isinstance(answer, int):
            self.set_status(answer)
            self.finish({"error": {"message": f"upstream says {answer}", "param": "x"}})
        else:
            self.finish(answer)

    async def piece(self, chunk: bytes | str) -> None:
        self.write(chunk)
        try:
            await self.flush()
        except StreamClosedError:
            self.gone = True

    def on_connection_close(self) -> None:
        self.gone = True
        self.upstream.left.set()

    def log_exception(self, *about: Any) -> None:
        pass


def told(response: HTTPResponse) -> dict[str, Any]:
    """The error in an answer; it has OpenAI's shape."""
    whole = json.loads(response.body)
    assert set(whole) == {"error"}
    assert set(whole["error"]) == {"message", "type", "param", "code"}
    assert response.headers["Content-Type"].startswith("application/json")
    return whole["error"]

"""Requests that one engine answers, passed to it and back as they come."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any
from urllib.parse import quote

import msgspec
from tornado.httputil import HTTPHeaders
from tornado.web import HTTPError, stream_request_body

from nbengine.serve.refusal import Refusal
from nbengine.server_extension.base import OpenAIHandler, may
from nbengine.server_extension.engines import Engine
from nbengine.server_extension.refusals import unavailable
from nbengine.server_extension.upstream import EngineGoneError, Exchange

# Nothing else goes from one side to the other: no token or cookie to the kernel, nothing of the connection to the client.
THERE = ("Accept", "Content-Type", "User-Agent", "X-Request-Id")
BACK = ("Cache-Control", "Content-Length", "Content-Type", "Retry-After", "X-Accel-Buffering", "X-Request-Id")

STREAM = "text/event-stream"
DRAINED = 8  # times the largest body: as much of what is refused is read, and dropped, so that the client gets to read why


@stream_request_body
class RelayHandler(OpenAIHandler):
    """Takes a body up to the limit (which engine it is for stands in it), then passes the answer on piece by piece.

    A piece is read when the client has taken the one before, so a slow client holds up the engine's server, not our memory.
    """

    _body: bytearray
    _size = 0
    _exchange: Exchange | None = None
    _refused = False

    def initialize(self) -> None:
        self._body = bytearray()
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def prepare(self) -> None:  # type: ignore[override]
        """Before any of the body is read. A stranger's is, and is dropped: a client that is sending hears nothing."""
        connection: Any = self.request.connection
        connection.set_max_body_size(DRAINED * self.app.max_body_size)
        try:
            await super().prepare()
        except HTTPError as error:
            if self.request.method != "POST":
                raise
            self.wrong = error

    def data_received(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self.wrong is None and self._size <= self.app.max_body_size:
            self._body += chunk
        else:
            self._body.clear()

    def on_connection_close(self) -> None:
        """The client has gone, so the engine need not go on."""
        if not self._left.done():
            self._left.set_result(None)
        if self._exchange is not None:
            self._exchange.close()

    def taken(self) -> bytes:
        """The request's body."""
        assert self.wrong is None
        if self._size > self.app.max_body_size:
            raise Refusal(413, f"the body has {self._size} bytes, and this server takes {self.app.max_body_size}")
        return bytes(self._body)

    async def relay(self, engine: Engine, path: str, body: bytes) -> None:
        """Let the engine answer this request."""
        headers = HTTPHeaders({name: self.request.headers[name] for name in THERE if name in self.request.headers})
        self._exchange = Exchange(engine, self._take_head, self._take)
        if self._left.done():
            return
        counted = self.app.activity.of(engine.kernel_id, engine.label) if self.request.method == "POST" else nullcontext()
        with counted:
            try:
                await self._exchange.run(str(self.request.method), quote(path), headers, body)
            except EngineGoneError:
                if not self._left.done():
                    self._break_off(engine)
        if self._refused:
            raise Refusal(502, f"what listens at the address of kernel {engine.short} is not its engine: run its %engine serve again")

    async def _take_head(self, status: int, headers: HTTPHeaders) -> None:
        self._refused = status in {401, 403}  # our secret, not the client's key
        if self._refused:
            return
        self.set_status(status)
        for name in BACK:
            if name in headers:
                self.set_header(name, headers[name])
        if headers.get("Content-Type", "").startswith(STREAM):
            await self._flushed()  # the client knows that it is heard before the first token comes

    async def _take(self, chunk: bytes) -> None:
        if not self._refused:
            self.write(chunk)
            await self._flushed()

    async def _flushed(self) -> None:
        flushed = asyncio.ensure_future(self.flush())
        if not flushed.done():
            await asyncio.wait({flushed, self._left}, return_when=asyncio.FIRST_COMPLETED)

    def _break_off(self, engine: Engine) -> None:
        """The engine went in the middle: the client is not to take what it has for the whole."""
        message = f"the engine of kernel {engine.short} has gone: its kernel was restarted or ended, or the engine was closed"
        refusal = unavailable(message, "engine_gone")
        if not self._headers_written:
            raise refusal
        if self._headers.get("Content-Type", "").startswith(STREAM):
            self.finish(b"\n\ndata: " + msgspec.json.encode(refusal.body()) + b"\n\n")
        else:
            connection: Any = self.request.connection
            connection.close()


class ModelHandler(RelayHandler):
    """The engine is the one that serves the model which the body names."""

    @may("execute")
    async def post(self, path: str) -> None:
        taken = self.taken()
        try:
            fields = msgspec.json.decode(taken, type=dict[str, msgspec.Raw])
            model = msgspec.json.decode(fields["model"], type=str | None) if "model" in fields else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(400, f"the body has to be a JSON object whose `model` is a string: {error}", code="invalid_body") from None
        if model is None:
            engine = self.app.engines.only()
        else:
            engine, plain = self.app.engines.find(model)
            if plain != model:
                taken = msgspec.json.encode({**fields, "model": plain})
        await self.relay(engine, path, taken)


class KernelHandler(RelayHandler):
    """The engine is the one of the kernel in the path."""

    @may("execute")
    async def post(self, label: str, path: str) -> None:
        await self.relay(self.app.engines.called(label), path, self.taken())

    @may("read")
    async def get(self, label: str, path: str) -> None:
        await self.relay(self.app.engines.called(label), path, self.taken())


class NothingHandler(RelayHandler):
    @may("read")
    async def get(self) -> None:
        raise Refusal(404, f"there is nothing at {self.request.path}: clients take {self.base_url}nbengine/v1 as their base URL")

    post = get

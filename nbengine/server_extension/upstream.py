"""A request to an engine's server in a kernel: on a connection of its own, read no faster than its reader takes it."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tornado.http1connection import HTTP1Connection, HTTP1ConnectionParameters
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, RequestStartLine, ResponseStartLine
from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpclient import TCPClient

from nbengine.server_extension.engines import Engine

CONNECT = 5.0  # seconds; a listener on this machine takes a connection at once, or is not there
SHORT = 5.0  # seconds, for an answer that an engine has at hand
LARGEST = 16 << 20  # bytes of one
CHUNK = 1 << 16  # bytes read ahead of the reader, at most

log = logging.getLogger("nbengine")


class EngineGoneError(Exception):
    """Nobody listens at the engine's address, or what listens closed the connection before the answer was whole."""


class Exchange(HTTPMessageDelegate):
    """One request and its answer, which goes to the reader piece by piece. What runs in the server's loop owns it."""

    def __init__(
        self, engine: Engine, on_head: Callable[[int, HTTPHeaders], Awaitable[None]], on_data: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self.engine = engine
        self._on_head = on_head
        self._on_data = on_data
        self._stream: IOStream | None = None
        self._whole = False
        self._closed = False

    async def run(self, method: str, path: str, headers: HTTPHeaders, body: bytes) -> None:
        """From the connection to the answer's last byte; EngineGoneError when that does not come, or `close` was called."""
        headers = HTTPHeaders(headers)
        headers["Host"] = f"[{self.engine.host}]" if ":" in self.engine.host else self.engine.host or "localhost"
        headers["Authorization"] = f"Bearer {self.engine.secret}"
        headers["Connection"] = "close"
        if body or method == "POST":
            headers["Content-Length"] = str(len(body))
        try:
            self._stream = await _connect(self.engine)
            if self._closed:
                return
            params = HTTP1ConnectionParameters(no_keep_alive=True, chunk_size=CHUNK, max_body_size=sys.maxsize)
            connection = HTTP1Connection(self._stream, is_client=True, params=params)
            connection.write_headers(RequestStartLine(method, path, ""), headers, body or None)
            connection.finish()
            await connection.read_response(self)
        except (OSError, TimeoutError, StreamClosedError) as error:
            raise EngineGoneError(str(error)) from None
        finally:
            self.close()
        if not self._whole:
            raise EngineGoneError("the answer ended too soon")

    def close(self) -> None:
        """The reader has gone, or everything is read: the engine's server sees it at once and ends the request."""
        self._closed = True
        if self._stream is not None:
            self._stream.close()

    # ── what tornado calls ──────────────────────────────────────────────────────────────────────────────────────────

    async def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        assert isinstance(start_line, ResponseStartLine)
        if start_line.code >= 200:  # the others only say that an answer will come
            await self._on_head(start_line.code, headers)

    def data_received(self, chunk: bytes) -> Awaitable[None]:
        return self._on_data(chunk)  # awaited before more is read

    def finish(self) -> None:
        self._whole = True

    def on_connection_close(self) -> None:
        self._whole = False


async def _connect(engine: Engine) -> IOStream:
    if engine.socket is None:
        return await TCPClient().connect(engine.host, engine.port, timeout=CONNECT)
    stream = IOStream(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    async with asyncio.timeout(CONNECT):
        return await stream.connect(engine.socket)


@dataclass
class Answer:
    """A short one, read whole."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)


async def fetch(engine: Engine, path: str) -> Answer | None:
    """What an engine answers to a GET; None if it is gone, busy for too long, or answers with more than is sensible."""
    answer = Answer()

    async def head(status: int, _: HTTPHeaders) -> None:
        answer.status = status

    async def take(chunk: bytes) -> None:
        if len(answer.body) + len(chunk) > LARGEST:
            exchange.close()
        answer.body += chunk

    exchange = Exchange(engine, head, take)
    alarm = asyncio.get_running_loop().call_later(SHORT, exchange.close)
    try:
        await exchange.run("GET", path, HTTPHeaders(), b"")
    except EngineGoneError as error:
        log.debug("the engine of kernel %s did not answer: %s", engine.label, error)
        return None
    finally:
        alarm.cancel()
    return answer if answer.status else None

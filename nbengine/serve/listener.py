"""A server as it runs: sockets, keys, the announcement, and what its clients wait for. Holds no engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, time
from typing import TYPE_CHECKING, Protocol

from nbengine import collector
from nbengine.errors import NBEngineError
from nbengine.serve import announce
from nbengine.serve.intake import ExpectingServer, Intake
from nbengine.serve.pacer import Listening, Pacer
from nbengine.serve.refusal import Refusal
from nbengine.serve.unix_socket import OwnPath, bind_path

if TYPE_CHECKING:
    from tornado.httpserver import HTTPServer

    from nbengine.engine import Engine
    from nbengine.front import Front
    from nbengine.request import Request
    from nbengine.serve.generation import Generation
    from nbengine.serve.latency import Latency
    from nbengine.serve.serve_options import ServeOptions
    from nbengine.serve.traffic import Traffic

log = logging.getLogger("nbengine.serve")
PROMISE = 0.1  # seconds until a stream that has no token yet gets its headers
LOOK = 1.0  # seconds between two looks at streams that are silent or stalled
SILENCE = 10.0  # seconds after which a stream gets a comment
PATIENCE = 2.0  # seconds that what runs gets to end when a server is closed
BACKLOG = 1024  # connections that may come at once
MOST_PREPARING = 2  # threads for long prompts


class Watched(Protocol):
    """What a client is being sent."""

    written: float  # when it last took something, or was sent it
    waits: bool  # for the client

    def open(self) -> None:
        """Nothing has been sent for PROMISE seconds."""

    def ping(self) -> None:
        """Nothing has been sent for SILENCE seconds."""

    def stall(self) -> None:
        """The client has taken nothing for as long as it may."""


class Listener:
    """Everything is done in the front's thread, but `state`, `check_key` and `close`, which any thread may use."""

    def __init__(self, front: Front, options: ServeOptions, names: tuple[str, ...], traffic: Traffic, latency: Latency) -> None:
        self.front = front
        self.options = options
        self.names = names
        self.traffic = traffic
        self.latency = latency
        self.engine_of: Callable[[], Engine | None] = lambda: None  # a weak reference, once there is an engine
        self.secret = secrets.token_urlsafe(32)
        self.intake = Intake(front.loop, lambda requests: self.engine(awake=False).queue(requests))
        self.pacer = Pacer(front.loop)
        self.preparing = ThreadPoolExecutor(MOST_PREPARING, thread_name_prefix=f"prompts-of-{front.name}")
        self.watched: set[Watched] = set()
        self.running: set[Generation] = set()  # what is being answered
        self.created = time()
        self.url: str | None = None
        self.closed = False
        self._keys = [hashlib.sha256(key.encode()).digest() for key in (self.secret, options.api_key) if key is not None]
        self._state: announce.State = "loading"
        self._file: Path | None = None
        self._writing = threading.Lock()  # the announcement
        self._server: HTTPServer | None = None
        self._sockets: list[socket.socket] = []
        self._path: OwnPath | None = None  # of the Unix socket
        self._over = threading.Event()  # closing it is
        self._looking = False
        self._opening = False
        self._puts_off = False  # full collections of garbage

    # ── coming and going ────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, state: announce.State) -> None:
        """Listen, and say so. Not to be called in the front's thread."""
        self._state = state
        collector.put_off()
        self._puts_off = True
        try:
            self.front.call(self._listen).result()
            self._announce()
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        from tornado.netutil import bind_sockets

        from nbengine.serve.app import application, log_no_headers

        options = self.options
        try:
            if options.uds is not None:
                bound, self._path = bind_path(options.uds, BACKLOG)
                self._sockets = [bound]
            else:
                self._sockets = bind_sockets(options.port, options.host, backlog=BACKLOG)
        except OSError as error:
            where = options.uds or f"{options.host}:{options.port}"
            other = "choose another path" if options.uds else "choose another port, or port=0 for any that is free"
            raise OSError(f"cannot listen at {where}: {error.strerror or error}; {other}") from None
        sockets = self._sockets
        log_no_headers()
        server = ExpectingServer(
            application(self),
            max_header_size=64 << 10,
            max_body_size=options.max_body_size,
            body_timeout=options.body_timeout,
            idle_connection_timeout=75.0,
            no_keep_alive=False,
        )
        server.intake = self.intake
        server.add_sockets(sockets)
        self._server = server
        if options.uds is None:
            host, port = sockets[0].getsockname()[:2]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - where this machine reaches it
            self.url = f"http://{f'[{host}]' if sockets[0].family == socket.AF_INET6 else host}:{port}"

    def _announce(self) -> None:
        with self._writing:
            if self.closed:
                return
            self._file = announce.write(
                secret=self.secret,
                models=list(self.names),
                engine=self.traffic.engine_id,
                state=self._state,
                url=self.url,
                socket=self.options.uds,
                file=self._file,
            )

    @property
    def state(self) -> announce.State:
        """As it is announced."""
        return self._state

    @state.setter
    def state(self, state: announce.State) -> None:
        if state != self._state:
            self._state = state
            if self._file is not None:
                self._announce()

    @property
    def file(self) -> Path | None:
        """The announcement, which has the secret."""
        return self._file

    def close(self) -> None:
        """Stop listening and end what is being answered. Harmless when it is closed, or is being: then it waits for the end of that,
        but in the front's thread. From any thread.
        """
        with self._writing:
            first, self.closed = not self.closed, True
            if first and self._file is not None:
                announce.remove(self._file)
        if not first:
            if not self.front.is_current:
                self._over.wait(PATIENCE + 1.0)
            return
        try:
            self._end_all()
        finally:
            self._over.set()

    def _end_all(self) -> None:
        if self._puts_off:
            collector.allow()
        if self.front.is_current:
            self._stop()
        else:
            ending = self._end()
            try:
                self.front.run(ending).wait(PATIENCE + 1.0)
            except NBEngineError:  # the front has ended before
                ending.close()
        for one in self._sockets:
            one.close()
        if self._path is not None:
            self._path.remove()
        self.preparing.shutdown(wait=False, cancel_futures=True)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        for generation in list(self.running):
            generation.end(Refusal(503, "the server was closed", code="server_closed"))

    async def _end(self) -> None:
        self._stop()
        deadline = monotonic() + PATIENCE / 2
        while self.running and monotonic() < deadline:  # noqa: ASYNC110 - each ends by itself, and this happens once
            await asyncio.sleep(0.005)
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.close_all_connections(), PATIENCE / 2)

    # ── for the handlers ────────────────────────────────────────────────────────────────────────────────────────────

    def check_key(self, given: str | None) -> bool:
        """Whether this is the secret or the key; takes as long whatever is wrong with it."""
        digest = hashlib.sha256((given or "").encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return any(matches)

    def engine(self, *, awake: bool = True) -> Engine:
        """The engine, if it can be asked. Do not keep it."""
        engine = self.engine_of()
        if self._state == "loading":
            raise Refusal(503, "the model is still being loaded", code="loading", headers={"Retry-After": "5"})
        status = "closed" if engine is None else engine.status
        if engine is None or status in {"closed", "dead"}:
            raise Refusal(503, f"the engine is {status}", code=f"engine_{status}", headers={"Retry-After": "30"})
        if awake and status == "asleep":
            raise Refusal(
                503, "the engine is asleep: wake it up with engine.wake_up()", code="engine_asleep", headers={"Retry-After": "30"}
            )
        return engine

    def name_of(self, asked: str | None) -> str:
        """The model's name as answers tell it; refused when it is another's. `NAME@KERNEL` is this kernel's."""
        name, at, kernel = (asked or self.names[0]).rpartition("@")
        if asked is None or asked in self.names:
            return asked or self.names[0]
        own = announce.kernel_id()
        if at and len(kernel) >= 4 and own is not None and own.startswith(kernel) and name in self.names:
            return asked
        raise Refusal(
            404, f"the model {asked!r} is not served here; there is {', '.join(self.names)}", param="model", code="model_not_found"
        )

    def check_queue(self, count: int, *, most: int, param: str) -> None:
        """Refuse more outputs than there is a place for, now or ever."""
        if count > most:
            raise Refusal(
                400, f"this asks for {count} outputs at once, and this server takes {most}: send fewer", param=param, code="invalid_value"
            )
        if self.traffic.open_sequences + count > most:
            seconds = max(1, min(60, round(self.traffic.lasted)))
            raise Refusal(429, "the queue is full: try again later", code="queue_full", headers={"Retry-After": str(seconds)})

    @contextlib.contextmanager
    def listening(self, stream: Listening, requests: list[Request], *, at_end: bool) -> Iterator[None]:
        """Let a stream (or whoever waits for the end) be told of these meanwhile."""
        bell, last_bell = self.pacer.bell(stream), self.pacer.last_bell(stream)
        for request in requests:
            if not at_end:
                request.listen(bell)
            request.listen(last_bell, at_end=True)
        try:
            yield
        finally:
            for request in requests:
                request.unlisten(bell, last_bell)

    def watch(self, stream: Watched) -> None:
        """Keep it from being silent for long, and a client that takes nothing from staying for ever."""
        self.watched.add(stream)
        if not self._opening:
            self._opening = True
            self.front.loop.call_later(PROMISE, self._open_all)
        if not self._looking:
            self._looking = True
            self.front.loop.call_later(LOOK, self._look)

    def _open_all(self) -> None:
        self._opening = False
        for stream in list(self.watched):
            stream.open()

    def _look(self) -> None:
        now = monotonic()
        for stream in list(self.watched):
            silent = now - stream.written
            if stream.waits:
                if silent > self.options.stall_timeout:
                    stream.stall()
            elif silent > SILENCE:
                stream.ping()
        self._looking = bool(self.watched) and not self.closed
        if self._looking:
            asyncio.get_running_loop().call_later(LOOK, self._look)

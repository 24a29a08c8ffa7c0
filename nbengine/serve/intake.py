"""The way from the front to the engine: what clients send together gets there together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from tornado.httpserver import HTTPServer

from nbengine.errors import NBEngineError
from nbengine.serve.refusal import Refusal, refusal_of

if TYPE_CHECKING:
    from tornado.iostream import IOStream

    from nbengine.request import Request

QUIET = 4  # turns of the loop in which no request came
NEWCOMER = 0.01  # seconds in which whoever has connected is expected to send more
LONGEST = 0.04  # seconds that a request waits while others keep coming

Failed = Callable[[Refusal], None]


class Intake:
    """Queues requests in one message, as soon as the front has read all that is there to be read.

    A step that began with the first of many would let the others wait for its end, and who launches it would take the
    interpreter from who reads them. A request that comes alone waits for a few empty turns of the loop, which take a tenth of a
    millisecond. Everything is done in the front's thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, queue: Callable[[list[Request]], None]) -> None:
        self._loop = loop
        self._queue = queue
        self._waiting: list[tuple[list[Request], Failed]] = []
        self._newcomers: WeakSet[IOStream] = WeakSet()  # connections that no request has come by yet
        self._stirred = 0.0  # when one of them last sent something, on the loop's clock
        self._until = 0.0  # when those that wait go, whoever else comes
        self._quiet = 0  # turns since the last one came
        self._looking = False

    def expect(self, stream: IOStream) -> None:
        """Somebody has connected."""
        self._newcomers.add(stream)
        self.stir()

    def stir(self) -> None:
        """A part of a request has come."""
        self._stirred = self._loop.time()

    def heard(self, stream: IOStream) -> None:
        """A connection has brought a request."""
        self._newcomers.discard(stream)
        self.stir()

    def put(self, requests: list[Request], failed: Failed) -> None:
        """Queue them soon; `failed` is told if they could not be."""
        if not self._waiting:
            self._until = self._loop.time() + LONGEST
        self._waiting.append((requests, failed))
        self._quiet = 0
        if not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)

    def take_back(self, requests: list[Request]) -> None:
        """Nobody wants them any more: if they are still here, they are not queued."""
        self._waiting = [one for one in self._waiting if one[0] is not requests]

    def _look(self) -> None:
        now = self._loop.time()
        if self._waiting and now < self._until:
            self._quiet += 1
            if self._quiet <= QUIET:
                self._loop.call_soon(self._look)
                return
            if self._newcomers and now < self._stirred + NEWCOMER:
                self._looking = False  # whoever comes has it look again, this is for when nobody does
                self._loop.call_later(NEWCOMER / 2, self._look)
                return
        self._looking = False
        self._newcomers.clear()
        self._bring()

    def _bring(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            if waiting:
                self._queue(list(chain.from_iterable(requests for requests, _ in waiting)))
        except (NBEngineError, Refusal) as error:
            refusal = refusal_of(error) if isinstance(error, NBEngineError) else error
            for _, failed in waiting:
                failed(refusal)


class ExpectingServer(HTTPServer):
    """Tornado's server, which tells an intake of who connects."""

    intake: Intake

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        self.intake.expect(stream)
        super().handle_stream(stream, address)

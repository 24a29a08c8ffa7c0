"""Wakes the front for what the engine brought: once a step for all streams together, and no more often than the front can bear."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from nbengine.serve.refusal import own_fault

if TYPE_CHECKING:
    from nbengine.serve.refusal import Refusal

log = logging.getLogger("nbengine.serve")
SHARE = 0.05  # of its time that the front spends on streams before it lets tokens gather
LONGEST = 0.05  # seconds that a token may wait for others to be sent with


class Listening(Protocol):
    """A stream, or whoever else waits for something of a request."""

    fresh: bool  # something new is there, and it has been told
    begun: bool  # it has sent something: what comes next may wait a little

    def pump(self) -> None:
        """Take what is there; in the front's thread."""

    def fail(self, refusal: Refusal) -> None:
        """It cannot go on."""


def serve(stream: Listening) -> None:
    """Have it take what is there. An error on the way ends this one, and no other."""
    try:
        stream.pump()
    except Exception:  # noqa: BLE001 - whoever waits for it is told
        log.error("an answer could not be written:\n%s", traceback.format_exc())  # noqa: TRY400 - as text: a record keeps no frames
        stream.fail(own_fault())


class Pacer:
    """Rung from the engine's thread, hundreds of times a step at best: a ring is two attribute writes and an append.

    A stream that has sent nothing yet is served at once, and so is one that ends. The others gather until the front has rested
    nineteen times as long as their last round took, at most LONGEST: one stream gets every token by itself, a thousand get a
    few at a time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Listening] = deque()  # appended to by engines' threads, taken from by the front's
        self._urgent: deque[Listening] = deque()  # the same, of those that do not wait
        self._woken = False  # the front has been called for those that wait, and has not come yet
        self._called = False  # the same for those
        self._next = 0.0  # when the next round may begin, on the loop's clock
        self.rounds = 0

    def bell(self, stream: Listening) -> Callable[[], None]:
        """What the engine's thread is to call whenever there is something new for it."""

        def ring() -> None:
            if stream.fresh:
                return
            stream.fresh = True
            if stream.begun:
                self._waiting.append(stream)
                if not self._woken:
                    self._woken = True
                    self._call(self._come)
            else:
                self._hurry(stream)

        return ring

    def last_bell(self, stream: Listening) -> Callable[[], None]:
        """What it is to call when nothing more will come, or whoever waits is to look for another reason."""

        def ring() -> None:
            stream.fresh = True
            self._hurry(stream)

        return ring

    def _hurry(self, stream: Listening) -> None:
        self._urgent.append(stream)
        if not self._called:
            self._called = True
            self._call(self._serve_urgent)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop was closed: nobody is left to be served
            return

    def _come(self) -> None:
        wait = self._next - self._loop.time()
        if wait > 0:
            self._loop.call_later(wait, self._serve)
        else:
            self._serve()

    def _serve(self) -> None:
        self._woken = False  # first this, then look: what is added in between calls again
        began = perf_counter()
        _pump(self._waiting)
        self.rounds += 1
        took = perf_counter() - began
        self._next = self._loop.time() + min(took * (1 / SHARE - 1), LONGEST)

    def _serve_urgent(self) -> None:
        self._called = False
        _pump(self._urgent)


def _pump(streams: deque[Listening]) -> None:
    for _ in range(len(streams)):
        stream = streams.popleft()
        stream.fresh = False  # first this, then look: what comes in between rings again
        serve(stream)

"""Waiting for another thread in a way that an interrupt cannot turn against that thread.

threading.Event and concurrent.futures.Future cannot be used between a notebook's main thread and the engine's: a waiter that is
interrupted while it takes their lock back lets go of a lock that the other thread holds, which then dies of it
("release unlocked lock"). A bare lock has no such moment.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Generic, TypeVar

from nbengine.interrupts import hear_interrupts

T = TypeVar("T")


class Bell:
    """One thread waits for it, once; any number ring."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was rung before
            self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """False if `timeout` seconds were not enough."""
        hear_interrupts()
        return self._lock.acquire(timeout=-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))


class Reply(Generic[T]):
    """What a thread is asked for: given, or failed, once, and read by the one who asked."""

    def __init__(self) -> None:
        self.answered = False
        self._bell = Bell()
        self._result: T
        self._error: BaseException | None = None

    def give(self, result: T) -> None:
        self._result = result
        self._answer()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._answer()

    def wait(self, timeout: float | None = None) -> bool:
        """False if `timeout` seconds were not enough. An interrupt comes through, and it may be waited for once more."""
        if not self.answered and self._bell.wait(timeout):
            self._bell.ring()  # for the next one
        return self.answered

    def result(self) -> T:
        """Wait for it, and take it or raise what it failed with."""
        self.wait()
        try:
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            del self  # an error holds this frame: together they would be a cycle

    def _answer(self) -> None:
        self.answered = True  # first this, then the bell: who was interrupted at the bell looks here
        self._bell.ring()

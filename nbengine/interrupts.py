"""Hearing the stop button while a thread waits for another."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any


def hear_interrupts() -> None:
    """Before a wait that may block a running loop: let an interrupt end it, until the loop gets to run again.

    A notebook's kernel (in a cell with a top-level await) and asyncio.run answer an interrupt by cancelling a task of their
    loop, which cannot happen while the loop is blocked: the wait, and what the caller does between two waits, would be deaf.
    In any other place nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    before = signal.getsignal(signal.SIGINT)
    if callable(before) and before is not signal.default_int_handler and not isinstance(before, _Hearing):
        signal.signal(signal.SIGINT, _Hearing(before, loop))


class _Hearing:
    """A handler in the place of a loop's own, which is back when the loop runs or an interrupt came.

    One that came may end the loop's run, whose handler is no more when the loop runs a last time, to be closed.
    """

    def __init__(self, before: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._before = before
        self._restoring = loop.call_soon(self._restore)

    def __call__(self, *_: object) -> None:
        self._restoring.cancel()
        self._restore()
        raise KeyboardInterrupt

    def _restore(self) -> None:
        current: object = signal.getsignal(signal.SIGINT)
        if current is self:
            signal.signal(signal.SIGINT, self._before)

"""Hearing the stop button while a thread waits for another."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_heard() -> Iterator[None]:
    """Let an interrupt end a wait that blocks a running loop.

    A notebook's kernel (in a cell with a top-level await) and asyncio.run answer an interrupt by cancelling a task of their
    loop, which cannot happen while the loop is blocked: the wait would be deaf. In any other place nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or not _in_loop():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or before is signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

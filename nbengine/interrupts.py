"""Hearing the stop button while a thread waits for another."""

from __future__ import annotations

import asyncio
import signal
import threading


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
    if not callable(before) or before is signal.default_int_handler:
        return

    def restore() -> None:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    loop.call_soon(restore)

"""How soon a busy notebook cell lets an engine's thread have the interpreter: at once while that waits for it, else as the user has it."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator

URGENT = 5e-6  # seconds; CPython's default of 5 ms would be added to every step
_PR_SET_TIMERSLACK = 29

_lock = threading.Lock()
_urgent = 0  # threads that may have to wait for the interpreter; the interval is the process's, and so must their number be
_usual = 0.0


@contextlib.contextmanager
def urgent() -> Iterator[None]:
    """Around what lets go of the interpreter and needs it back. Outside of it the interval is the user's, long enough to do much at a time."""
    global _urgent, _usual  # noqa: PLW0603 - see there
    with _lock:
        _urgent += 1
        if _urgent == 1:
            _usual = sys.getswitchinterval()
            if _usual > URGENT:
                sys.setswitchinterval(URGENT)
    try:
        yield
    finally:
        with _lock:
            _urgent -= 1
            if _urgent == 0 and _usual > URGENT and sys.getswitchinterval() < 2 * URGENT:  # else the user has set another meanwhile
                sys.setswitchinterval(_usual)


def wake_promptly() -> None:
    """Have Linux end the waits of the calling thread on time: by default they last 50 microseconds longer, tenfold the interval."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

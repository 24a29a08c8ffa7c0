"""How soon a busy notebook cell lets an engine's thread have the interpreter: sooner while an engine works, as before when none does."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading

WORKING = 5e-6  # seconds; CPython's default of 5 ms would be added to every step, several times over
_PR_SET_TIMERSLACK = 29

_lock = threading.Lock()
_working = 0  # engines; the interval is the process's, and so must their number be
_before = 0.0


def begin() -> None:
    """An engine begins to work."""
    global _working, _before  # noqa: PLW0603 - see there
    with _lock:
        _working += 1
        if _working == 1:
            _before = sys.getswitchinterval()
            if _before > WORKING:
                sys.setswitchinterval(WORKING)


def end() -> None:
    """It is idle again. What the user has set meanwhile stays."""
    global _working  # noqa: PLW0603 - see there
    with _lock:
        _working -= 1
        if _working == 0 and _before > WORKING and abs(sys.getswitchinterval() - WORKING) < WORKING / 2:
            sys.setswitchinterval(_before)


def wake_promptly() -> None:
    """Have Linux end the waits of the calling thread on time: by default they last 50 microseconds longer, tenfold the interval."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

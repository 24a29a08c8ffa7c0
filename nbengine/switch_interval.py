"""Who has the interpreter when a notebook cell keeps Python busy while engines work. When none works all is as the user has it.

CPython lets a thread that waits for the interpreter ask for it after an interval, which is the process's. An engine's thread wants
it back at once where it has let go of it (urgent), and wants to be left alone in the short time that it plans and launches steps
in (working): the rest of the time it waits for the GPU, and the cell runs.

A thread reads the interval when it begins to wait. The cell's does so just after the engine has taken the interpreter back, often
before the engine has set the longer interval: then it asks again within microseconds, and the engine, which has to ask in its turn,
loses the longer interval. To let go for less time than a thread takes to wake up makes it read the interval anew (_set_longer).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from time import perf_counter

# Seconds. CPython's default of 5 ms would be added to every step. With 5 microseconds each turn that one thread asks for waits until the other
# has been given a core, which on busy ones takes longer than the turn: half of the speed is lost there, with 10 to 30 some hundredths.
URGENT = 2e-5
WORKING = 4.9e-3  # and no number that a user would set, who would be taken for this module
_MOMENT, _TRIES = 1e-5, 4  # to let go for an instant takes a tenth of it, where no other thread is quick enough to run then
_PR_SET_TIMERSLACK = 29

_brief = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).abs  # as short a call as there is; ctypes lets go around it
_lock = threading.Lock()
_urgent = 0  # threads that may have to wait for the interpreter; the interval is the process's, and so must these numbers be
_working = 0  # engines with work
_usual = 0.0  # the user's interval
_set = 0.0  # what was set in its place


def begin() -> None:
    """An engine begins to work."""
    _count(working=1)


def end() -> None:
    """It is idle again."""
    _count(working=-1)


@contextlib.contextmanager
def urgent() -> Iterator[None]:
    """Around what lets go of the interpreter and needs it back."""
    _count(urgent=1)
    try:
        yield
    finally:
        _count(urgent=-1)


def put_others_off() -> None:
    """Have whoever waits for the interpreter wait for the whole interval from now on."""
    if _working and not _urgent:
        with _lock:
            if _is_set_to(_set):
                _set_longer(_set)


def _count(*, urgent: int = 0, working: int = 0) -> None:
    global _urgent, _working, _usual, _set  # noqa: PLW0603 - see there
    with _lock:
        if not (_urgent or _working):
            _usual = _set = sys.getswitchinterval()
        elif not _is_set_to(_set):  # the user has set another meanwhile, which is to stay
            _usual = sys.getswitchinterval()
        _urgent += urgent
        _working += working
        before, _set = _set, min(URGENT if _urgent else WORKING if _working else _usual, _usual)
        (_set_longer if _working and _set > before else _set_to)(_set)


def _set_longer(interval: float) -> None:
    """Set an interval that those who wait already read too."""
    short = min(URGENT, interval)
    for _ in range(_TRIES):
        _set_to(short)
        began = perf_counter()
        _brief(0)  # whoever waits is woken, and before it runs the interpreter is taken again
        if not _is_set_to(short):
            return  # it did run, and was the user setting another, which the next to look here finds
        _set_to(interval)  # which it finds when it goes on to wait
        if perf_counter() - began < _MOMENT:  # else it was quicker for once, and may have begun to wait again before the last line
            return


def _is_set_to(interval: float) -> bool:
    return abs(sys.getswitchinterval() - interval) < 1.5e-6


def _set_to(interval: float) -> None:
    sys.setswitchinterval(interval + 5e-7)  # which is cut to whole microseconds


def wake_promptly() -> None:
    """Have Linux end the waits of the calling thread on time: by default they last 50 microseconds longer."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

"""How often Python looks through all its objects for garbage. While nobody has put that off, all is as the user has it.

A full collection stops every thread, for a tenth of a second where torch is imported, and many short requests, or a view that follows
them, bring it about. The small ones, which find almost all there is, go on; so does `gc.collect()`.
"""

from __future__ import annotations

import gc
import threading

SELDOM = 1000  # collections of the middle generation between two full ones; CPython's default is 10

_lock = threading.Lock()
_wishes = 0  # engines that work and servers that are open; the thresholds are the process's, and so must these be
_usual = (0, 0, 0)  # the user's thresholds
_set = (0, 0, 0)  # what was set in their place


def put_off() -> None:
    """Full collections come seldom, until as many have called `allow`."""
    global _wishes, _usual, _set  # noqa: PLW0603 - see there
    with _lock:
        _wishes += 1
        if _wishes == 1:
            young, middle, full = _usual = gc.get_threshold()
            _set = (young, middle, max(full, SELDOM))
            gc.set_threshold(*_set)


def allow() -> None:
    """As before, unless the user has set other thresholds meanwhile; a full collection that was put off is made here.

    Else it would soon be made in the main thread, where an interrupt that comes while garbage is cleared away is lost.
    """
    global _wishes  # noqa: PLW0603 - see there
    with _lock:
        _wishes -= 1
        restores = not _wishes and gc.get_threshold() == _set
        if restores:
            gc.set_threshold(*_usual)
    if restores and gc.isenabled() and 0 < _usual[2] <= gc.get_count()[2]:
        gc.collect()

"""How many of the CPU's threads compute a step with one token: all of them, or one, whichever proves quicker here."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch

TRIES = 4  # steps that a choice rests on
TRY_AGAIN = 256  # one-token steps until the other choice is tried again: the machine's load changes


class StepThreads:
    """Tells torch how many threads to use in the thread that calls this, and in no other.

    The products of one token are small: what a second thread saves is easily less than what waking it costs (it sleeps
    between two products, and a virtual machine's core is slow to wake). Which wins depends on the model and the machine, so
    both are timed on the steps themselves.
    """

    def __init__(self, clock: Callable[[], float] = perf_counter, set_threads: Callable[[int], None] | None = None) -> None:
        self._clock = clock
        self._all = torch.get_num_threads()
        self._set = set_threads or _setter()
        self._seconds: dict[int, deque[float]] = {count: deque(maxlen=TRIES) for count in (self._all, 1)}
        self._left = 0  # steps until the choice is looked at
        self._threads = self._all

    @contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """Around a step of this many tokens; the choice holds until the next."""
        if self._set is None or self._all == 1:
            yield
        elif tokens > 1:
            self._set(self._all)
            yield
        else:
            if self._left == 0:
                self._turn()
            self._set(self._threads)
            began = self._clock()
            yield
            self._seconds[self._threads].append(self._clock() - began)
            self._left -= 1

    def _turn(self) -> None:
        """Go on with what has not been timed yet, or with the quicker of the two; at times, try the slower again."""
        untried = [count for count, seconds in self._seconds.items() if not seconds]
        if untried:
            self._threads, self._left = untried[0], TRIES
            return
        best = min(self._seconds, key=lambda count: sorted(self._seconds[count])[TRIES // 2])
        other = 1 if best == self._all else self._all
        self._threads, self._left = best, TRY_AGAIN
        self._seconds[other].clear()


def _setter() -> Callable[[int], None] | None:
    """OpenMP's own call, which concerns the calling thread alone; torch.set_num_threads also changes what later threads start with."""
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        return ctypes.CDLL(str(library)).omp_set_num_threads
    return None

"""Files brought into memory a little before they are copied from there: the disk works while a GPU is copied to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Self

READERS = 4  # fewer threads leave a fast disk idle
PIECE = 16 << 20  # bytes that a thread reads at a time
AHEAD = 512 << 20  # most bytes between what is read and what was taken
PAUSE = 0.001  # seconds that a thread too far ahead waits


class ReadAhead:
    """Reads parts of files in the order in which they are given, by a few threads, and says nothing of errors: who copies meets them too.

    What is read stays in the system's cache, from which whoever maps the files takes it. On a system without `preadv` nothing is read.
    """

    def __init__(self, parts: Iterable[tuple[Path, int, int]]) -> None:
        self.taken = 0  # bytes of the parts that were copied, as told by whoever does
        self._pieces = _cut(parts)
        self._numbers = count()  # of the pieces, each handed out once
        self._closed = not hasattr(os, "preadv")
        self._threads = [Thread(target=self._run, name="reads-ahead", daemon=True) for _ in range(READERS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        buffer = memoryview(bytearray(PIECE))
        for number in self._numbers:
            if self._closed or number >= len(self._pieces):
                return
            file, offset, size, before = self._pieces[number]
            while before > self.taken + AHEAD and not self._closed:
                sleep(PAUSE)
            if before + size > self.taken:
                try:
                    with file.open("rb", buffering=0) as opened:
                        os.preadv(opened.fileno(), [buffer[:size]], offset)
                except OSError:
                    return


def _cut(parts: Iterable[tuple[Path, int, int]]) -> list[tuple[Path, int, int, int]]:
    """From [begin, end) of files to pieces of one read: file, offset, size, and the bytes of all pieces before."""
    pieces, before = [], 0
    for file, begin, end in parts:
        for offset in range(begin, end, PIECE):
            size = min(PIECE, end - offset)
            pieces.append((file, offset, size, before))
            before += size
    return pieces

"""Requests count as activity of the kernel that answers them: a kernel that serves is not culled as idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from tornado.ioloop import PeriodicCallback

EVERY = 1.0  # seconds between two marks while a request runs


class Activity:
    """What runs now, by engine. Marks the kernels and the server as active from a request's beginning to its end."""

    def __init__(self, kernel_manager: Any, settings: dict[str, Any]) -> None:
        self.running: Counter[str] = Counter()  # requests, by the engine's label
        self._kernels: Counter[str] = Counter()
        self._manager = kernel_manager
        self._settings = settings
        self._marks = PeriodicCallback(self._mark_all, 1000 * EVERY)

    @contextmanager
    def of(self, kernel_id: str, label: str) -> Iterator[None]:
        """A request to an engine of this kernel, while it lasts."""
        self.running[label] += 1
        self._kernels[kernel_id] += 1
        self._mark(kernel_id)
        if not self._marks.is_running():
            self._marks.start()
        try:
            yield
        finally:
            self._mark(kernel_id)
            for count, key in ((self.running, label), (self._kernels, kernel_id)):
                count[key] -= 1
                if not count[key]:
                    del count[key]
            if not self._kernels:
                self._marks.stop()

    def stop(self) -> None:
        self._marks.stop()

    def _mark_all(self) -> None:
        for kernel_id in self._kernels:
            self._mark(kernel_id)

    def _mark(self, kernel_id: str) -> None:
        now = datetime.now(UTC)
        self._settings["api_last_activity"] = now
        if kernel_id in self._manager:  # it may have been shut down meanwhile
            self._manager.get_kernel(kernel_id).last_activity = now
            self._manager.last_kernel_activity = now

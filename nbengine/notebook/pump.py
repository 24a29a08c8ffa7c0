"""The thread that shows what runs without a cell waiting for it. It lives while there is anything to show."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbengine.notebook.generation import Generation
    from nbengine.notebook.live import View

LOOK = 0.05  # seconds


class Pump:
    """One for a shell. Any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: list[tuple[Generation, View]] = []
        self._thread: threading.Thread | None = None

    def add(self, generation: Generation, view: View) -> None:
        """Refresh this view until its generation has ended."""
        generation.view_finished = threading.Event()
        with self._lock:
            self._shown.append((generation, view))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="nbengine-views", daemon=True)
                self._thread.start()

    def running(self) -> list[Generation]:
        """What it still shows."""
        with self._lock:
            return [generation for generation, _ in self._shown]

    def _run(self) -> None:
        tick = threading.Event()
        while True:
            for generation, view in self._due():
                (view.finish if generation.done else view.refresh)()
                if generation.done and generation.view_finished is not None:
                    generation.view_finished.set()
            with self._lock:
                if not self._shown:
                    self._thread = None
                    return
            tick.wait(LOOK)

    def _due(self) -> list[tuple[Generation, View]]:
        """All there are; those that have ended leave with this last look."""
        with self._lock:
            shown = self._shown
            self._shown = [(generation, view) for generation, view in shown if not generation.done]
            return shown

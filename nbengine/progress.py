"""A bar for what takes long while an engine starts: a download, a load. Nothing is shown for what is quick."""

from __future__ import annotations

from time import perf_counter
from typing import Any

PATIENCE = 0.7  # seconds a phase may take before a bar appears


class ProgressBars:
    """A `progress(phase, done, total)` callback that draws one bar a phase, in bytes."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._began = 0.0
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self._phase:
            self.close()
            self._phase, self._began = phase, perf_counter()
        if self._bar is None and perf_counter() - self._began > PATIENCE and done < total:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc=phase, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = self._phase = None

"""Loading a model under a cell: phases and bytes in one line, and the stop button ends it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from html import escape
from time import perf_counter
from typing import Any

from nbengine.engine import Engine
from nbengine.errors import without_frames
from nbengine.interrupts import hear_interrupts
from nbengine.notebook.live import Shown, in_kernel
from nbengine.notebook.render import QUIET, Bundle

LOOK = 0.1  # seconds between two updates
BRIEF = 0.05  # seconds; a phase that took less is not worth a word


class Loading:
    """An engine being made in a thread of its own, so that the cell's thread can show how far it is and hear the stop button."""

    def __init__(self, model: str, config: Mapping[str, Any]) -> None:
        self._model = model
        self._config = dict(config)
        self._stop = threading.Event()
        self.progress = ("preparing", 0, 0)  # phase, bytes so far, bytes in all
        self._phases: list[tuple[str, float]] = [("preparing", perf_counter())]  # and when each began
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="nbengine-load", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End the load at its next report of progress."""
        self._stop.set()

    def took(self) -> str:
        """What the time went into."""
        ends = [began for _, began in self._phases[1:]] + [perf_counter()]
        return ", ".join(
            f"{phase} {end - began:.1f} s" for (phase, began), end in zip(self._phases, ends, strict=True) if end - began >= BRIEF
        )

    def _run(self) -> None:
        try:
            engine = Engine(self._model, progress=self._report, **self._config)
            if self._stop.is_set():
                engine.close()
            else:
                self.engine = engine
        except BaseException as error:  # noqa: BLE001 - the cell's to raise
            self.error = without_frames(error)
        finally:
            self.over.set()

    def _report(self, phase: str, done: int, total: int) -> None:
        if self._stop.is_set():
            raise InterruptedError("the load was interrupted")
        if phase != self._phases[-1][0]:
            self._phases.append((phase, perf_counter()))
        self.progress = (phase, done, total)


def load_engine(model: str, config: Mapping[str, Any], name: str) -> Engine:
    """Make an engine, shown as it comes. An interrupt ends the load and gives back what it had."""
    from IPython.core.getipython import get_ipython

    began = perf_counter()
    shown = Shown() if in_kernel(get_ipython()) else None
    loading = Loading(model, config)
    try:
        if shown is not None:
            shown.update(_bundle(name, loading.progress, 0.0))
        hear_interrupts()
        while not loading.over.wait(LOOK):
            if shown is not None:
                shown.update(_bundle(name, loading.progress, perf_counter() - began))
        if loading.error is None:
            assert loading.engine is not None
            if shown is not None:
                took = loading.took()
                shown.update(_line(f"{name} loaded in {perf_counter() - began:.1f} s{': ' if took else ''}{took}"))
            return loading.engine
    except BaseException:
        loading.stop()
        loading.over.wait()
        if loading.engine is not None:
            loading.engine.close()
        if shown is not None:
            shown.update(_line(f"loading {name} was stopped"))
        raise
    if shown is not None:
        shown.update(_line(f"{name} was not loaded"))
    raise loading.error


def _bundle(name: str, progress: tuple[str, int, int], seconds: float) -> Bundle:
    phase, done, total = progress
    text = f"{name}: {phase}"
    bar = ""
    if total:
        from nbengine.memory import size

        text += f" {size(done)} of {size(total)}"
        bar = f'<progress value="{done}" max="{total}"></progress> '
    text += f", {seconds:.1f} s"
    return {"text/plain": text, "text/html": f'<div style="{QUIET}">{bar}{escape(text)}</div>'}


def _line(text: str) -> Bundle:
    return {"text/plain": text, "text/html": f'<div style="{QUIET}">{escape(text)}</div>'}

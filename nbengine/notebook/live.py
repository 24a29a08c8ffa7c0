"""A generation under its cell while it runs: one display for the text, one for the quiet line, both static in the end."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from IPython.core.getipython import get_ipython
from IPython.display import DisplayHandle

from nbengine.notebook import render

if TYPE_CHECKING:
    from nbengine.notebook.generation import Generation
    from nbengine.widgets.cell_controls import CellControls

log = logging.getLogger("nbengine")
UPDATE = 1 / 15  # seconds between two updates
SLOWER = 1e-6  # and this many more for each byte of the last one: a long text is sent less often
SHARE = 10  # and never more than a tenth of the time goes into drawing
CONTROLS_AFTER = 0.3  # seconds that a cell may run without any buttons


class View(Protocol):
    """What shows a generation."""

    def refresh(self) -> None:
        """Show what is new, unless it is too early."""

    def finish(self) -> None:
        """Show the end, and nothing more afterwards."""


class CellView:
    """For a notebook: displays that are updated in place.

    Made and first shown in the cell's own thread; refreshed by one thread at a time.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.body = Shown(render.body(generation))
        self.line = Shown(render.line(generation))
        self._began = self._shown = monotonic()
        self._pause = UPDATE
        self._controls: CellControls | None = None
        self._without_controls = False

    def refresh(self) -> None:
        now = monotonic()
        if now - self._shown < self._pause:
            return
        self._shown = now
        self.generation.stalled |= self.generation.status in {"paused", "asleep"}
        sent = self.body.update(render.body(self.generation))
        self._pause = max(UPDATE + SLOWER * sent, SHARE * (monotonic() - now))
        if self._controls is None and not self._without_controls and now - self._began > CONTROLS_AFTER:
            self._offer_controls()
        if self._controls is None:
            self.line.update(render.line(self.generation))
        else:
            self._controls.show(render.line_text(self.generation), self._offers())

    def finish(self) -> None:
        self.body.update(render.body(self.generation))
        self.line.update(render.line(self.generation))
        if self._controls is not None:
            self._controls.close()
            self._controls = None
        self._without_controls = True

    def _offer_controls(self) -> None:
        """Buttons, where widgets can be made at all; each front end shows them only once it has been heard."""
        generation = self.generation
        try:
            from nbengine.widgets.cell_controls import CellControls

            controls = CellControls({"cancel": generation.cancel, "resume": lambda: _let_go_on(generation)})
            controls.show(render.line_text(generation), self._offers())
            self.line.update({**render.line(generation), **_widget(controls)})
        except Exception:  # whatever is wrong with the widgets that are installed, the text is shown
            log.exception("no buttons can be shown under a cell")
            self._without_controls = True
        else:
            self._controls = controls

    def _offers(self) -> list[str]:
        return ["resume", "cancel"] if self.generation.status in {"paused", "asleep"} else ["cancel"]


class PrintedView:
    """For a terminal: the text as it comes, of the first output where there are several."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self._printed = 0
        self._stalled = False

    def refresh(self) -> None:
        if self.generation.status in {"paused", "asleep"}:
            self.generation.stalled = True
            if not self._stalled:
                self._print(f"({render.line_text(self.generation)})\n")
            self._stalled = True
        if len(self.generation) == 1 and len(self.generation.requests[0].outputs) == 1:
            text = self.generation.text
            self._print(text[self._printed :])
            self._printed = len(text)

    def finish(self) -> None:
        self.refresh()
        rest = "" if self._printed else render.body(self.generation)["text/plain"]
        self._print(f"{rest}\n\n{render.line_text(self.generation)}\n")

    def _print(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


class Shown:
    """One display, once there is something in it; sends nothing when nothing changed."""

    def __init__(self, bundle: render.Bundle | None = None) -> None:
        self._bundle: render.Bundle | None = None
        self._handle: Any = DisplayHandle()
        if bundle is not None:
            self.update(bundle)

    def update(self, bundle: render.Bundle) -> int:
        """The bytes sent."""
        if bundle == self._bundle:
            return 0
        send = self._handle.display if self._bundle is None else self._handle.update
        self._bundle = bundle  # first: an interrupt may come once it is there
        send(bundle, raw=True)
        return len(json.dumps(bundle))


class Guarded:
    """A view whose failure is logged, once, and never ends what it shows."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._failed = False

    def refresh(self) -> None:
        if not self._failed:
            self._try(self._view.refresh)

    def finish(self) -> None:
        self._try(self._view.finish)

    def _try(self, show: Callable[[], None]) -> None:
        try:
            show()
        except Exception:
            self._failed = True
            log.exception("what a cell shows could not be brought up to date")


def view_of(generation: Generation) -> View:
    """What this front end can show."""
    shell: Any = get_ipython()
    generation.on_screen = getattr(shell, "execution_count", None)
    return Guarded(CellView(generation) if in_kernel(shell) else PrintedView(generation))


def in_kernel(shell: Any) -> bool:
    """Whether there is a front end whose displays can be updated."""
    return getattr(shell, "kernel", None) is not None


def _widget(controls: CellControls) -> render.Bundle:
    make: Callable[[], Any] = controls._repr_mimebundle_
    made = make()
    bundle: render.Bundle = made[0] if isinstance(made, tuple) else made
    return {kind: data for kind, data in bundle.items() if kind.startswith("application/vnd.jupyter.widget")}


def _let_go_on(generation: Generation) -> None:
    engine = generation.engine
    if engine is None or engine.status not in {"paused", "asleep"}:
        return
    if engine.status == "asleep":
        engine.wake_up()
    if engine.status == "paused":
        engine.resume()

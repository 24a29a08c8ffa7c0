"""The quiet line under a running cell, with its buttons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

HERE = Path(__file__).parent


class CellControls(anywidget.AnyWidget):
    """Buttons that appear only where pressing them has an effect.

    Whether a kernel hears a button while a cell runs depends on the kernel, the front end and the cell. So a view says hello
    when it is drawn, and the buttons appear when the kernel has answered: what heard the hello will hear the press.
    """

    _esm = (HERE / "cell_controls.js").read_text()
    _css = (HERE / "cell_controls.css").read_text()

    line = traitlets.Unicode().tag(sync=True)
    offers = traitlets.List(traitlets.Unicode()).tag(sync=True)
    heard = traitlets.Bool(default_value=False).tag(sync=True)
    trouble = traitlets.Unicode().tag(sync=True)  # what a press met

    def __init__(self, actions: Mapping[str, Callable[[], object]]) -> None:
        super().__init__()
        self._actions = dict(actions)
        self.on_msg(self._answer)

    def show(self, line: str, offers: list[str]) -> None:
        """Change what it says; nothing is sent when nothing changed."""
        with self.hold_sync():
            self.line, self.offers = line, offers

    def close(self) -> None:
        """End it, and the layout that comes with every widget and would stay behind."""
        layout = self.layout
        super().close()
        layout.close()

    def _answer(self, _: Any, message: dict[str, Any], __: Any) -> None:
        action = self._actions.get(str(message.get("press")))
        if action is None:
            self.heard = True
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - shown under the line: a callback has no cell to raise in
            self.trouble = f"{type(error).__name__}: {error}"

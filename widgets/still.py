"""A widget that has a static picture beside it: what a saved notebook shows where the widget cannot be drawn."""

from __future__ import annotations

import secrets
from typing import Any

import anywidget
import traitlets


class Still(anywidget.AnyWidget):
    """Names its picture, so that its script can hide that where it draws itself; and is whole wherever its state is kept."""

    still = traitlets.Unicode().tag(sync=True)  # the class of the picture

    def __init__(self, **given: Any) -> None:
        super().__init__(still=f"nbengine-still-{secrets.token_hex(8)}", **given)

    def named(self, picture: str) -> str:
        """The picture, an SVG, under its name."""
        return picture.replace("<svg ", f'<svg class="{self.still}" ', 1)

    def close(self) -> None:
        """End it, and the layout that comes with every widget and would stay behind; its picture stays."""
        if self.comm is not None:
            layout = self.layout
            super().close()
            layout.close()

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:  # noqa: ARG002 - ipywidgets'
        """All of it, its script and style too: anywidget makes them defaults, and a page that embeds it finds them nowhere else."""
        state: dict[str, Any] = super().get_state(key)
        return state

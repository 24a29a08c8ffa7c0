"""Live views of an engine; each is Python beside its own .js and .css."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_exports = {
    "BlockTableView": "block_table",
    "Comparison": "comparison",
    "Dashboard": "dashboard",
    "Playhead": "playhead",
    "Timeline": "timeline",
    "View": "view",
    "compare": "comparison",
}

__all__ = ["BlockTableView", "Comparison", "Dashboard", "Playhead", "Timeline", "View", "compare"]


def __getattr__(name: str) -> Any:
    if name in _exports:
        return getattr(import_module(f"nbengine.widgets.{_exports[name]}"), name)
    raise AttributeError(f"module 'nbengine.widgets' has no attribute {name!r}")

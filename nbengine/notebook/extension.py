"""`%load_ext nbengine` and `%unload_ext nbengine`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from IPython.core.extensions import ExtensionManager

from nbengine.notebook.awaited import AwaitCells
from nbengine.notebook.complete import Completer
from nbengine.notebook.magics import NBEngineMagics
from nbengine.notebook.views import VIEWS

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

MAGICS = {"line": ("engine", "generate", "chat", *VIEWS), "cell": ("generate", "chat")}


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics. Engines of an earlier load in this shell are taken over."""
    before = _magics_of(shell)
    if before is not None:
        _remove(shell, before)
    magics = NBEngineMagics(shell)
    if before is not None:
        magics.adopt(before.session)
        if kept := list(magics.session.engines):
            print(f"nbengine is loaded again and keeps {', '.join(kept)}")  # noqa: T201 - to the person who reloads
    shell.register_magics(magics)
    transformers = shell.input_transformer_manager.cleanup_transforms
    transformers.insert(_place(transformers), AwaitCells(shell))
    Completer(magics.session).attach(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take everything back: engines are closed, except where the extension is only being reloaded."""
    magics = _magics_of(shell)
    if magics is None:
        return
    if _is_reload():
        return  # the load that follows takes the engines over
    closed = magics.session.close()
    _remove(shell, magics)
    if closed:
        print(f"nbengine closed {', '.join(closed)}")  # noqa: T201 - to the person who unloads


def _magics_of(shell: Any) -> NBEngineMagics | None:
    """The magics that are registered; found by their name, since a reload makes the class anew."""
    magic = shell.magics_manager.magics["line"].get("engine")
    owner = getattr(magic, "__self__", None)
    return owner if hasattr(owner, "session") else None


def _remove(shell: Any, magics: NBEngineMagics) -> None:
    for kind, names in MAGICS.items():
        for name in names:
            shell.magics_manager.magics[kind].pop(name, None)
    shell.magics_manager.registry.pop(type(magics).__name__, None)
    if magics in shell.configurables:
        shell.configurables.remove(magics)
    transforms = shell.input_transformer_manager.cleanup_transforms
    transforms[:] = [transform for transform in transforms if not isinstance(transform, AwaitCells)]
    Completer.detach(shell)


def _place(transforms: list[Any]) -> int:
    """Before IPython's own handling of cell magics."""
    names = [getattr(transform, "__name__", "") for transform in transforms]
    return names.index("cell_magic") if "cell_magic" in names else len(names)


def _is_reload() -> bool:
    """Whether `%reload_ext` is what asks: it unloads and loads in one go."""
    frame = sys._getframe(1)  # noqa: SLF001 - nothing else tells the two apart
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is ExtensionManager.reload_extension.__code__:
            return True
    return False

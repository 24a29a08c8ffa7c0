"""Cells of `%%generate` and `%%chat` become an await, so that the kernel can hear a button and an interrupt while they run."""

from __future__ import annotations

import re
import sys
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from nbengine.notebook.live import in_kernel

AWAITED = ("generate", "chat")
CELL = re.compile(r"%%(\w+)(?:[ \t]+(.*))?$")
LINE = re.compile(r"%(generate)[ \t]+(.*\S)$")

ASKED = re.compile(r"(\s*(?:\w+\s*=\s*)?)%generate[ \t]+(.*\?)\s*$")
QUOTES = re.compile("\"{3}|'{3}")


class AwaitCells:
    """An input transformer. The magics of the same names stay, for help, for completion and for a shell that cannot await."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell

    def __call__(self, lines: list[str]) -> list[str]:
        """Rewrite a cell that begins with one of the magics, blank lines and comments before it aside."""
        start = next((i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), None)
        if start is None:
            return lines
        first, body = lines[start].rstrip(), "".join(lines[start + 1 :])
        if (found := CELL.match(first)) is not None and found[1] in AWAITED:
            # an empty cell too: IPython would refuse it in words of its own before the magic sees it
            return self._awaited(found, body) if self._can_await() else [*lines[start:], *([] if body else ["\n"])]
        if (found := LINE.match(first)) is not None and not body.strip():
            # also where it cannot be awaited: IPython takes a question mark at the end of a prompt for a call for help
            return self._awaited(found, None) if self._can_await() else [f"get_ipython().run_line_magic({found[1]!r}, {found[2]!r})\n"]
        return lines if QUOTES.search("".join(lines)) else [_asked(line) for line in lines]

    def _can_await(self) -> bool:
        return in_kernel(self._shell) and bool(self._shell.autoawait) and not _in_a_magic()

    @staticmethod
    def _awaited(found: re.Match[str], body: str | None) -> list[str]:
        return [f"await get_ipython().find_cell_magic({found[1]!r}).__self__.awaited({found[1]!r}, {found[2] or ''!r}, {body!r})\n"]


def _asked(line: str) -> str:
    """A line whose prompt ends in a question mark, which IPython would take for a call for help."""
    found = ASKED.match(line)
    return line if found is None else f"{found[1]}get_ipython().run_line_magic('generate', {found[2]!r})\n"


def _in_a_magic() -> bool:
    """Whether a magic (%%capture, %time) runs this cell: those do not await."""
    codes = {InteractiveShell.run_cell_magic.__code__, InteractiveShell.run_line_magic.__code__}
    frame = sys._getframe(1)  # noqa: SLF001 - nothing else tells
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code in codes:
            return True
    return False

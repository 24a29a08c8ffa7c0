"""Run a notebook from top to bottom without a browser and show its output as it comes. `make demo` is this on the quickstart."""

from __future__ import annotations

import argparse
import ast
import asyncio
import os
import queue
import sys
import textwrap
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionComplete, CellExecutionError
from nbclient.util import ensure_async

DIM, BOLD, PLAIN = ("\033[2m", "\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

QUIET, LATE = 0.2, 0.4  # seconds without an update after which a text is taken to be whole, and the most to wait for that

SUMMARY = """\
  {steps} steps, {num_preemptions} preemptions
  {prompt_tokens} prompt tokens, {prefix_cache_hits} of them found in the prefix cache
  {generation_tokens} tokens generated
  {blocks_used} of {blocks_total} KV blocks in use at the end, {blocks_cached} more still cached
"""


@dataclass
class Display:
    """One display that is updated in place."""

    cell: int
    text: str  # as a notebook shows it now
    printed: str = ""  # what the terminal has of it

    def continues(self) -> bool:
        """Whether its text goes on from what the terminal has."""
        return self.text.startswith(self.printed)

    def rest(self) -> str:
        """What is to be printed now: the end of a text that grew, all of one that was rewritten."""
        rest, self.printed = self.text.removeprefix(self.printed), self.text
        return rest


class Terminal:
    """Prints what a notebook shows. A terminal takes nothing back, so a text is printed as it grows, and whatever is rewritten on its
    way (the quiet line, a progress bar, a table) when it is final; what goes on under an earlier cell waits for this one's end.
    """

    def __init__(self) -> None:
        self.displays: dict[str, Display] = {}
        self._live: Display | None = None  # the text that is printed as it grows
        self._line_is_open = False
        self._cell = 0

    def begin(self, source: str) -> None:
        """A cell that is about to run."""
        self._cell += 1
        self.print(f"\n{DIM}{textwrap.indent(source, '  > ', lambda _line: True)}{PLAIN}\n")

    def end(self, *, elsewhere: bool = True) -> None:
        """The cell has ended: what the terminal lacks of it, and of earlier ones unless they still go on."""
        self._flush(range(1, self._cell + 1) if elsewhere else [self._cell])

    def stream(self, text: str) -> None:
        """What the cell prints."""
        if self._live is not None:
            self._flush([self._cell])
        self.print(text)

    def show(self, text: str) -> None:
        """A whole output, on lines of its own, after the displays before it."""
        self._flush([self._cell])
        self.print(f"{text}\n")

    def add(self, key: str, text: str) -> None:
        """A display that may change later."""
        self.displays[key] = Display(self._cell, text)

    def update(self, key: str, text: str) -> None:
        """A display's new text: what it grew by is printed at once."""
        display = self.displays.get(key)
        if display is None:
            return
        grew, display.text = text != display.text and text.startswith(display.text), text
        if grew and self._live is None and display.cell == self._cell:
            self._end_line()
            self._live = display
        if display is self._live and display.continues():
            self.print(display.rest())

    def goes_on_elsewhere(self) -> bool:
        """Whether there is something new under an earlier cell."""
        return any(display.cell != self._cell and display.text != display.printed for display in self.displays.values())

    def print(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._line_is_open = not text.endswith("\n")

    def _flush(self, cells: Container[int]) -> None:
        if self._live is not None and self._live.continues():
            self.print(self._live.rest())  # on the line that it began
        self._live = None
        named = self._cell
        for display in self.displays.values():
            if display.cell in cells and display.text != display.printed:
                self._end_line()
                if display.cell != named:
                    self.print(f"{DIM}cell {display.cell} went on:{PLAIN}\n")
                    named = display.cell
                self.print(display.rest())
        self._end_line()

    def _end_line(self) -> None:
        if self._line_is_open:
            self.print("\n")


class TerminalClient(NotebookClient):
    """Executes as nbclient does; prints each message too, the moment it comes."""

    def __init__(self, notebook: nbformat.NotebookNode, **settings: Any) -> None:
        super().__init__(notebook, **settings)
        self.terminal = Terminal()

    def process_message(self, msg: dict[str, Any], cell: nbformat.NotebookNode, cell_index: int) -> nbformat.NotebookNode | None:
        content = msg["content"]
        key = (content.get("transient") or {}).get("display_id")
        match msg["msg_type"]:
            case "stream":
                self.terminal.stream(content["text"])
            case "update_display_data":
                self.terminal.update(key, content["data"].get("text/plain", ""))
            case "display_data" if key is not None:
                self.terminal.add(key, content["data"].get("text/plain", ""))
            case "display_data" | "execute_result":
                self.terminal.show(content["data"].get("text/plain", ""))
            case "error":
                self.terminal.show("\n".join(content["traceback"]))
        return super().process_message(msg, cell, cell_index)

    async def _async_poll_output_msg(self, parent_msg_id: str, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """As nbclient's, but an update is taken whichever cell it is sent for: what runs in the background sends some between two cells."""
        while True:
            msg = await ensure_async(self.kc.iopub_channel.get_msg(timeout=None))
            if msg["parent_header"].get("msg_id") == parent_msg_id or msg["msg_type"] == "update_display_data":
                try:
                    self.process_message(msg, cell, cell_index)
                except CellExecutionComplete:
                    return

    async def _has_settled(self, cell: nbformat.NotebookNode, cell_index: int) -> bool:
        """Whether nothing more comes under earlier cells. What ends in the background is shown a moment after it has ended: take that in."""
        deadline = time.monotonic() + LATE
        while time.monotonic() < deadline:
            try:
                msg = await ensure_async(self.kc.iopub_channel.get_msg(timeout=QUIET))
            except queue.Empty:
                return True
            if msg["msg_type"] == "update_display_data":
                self.process_message(msg, cell, cell_index)
        return False

    async def run(self) -> dict[str, Any]:
        """Execute every cell; return what the notebook's variable `stats` holds at the end."""
        async with self.async_setup_kernel():
            for index, cell in enumerate(self.nb.cells):
                if cell.cell_type == "markdown":
                    headings = [line for line in cell.source.splitlines() if line.startswith("#")]
                    self.terminal.print("".join(f"\n{BOLD}{line}{PLAIN}\n" for line in headings))
                elif cell.source.strip():
                    self.terminal.begin(cell.source)
                    await self.async_execute_cell(cell, index)
                    self.terminal.end(elsewhere=not self.terminal.goes_on_elsewhere() or await self._has_settled(cell, index))
            reply = await self.kc.execute("", silent=True, user_expressions={"stats": "dict(stats)"}, reply=True, timeout=60)
        expression = reply["content"]["user_expressions"]["stats"]
        self.terminal.end()
        return ast.literal_eval(expression["data"]["text/plain"]) if expression["status"] == "ok" else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the executed notebook; its own saves the outputs in it")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take")
    options = parser.parse_args()

    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or the kernel's debugger speaks up on standard error
    notebook = nbformat.read(options.notebook, as_version=4)
    client = TerminalClient(
        notebook,
        timeout=options.timeout,
        kernel_name="python3",
        coalesce_streams=True,  # or each piece of a printed text would stand in a box of its own
        record_timing=False,  # when each message came is nothing that a reader wants saved
        extra_arguments=["--log-level=CRITICAL"],
        resources={"metadata": {"path": str(options.notebook.parent)}},
    )
    target = options.out / options.notebook.name
    client.terminal.print(f"Running {options.notebook}\n")
    start = time.perf_counter()
    try:
        stats = asyncio.run(client.run())
    except CellExecutionError:
        client.terminal.print(f"\nA cell failed; {target} shows where.\n")
        return 1
    finally:
        options.out.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    if stats:
        client.terminal.print(f"\n{BOLD}What the engine did{PLAIN}\n")
        client.terminal.print(SUMMARY.format_map(stats))
    client.terminal.print(f"\n{cells} cells ran in {time.perf_counter() - start:.1f} s; the executed notebook is {target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

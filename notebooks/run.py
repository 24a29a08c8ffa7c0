"""Run a notebook from top to bottom without a browser and show its output as it comes. `make demo` is this on the quickstart."""

from __future__ import annotations

import argparse
import ast
import asyncio
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

DIM, BOLD, PLAIN = ("\033[2m", "\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

SUMMARY = """\
  {steps} steps, {num_preemptions} preemptions
  {prompt_tokens} prompt tokens, {prefix_cache_hits} of them found in the prefix cache
  {generation_tokens} tokens generated
  {blocks_used} of {blocks_total} KV blocks in use at the end, {blocks_cached} more still cached
"""


class TerminalClient(NotebookClient):
    """Executes as nbclient does; prints each message too, the moment it comes."""

    def process_message(self, msg: dict[str, Any], cell: nbformat.NotebookNode, cell_index: int) -> nbformat.NotebookNode | None:
        content = msg["content"]
        match msg["msg_type"]:
            case "stream":
                show(content["text"])
            case "display_data" | "execute_result":
                show(content["data"].get("text/plain", "") + "\n")
            case "error":
                show("\n".join(content["traceback"]) + "\n")
        return super().process_message(msg, cell, cell_index)

    async def run(self) -> dict[str, Any]:
        """Execute every cell; return what the notebook's variable `stats` holds at the end."""
        async with self.async_setup_kernel():
            for index, cell in enumerate(self.nb.cells):
                if cell.cell_type == "markdown":
                    show("".join(f"\n{BOLD}{line}{PLAIN}\n" for line in cell.source.splitlines() if line.startswith("#")))
                elif cell.source.strip():
                    show(f"\n{DIM}{textwrap.indent(cell.source, '  > ')}{PLAIN}\n")
                    await self.async_execute_cell(cell, index)
            reply = await self.kc.execute("", silent=True, user_expressions={"stats": "dict(stats)"}, reply=True, timeout=60)
        expression = reply["content"]["user_expressions"]["stats"]
        return ast.literal_eval(expression["data"]["text/plain"]) if expression["status"] == "ok" else {}


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the executed notebook")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take")
    options = parser.parse_args()

    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # or the kernel's debugger speaks up on standard error
    notebook = nbformat.read(options.notebook, as_version=4)
    client = TerminalClient(
        notebook,
        timeout=options.timeout,
        kernel_name="python3",
        extra_arguments=["--log-level=CRITICAL"],
        resources={"metadata": {"path": str(options.notebook.parent)}},
    )
    target = options.out / options.notebook.name
    show(f"Running {options.notebook}\n")
    start = time.perf_counter()
    try:
        stats = asyncio.run(client.run())
    except CellExecutionError:
        show(f"\nA cell failed; {target} shows where.\n")
        return 1
    finally:
        options.out.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    if stats:
        show(f"\n{BOLD}What the engine did{PLAIN}\n")
        show(SUMMARY.format_map(stats))
    show(f"\n{cells} cells ran in {time.perf_counter() - start:.1f} s; the executed notebook is {target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where figures go: a file of rows, each with the machine it was measured on, and a table on the screen."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nbengine
from nbengine.bench.limits import Card

VERSIONS = ("torch", "triton", "transformers")


def commit() -> str:
    """The commit measured: as git says it, or NBENGINE_COMMIT where the files came without a repository."""
    if told := os.environ.get("NBENGINE_COMMIT"):
        return told
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(nbengine.__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def machine(device: torch.device, card: Card) -> dict[str, Any]:
    """What a row needs so that it can be compared with another."""
    return {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "nbengine": nbengine.__version__,
            "python": platform.python_version(),
            **{name: found for name in VERSIONS if (found := installed(name)) is not None},
        },
        "commit": commit(),
        "copy_TB_s": float(f"{card.bandwidth / 1e12:.4g}"),
        "matmul_TFLOP_s": float(f"{card.rate / 1e12:.4g}"),
    }


def installed(package: str) -> str | None:
    """A package's version, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Results:
    """Adds each row to a file as soon as it is measured, so that a run cut short leaves what it had."""

    def __init__(self, file: Path | None, machine: Mapping[str, Any], *, quick: bool = False) -> None:
        self.file = file
        self.machine = dict(machine)
        self.quick = quick
        self.rows: list[dict[str, Any]] = []

    def add(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a row; its numbers are cut to four digits."""
        whole = {"kind": kind, **{name: _short(value) for name, value in row.items()}, **self.machine}
        if self.quick:
            whole["quick"] = True
        self.rows.append(whole)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            rows = [*(json.loads(self.file.read_text("utf-8")) if self.file.exists() else []), whole]
            beside = self.file.with_suffix(".part")
            beside.write_text("[\n" + ",\n".join(json.dumps(kept) for kept in rows) + "\n]\n", "utf-8")
            beside.replace(self.file)
        return whole


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their columns; the first column to the left, numbers to the right."""
    cells = [[str(column) for column in columns], *[[_shown(value) for value in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    say(f"\n{title}")
    for row in cells:
        say("  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))))


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)
    if isinstance(value, list):
        return [_short(one) for one in value]
    return value


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")
    return f"{name}, {os.cpu_count()} threads"

"""The benchmark run as its users run it, small, with the rows that it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbengine.bench.__main__ import main

Measure = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def measure(tmp_path: Path) -> Measure:
    """Run a command on the tiny model and give back the rows of its file."""
    file = tmp_path / "results" / "rows.json"

    def run(command: str, *arguments: str, models: tuple[str, ...] = ("tiny",)) -> list[dict[str, Any]]:
        main([command, "--quick", "--device", "cpu", "--out", str(file), "--models", *models, *arguments])
        return json.loads(file.read_text("utf-8")) if file.exists() else []

    return run

"""Ways to look at nbengine from outside: a fresh interpreter, the project's files."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Any]:
    """Run a few lines in a fresh interpreter, from a neutral directory, and get back the JSON that they print last."""

    def run(code: str, *arguments: str) -> Any:
        command = [sys.executable, "-P", "-c", textwrap.dedent(code), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run

"""Puts this folder on the path, for what its tests share, and has Triton interpret kernels, there being no GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.append(HERE)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":  # Triton asks when it is imported, and each time that it meets a kernel
        os.environ["TRITON_INTERPRET"] = "1"

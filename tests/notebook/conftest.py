"""Kernels for the tests of the notebook interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # kernel_client, which several files use

from kernel_client import Kernel, with_tales


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """A kernel with the extension and tales loaded, shared by a module's tests."""
    with with_tales() as kernel:
        yield kernel


@pytest.fixture
def fresh_kernel() -> Iterator[Kernel]:
    """A kernel of its own, with nothing loaded."""
    kernel = Kernel()
    try:
        yield kernel
    finally:
        kernel.close()

"""A real Jupyter server with real kernels that serve tales, shared by a session's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # jupyter_process, which the tests use too

from jupyter_process import Jupyter, Kernel


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    """A server under a base URL as JupyterHub gives, which logs all it can."""
    with Jupyter(tmp_path_factory.mktemp("jupyter"), base_url="/user/ann/") as server:
        yield server


@pytest.fixture(scope="session")
def two_kernels(jupyter: Jupyter) -> Iterator[list[Kernel]]:
    """One serves `tales`; the other serves it as `tales` too, and as `twin`."""
    kernels = [jupyter.start_kernel() for _ in range(2)]
    cells = [kernel.start(kernel.LOAD) for kernel in kernels]  # both at once
    for kernel, cell in zip(kernels, cells, strict=True):
        kernel.finish(cell)
    kernels[0].run("%engine serve")
    kernels[1].run("%engine serve --served-model-name tales twin")
    yield kernels
    for kernel in kernels:
        kernel.close()


@pytest.fixture
def kernel(two_kernels: list[Kernel]) -> Kernel:
    return two_kernels[0]


@pytest.fixture(scope="session")
def other_server(jupyter: Jupyter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    """Another server of the same machine and user, with a token of its own, which culls its idle kernels soon."""
    culls = {"cull_idle_timeout": 6, "cull_interval": 1, "cull_connected": True}
    folder = tmp_path_factory.mktemp("other")
    with Jupyter(folder, base_url="/", runtime=jupyter.runtime, config={"MappingKernelManager": culls}) as server:
        yield server

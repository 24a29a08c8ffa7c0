"""What every test gets: one torch thread for each parallel worker, hypothesis profiles, and checks for engines left running and handlers left changed."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers that share two cores must not take four threads
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def pytest_configure(config: pytest.Config) -> None:
    """Tests speak of the CPU, on a machine with a GPU too, and Triton's kernels are interpreted there, unless `-m gpu` asks for the others."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = (
            "1"  # Triton asks when it is imported, whoever does that first, and each time that it meets a kernel
        )


settings.register_profile("default", deadline=None, derandomize=True)  # a run that failed fails again
settings.register_profile("long", deadline=None, derandomize=False, max_examples=2000, print_blob=True)
settings.load_profile("default")


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("nbengine")}


@pytest.fixture(autouse=True)
def engines_are_gone() -> Iterator[None]:
    """Fail a test that leaves an engine's thread behind (those of module and session fixtures were there before it)."""
    before = engine_threads()
    yield
    if engine_threads() - before:
        gc.collect()  # an engine that was only dropped ends when it is collected
        deadline = time.monotonic() + 5
        while engine_threads() - before and time.monotonic() < deadline:
            time.sleep(0.01)
    left = sorted(thread.name for thread in engine_threads() - before)
    assert not left, f"the test left these threads running: {left}"


@pytest.fixture(autouse=True)
def interrupts_are_handled_as_before() -> Iterator[None]:
    """Fail a test that leaves another handler of SIGINT to the tests after it, which then could not be stopped."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    if after is not before:
        signal.signal(signal.SIGINT, before)
        pytest.fail(f"the test left SIGINT to {after} in place of {before}")


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait until something holds, of what may not be there yet; the timeout is only there to fail."""

    def holds(condition: Callable[[], Any]) -> bool:
        try:
            return bool(condition())
        except LookupError:
            return False

    def wait(condition: Callable[[], Any], timeout: float = 30) -> None:
        deadline = time.monotonic() + timeout
        while not holds(condition):
            assert time.monotonic() < deadline or condition(), f"never came true: {condition}"
            time.sleep(0.002)

    return wait

"""The checks of tests/conftest.py can fail."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def run(pytester: pytest.Pytester, test: str) -> pytest.RunResult:
    pytester.makeconftest(CONFTEST.read_text().replace("+ 5", "+ 0.2"))
    pytester.makepyfile(test)
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist")


def test_a_test_that_leaves_an_engine_thread_behind_is_an_error(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import threading, time
        def test_leaky():
            threading.Thread(target=time.sleep, args=(30,), name="nbengine-7", daemon=True).start()
        """,
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left these threads running: ?'nbengine-7'?"])


def test_a_test_that_leaves_interrupts_to_another_handler_is_an_error_and_the_next_is_spared(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import signal
        def test_deaf():
            signal.signal(signal.SIGINT, lambda *_: None)
        def test_hearing():
            assert signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, signal.default_int_handler)
        """,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*left SIGINT to <function *"])


def test_a_thread_of_a_module_fixture_or_one_that_ends_soon_is_none(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import pytest, threading, time
        @pytest.fixture(scope="module")
        def engine():
            threading.Thread(target=time.sleep, args=(30,), name="nbengine-7", daemon=True).start()
        def test_fixture(engine): pass
        def test_short():
            threading.Thread(target=time.sleep, args=(0.1,), name="nbengine-8", daemon=True).start()
        """,
    )
    result.assert_outcomes(passed=2)


def test_a_parallel_worker_has_one_torch_thread(worker_id: str) -> None:
    if worker_id != "master":
        assert os.environ["OMP_NUM_THREADS"] == "1"

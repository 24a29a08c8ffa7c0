"""What is shown while a model loads: the phase, the bytes, and in the end what the time went into."""

from __future__ import annotations

import threading

import pytest

from nbengine.notebook import load_view
from nbengine.notebook.load_view import Loading


class SlowEngine:
    """Reports two phases and waits between them until it is told to go on."""

    go_on = threading.Event()

    def __init__(self, model: str, *, progress, **config) -> None:
        progress("loading weights", 1 << 20, 4 << 20)
        self.go_on.wait(10)
        progress("loading weights", 4 << 20, 4 << 20)
        progress("making room", 0, 0)

    def close(self) -> None:
        pass


@pytest.fixture
def loading(monkeypatch):
    SlowEngine.go_on.clear()
    monkeypatch.setattr(load_view, "Engine", SlowEngine)
    loading = Loading("model", {})
    yield loading
    SlowEngine.go_on.set()
    loading.thread.join()


def test_phase_and_bytes_are_shown_as_they_come(loading, until):
    until(lambda: loading.progress[0] == "loading weights")
    shown = load_view._bundle("tales", loading.progress, 1.25)
    assert shown["text/plain"] == "tales: loading weights 1.0 MiB of 4.0 MiB, 1.2 s"
    assert f'<progress value="{1 << 20}" max="{4 << 20}">' in shown["text/html"]


def test_what_the_time_went_into_is_told_in_the_end(loading, until):
    until(lambda: loading.progress[0] == "loading weights")
    loading.over.wait(0.1)
    SlowEngine.go_on.set()
    loading.thread.join()
    assert loading.engine is not None
    assert loading.took().startswith("loading weights 0.")
    assert "making room" not in loading.took()  # too short for a word


def test_a_load_that_is_stopped_ends_at_its_next_report(loading, until):
    until(lambda: loading.progress[0] == "loading weights")
    loading.stop()
    SlowEngine.go_on.set()
    loading.thread.join()
    assert isinstance(loading.error, InterruptedError)
    assert loading.engine is None

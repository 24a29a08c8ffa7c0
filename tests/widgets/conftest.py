"""Engines on tales, and views that somebody looks at."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbengine import Engine

sys.path.append(str(Path(__file__).parents[1] / "scheduling"))  # kv_model, the model of a runner


@pytest.fixture(scope="module")
def tales() -> Iterator[Engine]:
    """An engine that the tests of the views share."""
    with Engine("tales", num_gpu_blocks_override=256, max_model_len=1024) as engine:
        engine.front.call(int).result()  # begins its thread, which is not the first test's
        yield engine


@pytest.fixture
def engine(tales: Engine) -> Iterator[Engine]:
    """The same, idle and running, with nothing looked at from an earlier test."""
    yield tales
    tales.cancel_all()
    tales.resume()
    playhead = tales.trace.playhead
    if playhead is not None:
        playhead.go_live()
        for view in list(playhead._views):
            view.close()
        playhead.set_speed(None)
    tales.resume()


@pytest.fixture
def fresh_engine() -> Iterator[Engine]:
    """One of its own."""
    with Engine("tales", num_gpu_blocks_override=64, max_model_len=256) as engine:
        yield engine

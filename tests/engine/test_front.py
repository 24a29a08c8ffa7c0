"""The front: one thread for what faces outwards, begun when it is first needed and ended with its engine."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from nbengine.errors import EngineClosedError
from nbengine.front import Front


def _named(name):
    return [t for t in threading.enumerate() if t.name == name]


def test_no_thread_begins_before_the_first_use_and_none_is_left_after_closing():
    front = Front("front-under-test")
    assert not _named("front-under-test")
    assert front.call(threading.current_thread).result().name == "front-under-test"
    front.close()
    front.close()
    assert not _named("front-under-test")
    with pytest.raises(EngineClosedError):
        front.call(print)


def test_errors_come_to_the_caller_and_the_front_goes_on():
    front = Front("front-under-test")
    with pytest.raises(ZeroDivisionError):
        front.call(lambda: 1 / 0).result()

    async def later():
        await asyncio.sleep(0)
        return 7

    assert front.run(later()).result() == 7
    front.close()


def test_a_ticker_ticks_until_it_is_stopped():
    front, ticks = Front("front-under-test"), []
    ticker = front.every(0.005, lambda: ticks.append(time.perf_counter()))
    while len(ticks) < 3:
        time.sleep(0.005)
    ticker.stop()
    front.call(int).result()
    seen = len(ticks)
    time.sleep(0.05)
    assert len(ticks) == seen
    front.close()


def test_a_ticker_that_fails_stops_alone(caplog):
    front, ticks = Front("front-under-test"), []
    failing = front.every(0.001, lambda: 1 / 0)
    other = front.every(0.001, lambda: ticks.append(1))
    while len(ticks) < 5:
        time.sleep(0.005)
    assert failing.stopped
    assert not other.stopped
    front.close()


def test_closing_ends_what_runs():
    front, ended = Front("front-under-test"), []

    async def forever():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    front.run(forever())
    front.call(int).result()
    front.close()
    assert ended == [True]

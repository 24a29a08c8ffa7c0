"""Full collections of garbage come seldom while an engine works or a server is open, and are the user's again after that."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from nbengine import SamplingParams, collector

USUAL = (700, 11, 7)
SEEN_BY_NOBODY = (500, 5, 5)


@pytest.fixture(autouse=True)
def thresholds():
    """The user's, and those of before after the test."""
    before = gc.get_threshold()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)


def test_they_are_put_off_until_all_have_let_them():
    collector.put_off()
    collector.put_off()
    assert gc.get_threshold() == (700, 11, collector.SELDOM)
    collector.allow()
    assert gc.get_threshold() == (700, 11, collector.SELDOM)
    collector.allow()
    assert gc.get_threshold() == USUAL


def test_what_the_user_sets_meanwhile_stays():
    collector.put_off()
    gc.set_threshold(*SEEN_BY_NOBODY)
    collector.allow()
    assert gc.get_threshold() == SEEN_BY_NOBODY


def test_a_user_who_has_them_more_seldom_keeps_that():
    gc.set_threshold(700, 11, 10 * collector.SELDOM)
    collector.put_off()
    assert gc.get_threshold() == (700, 11, 10 * collector.SELDOM)
    collector.allow()
    assert gc.get_threshold() == (700, 11, 10 * collector.SELDOM)


def full_collections(run):
    """The threads in which full collections are made meanwhile."""
    threads = []

    def note(phase, info):
        if phase == "start" and info["generation"] == 2:
            threads.append(threading.current_thread())

    gc.callbacks.append(note)
    try:
        run()
    finally:
        gc.callbacks.remove(note)
    return threads


def middle_ones(count):
    for _ in range(count):
        gc.collect(1)


def test_one_that_was_put_off_is_made_by_who_lets_them():
    """Not soon after in the main thread, where it would lose an interrupt."""
    gc.collect()
    collector.put_off()
    assert not full_collections(lambda: middle_ones(USUAL[2] + 1))
    assert full_collections(collector.allow) == [threading.current_thread()]
    collector.put_off()
    assert not full_collections(collector.allow)


def test_none_is_made_for_a_user_who_wants_none():
    gc.collect()
    collector.put_off()
    middle_ones(USUAL[2] + 1)
    gc.disable()
    try:
        assert not full_collections(collector.allow)
    finally:
        gc.enable()


def test_a_server_puts_them_off_until_it_is_closed(engine):
    with engine.serve() as one:
        with engine.serve():
            assert gc.get_threshold()[2] == collector.SELDOM
        assert gc.get_threshold()[2] == collector.SELDOM
        one.close()
        assert gc.get_threshold() == USUAL
    assert gc.get_threshold() == USUAL


def test_an_engine_puts_them_off_while_it_works(engine):
    request = engine.submit("Once upon a time", SamplingParams(max_tokens=500, ignore_eos=True))
    next(iter(request))
    assert gc.get_threshold()[2] == collector.SELDOM
    request.cancel()
    request.wait()
    deadline = time.monotonic() + 5
    while gc.get_threshold() != USUAL and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gc.get_threshold() == USUAL


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tornado drops the socket that it could not bind
def test_a_server_that_cannot_be_opened_leaves_them_as_they_were(engine):
    with engine.serve() as one:
        port = int(one.url.rpartition(":")[2])
        with pytest.raises(OSError, match="cannot listen"):
            engine.serve(port=port)
    assert gc.get_threshold() == USUAL

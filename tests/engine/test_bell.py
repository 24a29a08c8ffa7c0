"""Waiting for another thread, and what an interrupt of it must not do."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbengine.bell import Bell, Reply


class Payload:
    pass


def test_a_bell_that_was_rung_is_heard_at_once_however_often_it_was_rung():
    bell = Bell()
    assert not bell.wait(0)
    bell.ring()
    bell.ring()
    assert bell.wait(0)
    assert not bell.wait(-1)
    bell.ring()
    assert bell.wait(float("inf"))


def test_a_reply_is_given_or_failed_and_can_be_read_again():
    given, failed = Reply(), Reply()
    assert not given.wait(0)
    assert not given.answered
    given.give(3)
    failed.fail(KeyError("mine"))
    for _ in range(2):
        assert given.wait(0)
        assert given.result() == 3
        with pytest.raises(KeyError, match="mine"):
            failed.result()


def test_a_reply_comes_from_another_thread():
    reply = Reply()
    with ThreadPoolExecutor(1) as pool:
        waiter = pool.submit(reply.result)
        reply.give("here")
        assert waiter.result(30) == "here"


def test_a_reply_that_failed_makes_no_cycle():
    reply, payload = Reply(), Payload()
    reply.payload = payload
    reply.fail(KeyError("mine"))
    gc.disable()
    try:
        with pytest.raises(KeyError):
            reply.result()
        gone = weakref.ref(payload)
        del reply, payload
        assert gone() is None
    finally:
        gc.enable()


def test_a_reply_outlives_a_waiter_that_gave_up():
    reply = Reply()
    assert not reply.wait(0.001)
    threading.Timer(0.01, reply.give, [5]).start()
    assert reply.result() == 5


def test_an_interrupt_of_who_waits_never_harms_who_rings(script):
    """With threading.Event, or a Future, the ringing thread soon dies of "release unlocked lock"."""
    code, out, err = script("""
import signal, sys, threading, time
from nbengine import SamplingParams
from nbengine.bell import Reply
from nbengine.mailbox import Mailbox
from nbengine.request import Request

sys.setswitchinterval(1e-6)
request = Request("r", None, [5], SamplingParams().resolve(), Mailbox(), None, 10)
replies, errors, over = [], [], threading.Event()

def ring():
    try:
        while not over.is_set():
            request.wake()
            while replies:
                replies.pop().give(1)
    except BaseException as error:
        errors.append(repr(error))

def interrupt(*_):
    raise KeyboardInterrupt

thread = threading.Thread(target=ring, daemon=True)
thread.start()
signal.signal(signal.SIGALRM, interrupt)
end, hits = time.monotonic() + 2, [0, 0]
while time.monotonic() < end and not errors:
    for which in (0, 1):
        try:
            signal.setitimer(signal.ITIMER_REAL, 2e-4)
            while not errors:
                if which:
                    reply = Reply()
                    replies.append(reply)
                    reply.result()
                else:
                    request.wait(0.001)
        except KeyboardInterrupt:
            hits[which] += 1
over.set()
thread.join(10)
print(min(hits) > 20, errors, thread.is_alive())
""").end()
    assert (code, out.strip()) == (0, "True [] False"), err

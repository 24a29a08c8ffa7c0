"""An engine whose thread is held by a user's code: who waits for it is told what it does, and can give up."""

import re
import threading
import time
import warnings

import pytest

import nbengine.mailbox
from nbengine import SamplingParams
from nbengine.errors import EngineClosedError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(nbengine.mailbox, "PATIENCE", 0.2)
    monkeypatch.setattr(nbengine.mailbox, "LOOK", 0.05)


@pytest.fixture
def stuck(make_engine, gate):
    engine = make_engine()
    request = engine.submit([5], SamplingParams(logits_processors=[gate]))
    assert gate.reached.wait(30)
    return engine, request


DOING = r"which is in wait \(threading\.py:\d+\) < .*__call__ \(conftest\.py:\d+\) < _process \(sampler\.py:\d+\)"


def test_close_says_what_it_waits_for(stuck, gate):
    engine, request = stuck
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        closer = threading.Thread(target=engine.close)
        closer.start()
        deadline = time.monotonic() + 30
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        assert closer.is_alive()
        gate.opened.set()
        closer.join(30)
    (warning,) = told
    assert warning.category is RuntimeWarning
    assert str(warning.message).startswith("close() waits for the engine's thread, ")
    assert re.search(DOING, str(warning.message)), warning.message
    assert not engine._mailbox.thread.is_alive()
    with pytest.raises(EngineClosedError):
        request.result(30)


def test_whatever_asks_the_engine_says_what_it_waits_for(stuck, gate):
    engine, _ = stuck
    threading.Timer(0.6, gate.opened.set).start()
    with pytest.warns(RuntimeWarning, match=r"cancel_all\(\) waits for the engine's thread, " + DOING) as told:
        assert engine.cancel_all() == 1
    assert told[0].filename == __file__


def test_an_engine_that_answers_says_nothing(engine):
    with warnings.catch_warnings(action="error"):
        engine.pause()
        engine.resume()
        engine.close()
        engine.close()


def test_an_interrupt_ends_the_wait_and_closing_can_be_tried_again(script, tiny):
    run = script(
        """
import signal, sys, threading, time, warnings
import nbengine.mailbox
from nbengine import Engine, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)
nbengine.mailbox.PATIENCE = 0.2
warnings.showwarning = lambda *about: print("told", about[1].__name__, flush=True)
warnings.simplefilter("always")
held, opened = threading.Event(), threading.Event()
def hold(output, logits):
    held.set()
    opened.wait()
    return logits
engine = Engine(sys.argv[1], max_model_len=64, num_gpu_blocks_override=8)
engine.submit("a", SamplingParams(logits_processors=[hold]))
held.wait()
for _ in range(2):
    try:
        engine.close()
    except KeyboardInterrupt:
        print("interrupted", engine._mailbox.thread.is_alive(), flush=True)
opened.set()
engine.close()
print("closed", engine._mailbox.thread.is_alive(), engine.status)
""",
        tiny.folder,
    )
    for _ in range(2):
        assert run.line() == "told RuntimeWarning"
        run.interrupt()
        assert run.line() == "interrupted True"
    code, out, err = run.end(60)
    assert (code, out.strip()) == (0, "closed False closed"), err

"""Stopping between two steps, and moving by hand."""

import asyncio
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from nbengine import SamplingParams
from nbengine.errors import EngineDeadError, EnginePausedError, EnginePausedWarning
from nbengine.policy import Policy

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_a_paused_engine_does_nothing_until_it_resumes(engine, tiny):
    engine.pause()
    engine.pause()
    request = engine.submit([5, 6], GREEDY)
    steps = engine.stats()["steps"]
    time.sleep(0.05)
    assert engine.stats()["steps"] == steps
    assert engine.status == request.status == "paused"
    assert "paused" in repr(engine)
    assert "paused" in repr(request)
    engine.resume()
    engine.resume()
    assert request.result(30).outputs[0].token_ids == tiny.greedy([5, 6], 6)


def test_steps_by_hand_bring_a_token_each(make_engine, tiny):
    engine = make_engine(max_num_batched_tokens=16)
    engine.pause()
    request = engine.submit(list(range(4, 44)), GREEDY)  # 16 + 16 + 8, and its first token
    expected = tiny.greedy(list(range(4, 44)), 6)
    seen = []
    for _ in range(4):
        (record,) = engine.step()
        seen.append((record.num_tokens, request.output().outputs[0].token_ids))
    assert seen == [(16, []), (16, []), (8, expected[:1]), (1, expected[:2])]
    records = engine.step(100)
    assert len(records) == 4
    assert [r.step for r in records] == list(range(records[0].step, records[0].step + 4))
    assert request.finished
    assert engine.step() == []
    engine.resume()


def test_only_a_paused_engine_is_moved_by_hand(engine):
    with pytest.raises(EnginePausedError, match=r"call engine\.pause\(\) first"):
        engine.step()
    engine.pause()
    for wrong in (0, -1, True, 1.5, "2", None):
        with pytest.raises(ValueError, match="n must be a whole number of steps, at least 1"):
            engine.step(wrong)
    engine.sleep()
    with pytest.raises(EnginePausedError, match=r"call engine\.wake_up\(\) first"):
        engine.step()
    engine.wake_up()
    engine.resume()


def test_steps_are_made_without_a_trace_too(make_engine):
    engine = make_engine(trace_steps=0)
    engine.pause()
    request = engine.submit([5], GREEDY)
    assert engine.step(10) == []
    assert request.finished
    engine.resume()


def test_whoever_waits_is_told_and_where(engine):
    engine.pause()
    request = engine.submit([5], GREEDY)
    with (
        pytest.warns(EnginePausedWarning, match=r"engine is paused: call engine\.resume\(\)") as told,
        pytest.raises(TimeoutError, match="paused"),
    ):
        request.result(timeout=0.01)
    assert told[0].filename == __file__
    with pytest.warns(EnginePausedWarning) as told:
        asyncio.run(_wait(request))
    assert told[0].filename == __file__
    engine.resume()
    request.result(30)


async def _wait(request):
    try:
        await asyncio.wait_for(_result(request), 0.05)
    except TimeoutError:
        return
    raise AssertionError("it ended")


async def _result(request):
    return await request


@pytest.mark.parametrize("how", ["result", "iterate", "outputs", "await", "aiter", "generate"])
def test_whoever_waits_already_is_told_when_it_pauses(make_engine, gate, until, how):
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logits_processors=[gate])

    def wait():
        if how == "generate":
            return engine.generate([[5, 6]], params)
        request = engine.submit([5, 6], params)
        return {
            "result": request.result,
            "iterate": lambda: list(request),
            "outputs": lambda: list(request.outputs()),
            "await": lambda: asyncio.run(_result(request)),
            "aiter": lambda: asyncio.run(_collect(request)),
        }[how]()

    with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("always")
        waiter = pool.submit(wait)
        assert gate.reached.wait(30)
        pausing = pool.submit(engine.pause)
        gate.opened.set()
        pausing.result(30)
        if not waiter.done():
            until(lambda: told or waiter.done())
            engine.resume()
        assert waiter.result(30)
    assert all(issubclass(w.category, EnginePausedWarning) for w in told)
    assert told


async def _collect(request):
    return [text async for text in request]


def test_whoever_submits_to_a_pausing_engine_is_told(make_engine, gate, until):
    """The pause is taken before the request, and its waiter began to wait before either."""
    engine = make_engine()
    held = engine.submit([4], SamplingParams(max_tokens=1, logits_processors=[gate]))
    assert gate.reached.wait(30)
    with warnings.catch_warnings(record=True) as told, ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("always")
        pausing = pool.submit(engine.pause)
        until(lambda: engine._mailbox._messages)
        request = engine.submit([5], GREEDY)
        waiter = pool.submit(request.result)
        until(lambda: request._enders)
        gate.opened.set()
        pausing.result(30)
        until(lambda: told)
        engine.resume()
        assert waiter.result(30).finished
    assert held.result(30).finished


def test_requests_are_submitted_and_cancelled_while_it_is_paused(engine):
    engine.pause()
    requests = engine.submit_all([[5], [6], [7]], GREEDY)
    requests[1].cancel()
    engine.step()
    assert [len(r.output().outputs[0].token_ids) for r in requests] == [1, 0, 1]
    assert requests[1].finished
    requests[0].cancel()
    engine.resume()
    assert requests[2].result(30).outputs[0].finish_reason == "length"
    assert requests[0].result(30).outputs[0].finish_reason == "abort"


def test_others_get_in_between_the_steps_of_one_call(make_engine):
    engine = make_engine()
    engine.pause()
    request = engine.submit([5], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(engine.step, 100_000)
        while request.output().outputs[0].token_ids == []:
            time.sleep(0.001)
        request.cancel()
        assert len(moving.result(30)) < 1023
    assert request.result(30).outputs[0].finish_reason == "abort"
    engine.resume()


def test_readers_see_each_step_while_it_is_paused(engine):
    """One that reads in another thread is shown a token as soon as its step is made, not one step later."""
    engine.pause()
    request = engine.submit([5], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    seen, moved = [], threading.Semaphore(0)

    def read():
        for output in request.outputs():
            seen.append(len(output.outputs[0].token_ids))
            moved.release()

    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for _ in range(20):
            engine.step()
            assert moved.acquire(timeout=30)
        reader.result(30)
    assert seen[-1] == 20
    assert len(seen) == 20
    engine.resume()


@pytest.mark.filterwarnings("ignore::nbengine.errors.EnginePausedWarning")
def test_what_goes_wrong_in_a_step_by_hand_ends_the_engine_for_everybody(make_engine, caplog):
    engine = make_engine()
    plan = engine._scheduler.plan

    def breaks():
        if any(s.output_len >= 3 for s in engine._scheduler.running.values()):
            raise ZeroDivisionError("in a plan")
        return plan()

    engine._scheduler.plan = breaks
    engine.pause()
    requests = engine.submit_all([[5], [6]], GREEDY)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError: in a plan"):
        engine.step(10)
    for request in requests:
        with pytest.raises(EngineDeadError, match="ZeroDivisionError: in a plan"):
            request.result(30)
        assert len(request.output().outputs[0].token_ids) == 3
    with pytest.raises(EngineDeadError):
        engine.step()
    assert "in a plan" in caplog.text
    assert "def breaks" not in caplog.text
    assert "in breaks" in caplog.text  # the traceback tells where


class LetsNobodyIn(Policy):
    def opens(self, running):
        return False


def test_a_policy_that_lets_nobody_run_can_be_exchanged(engine):
    engine.use(policy=LetsNobodyIn)
    request = engine.submit([5], GREEDY)
    with pytest.raises(TimeoutError):
        request.result(0.05)
    engine.pause()
    assert engine.step(3) == []
    engine.use(policy="fcfs")
    engine.resume()
    assert request.result(30).finished

"""Engines come and go: nothing stays behind, nothing hangs, and every error arrives."""

import gc
import os
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nbengine import LLM, Engine, SamplingParams
from nbengine.errors import CheckpointError, EngineClosedError, EngineDeadError
from nbengine.progress import ProgressBars

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SMALL = {"max_model_len": 128, "num_gpu_blocks_override": 64}


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("nbengine")]


def alive():
    """How many tensors there are, without those of the models that the tests hold."""
    gc.collect()
    return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))


def one_round(folder, how):
    if how == "with":
        with Engine(folder, **SMALL) as engine:
            engine.generate(["a", "b"], GREEDY)
    elif how == "del":
        llm = LLM(str(folder), **SMALL)
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
        del llm
    else:
        engine = Engine(folder, **SMALL)
        request = engine.submit("a", SamplingParams(max_tokens=100, ignore_eos=True))
        engine.close()
        assert request.wait(30)


def test_fifty_rounds_leave_memory_and_threads_flat(tiny):
    for how in ("with", "del", "busy"):
        one_round(tiny.folder, how)
    threads, tensors, before = threading.active_count(), alive(), rss()
    for i in range(50):
        one_round(tiny.folder, ("with", "del", "busy")[i % 3])
    assert threading.active_count() == threads
    assert alive() == tensors
    assert rss() - before < 12 << 20  # a round's weights and cache are 1.2 MB, its objects half a megabyte


def test_del_alone_ends_the_thread_and_frees_the_tensors(tiny):
    engine = Engine(tiny.folder, **SMALL)
    weights = [weakref.ref(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.shape == (64, 16, 2, 8)]
    assert len(weights) == 4  # keys and values of two layers
    thread = engine._mailbox.thread
    request = engine.submit("a", SamplingParams(max_tokens=None, ignore_eos=True))
    del engine
    assert not thread.is_alive()
    assert [ref() for ref in weights] == [None] * 4
    with pytest.raises(EngineClosedError, match="make a new one"):
        request.result(30)


def test_an_engine_in_a_cycle_ends_when_it_is_collected(tiny):
    engine = Engine(tiny.folder, **SMALL)
    thread = engine._mailbox.thread
    engine.me = engine
    del engine
    gc.collect()
    assert not thread.is_alive()


def test_an_engine_lives_while_it_is_iterated(tiny):
    stream = Engine(tiny.folder, **SMALL).stream("a", GREEDY)
    assert "".join(stream)
    del stream
    gc.collect()
    assert not engine_threads()


def test_a_generator_that_is_not_exhausted_keeps_nothing(tiny):
    engine = Engine(tiny.folder, **SMALL)
    stream = engine.stream("a", SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    thread = engine._mailbox.thread
    del engine, stream
    assert not thread.is_alive()


def test_closing_ends_what_is_in_flight_and_refuses_the_rest(make_engine, long):
    engine = make_engine()
    running = engine.submit([5], long)
    next(iter(running))
    engine.pause()
    waiting = engine.submit([6], long)
    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings(action="ignore"):
        waiter = pool.submit(running.result)
        engine.close()
        with pytest.raises(EngineClosedError, match="make a new one"):
            waiter.result(30)
    with pytest.raises(EngineClosedError):
        waiting.result(30)
    assert running.output().outputs[0].token_ids
    assert running.output().outputs[0].finish_reason == "error"
    for call in (
        lambda: engine.submit([5]),
        lambda: engine.generate([[5]]),
        lambda: list(engine.stream([5])),
        engine.pause,
        engine.resume,
        engine.step,
        engine.cancel_all,
        engine.reset_prefix_cache,
        engine.sleep,
        engine.wake_up,
        lambda: engine.use(policy="fcfs"),
        lambda: engine.update_weights({}),
    ):
        with pytest.raises(EngineClosedError, match="make a new one"):
            call()
    engine.close()
    assert engine.stats()["status"] == engine.status == "closed"


def test_closing_from_many_threads_at_once(make_engine, long):
    engine = make_engine()
    requests = [engine.submit([5], long) for _ in range(4)]
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(engine.close) for _ in range(6)]:
            done.result(30)
    assert all(r.wait(30) for r in requests)


def test_closing_from_a_logits_processor(make_engine):
    engine = make_engine()

    def close(output, logits):
        engine.close()
        return logits

    request = engine.submit([5], SamplingParams(logits_processors=[close], max_tokens=50, ignore_eos=True))
    with pytest.raises(EngineClosedError):
        request.result(30)
    engine._mailbox.thread.join(30)
    assert engine.status == "closed"


def test_an_error_inside_with_closes_too(tiny):
    with pytest.raises(KeyError), Engine(tiny.folder, **SMALL) as engine:
        raise KeyError("mine")
    assert engine.status == "closed"


# ── errors in the loop ──────────────────────────────────────────────────────────────────────────────────────────────────


def break_plans(engine, ready=lambda: True):
    """Have the scheduler fail from the plan on in which something holds."""
    plan = engine._scheduler.plan

    def broken():
        if ready():
            raise ZeroDivisionError("in a plan")
        return plan()

    engine._scheduler.plan = broken


def test_an_exception_in_the_loop_reaches_everybody(make_engine):
    engine = make_engine()
    running = engine._scheduler.running
    break_plans(engine, lambda: any(s.output_len >= 3 for s in running.values()))
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    requests = engine.submit_all([[5, i] for i in range(4, 8)], params)
    with ThreadPoolExecutor(4) as pool:
        waiters = [pool.submit(r.result) for r in requests[:2]] + [pool.submit(lambda: "".join(requests[2]))]
        for waiter in waiters:
            with pytest.raises(EngineDeadError, match=r"ZeroDivisionError: in a plan\. Close it"):
                waiter.result(30)
    for request in requests:
        with pytest.raises(EngineDeadError, match="ZeroDivisionError: in a plan"):
            request.result(30)
    assert engine.status == "dead"
    assert "dead" in repr(engine)
    with pytest.raises(EngineDeadError):
        engine.submit([5])
    engine.close()
    assert not engine._mailbox.thread.is_alive()


def test_a_dead_engine_keeps_no_tensors(tiny):
    before = alive()
    engine = Engine(tiny.folder, **SMALL)
    break_plans(engine)
    request = engine.submit([5], SamplingParams(max_tokens=50, ignore_eos=True))
    with pytest.raises(EngineDeadError) as caught:
        request.result(30)
    engine._mailbox.thread.join(30)
    assert alive() == before
    assert caught.value is not None
    engine.close()


def test_a_failed_step_keeps_no_tensors(make_engine):
    engine = make_engine()
    engine.generate([[5]], GREEDY)
    before = alive()
    huge = []

    def broken(x, weight, bias=None):
        if broken.armed:
            local = torch.zeros(1234)
            huge.append(weakref.ref(local))
            raise RuntimeError(f"no memory for {tuple(local.shape)}")
        return torch.nn.functional.linear(x, weight, bias)

    broken.armed = False
    engine.use(ops={"linear": broken})
    broken.armed = True
    request = engine.submit([5], GREEDY)
    with pytest.raises(RuntimeError, match="no memory for"):
        request.result(30)
    assert huge
    assert huge[0]() is None
    assert alive() == before


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class StopLoadingError(Exception):
    pass


def test_what_progress_raises_ends_the_load_and_leaves_nothing(tiny):
    before = alive()

    def stop(phase, done, total):
        if done > 0:
            raise StopLoadingError(phase)

    with pytest.raises(StopLoadingError, match="loading weights") as caught:
        Engine(tiny.folder, progress=stop, **SMALL)
    assert not engine_threads()
    assert alive() == before, caught


def test_progress_is_told_everything(tiny):
    told = []
    with Engine(tiny.folder, progress=lambda *what: told.append(what), **SMALL) as engine:
        assert engine.info.load_seconds > 0
    assert told[0][1] == 0
    assert told[-1][1] == told[-1][2] == engine.info.memory.weights


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"num_gpu_blocks_override": 1 << 40}, MemoryError, "ask for less with num_gpu_blocks_override"),
        ({"max_model_len": 100_000}, ValueError, "2048 positions"),
        ({"max_model_len": 128, "num_gpu_blocks_override": 2}, ValueError, "the KV cache holds 32 tokens"),
        ({"ops": {"linear": lambda *_: 1 / 0}}, ValueError, "given for linear, raised ZeroDivisionError"),
        ({"ops": {"linaer": "reference"}}, ValueError, "did you mean 'linear'"),
        ({"device": "gpu"}, ValueError, "'cuda:N', not 'gpu'"),
    ],
)
def test_a_load_that_fails_leaves_nothing(tiny, config, error, message):
    before = alive()
    with pytest.raises(error, match=message) as caught:
        Engine(tiny.folder, **{**SMALL, **config})
    assert not engine_threads()
    assert alive() == before
    chain, seen = caught.value, 0
    while chain is not None:
        seen += 1
        chain = chain.__context__
    assert seen < 5


def test_a_bad_generation_config_is_told_before_the_weights_are_read(tiny, tmp_path):
    for content, message in (('{"temperature": -1}', "temperature must be"), ("{", "not valid JSON"), ("[1]", "holds no JSON object")):
        folder = _copy(tiny.folder, tmp_path / str(len(message)))
        (folder / "generation_config.json").write_text(content)
        (folder / "model.safetensors").unlink()
        with pytest.raises((ValueError, CheckpointError), match=message):
            Engine(folder, **SMALL)
        assert not engine_threads()


def _copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_an_interrupt_while_it_loads_is_obeyed_even_if_the_load_gets_through(script, tiny):
    """The interrupt comes when the weights are in place and no more progress is reported."""
    run = script(
        """
import signal, sys, threading, time
import nbengine.residence
signal.signal(signal.SIGINT, signal.default_int_handler)
made = nbengine.residence.Residence.allocate
def slow(self):
    print("allocating", flush=True)
    time.sleep(0.5)
    made(self)
nbengine.residence.Residence.allocate = slow
from nbengine import Engine
try:
    Engine(sys.argv[1], max_model_len=64, num_gpu_blocks_override=8)
except KeyboardInterrupt:
    print("interrupted", [t.name for t in threading.enumerate() if t.name.startswith("nbengine")], flush=True)
""",
        tiny.folder,
    )
    assert run.line() == "allocating"
    time.sleep(0.1)
    run.interrupt()
    code, out, err = run.end(60)
    assert (code, out.strip()) == (0, "interrupted []"), err


def test_an_interrupt_while_the_bar_of_a_load_goes_leaves_no_engine(monkeypatch, tiny):
    before, running = set(threading.enumerate()), []
    usual = ProgressBars.close

    def close(self):
        usual(self)
        if threading.current_thread() is threading.main_thread() and not running:
            running.extend(set(threading.enumerate()) - before)
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "close", close)
    with pytest.raises(KeyboardInterrupt):
        Engine(tiny.folder, max_model_len=64, num_gpu_blocks_override=8)
    assert running
    assert set(threading.enumerate()) <= before


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BEGIN = """
import sys, threading, time, signal
from nbengine import Engine, LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background inherits an ignored one
engine = Engine(sys.argv[1], max_model_len=2048, num_gpu_blocks_override=512)
forever = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
"""


@pytest.mark.parametrize(
    "rest",
    [
        "print('end')",
        "engine.submit('a', forever); time.sleep(0.05); print('end')",
        "engine.pause(); engine.submit('a', forever); print('end')",
        "it = engine.stream('a', forever); next(it); print('end')",
        "threading.Thread(target=lambda: engine.submit('a', forever).wait(), daemon=True).start(); time.sleep(0.05); print('end')",
        "engine.submit('a', forever); print('end'); sys.exit(0)",
    ],
)
def test_a_process_with_a_live_engine_ends(script, tiny, rest):
    code, out, err = script(BEGIN + rest, tiny.folder).end(90)
    assert (code, out.strip()) == (0, "end"), err
    assert "Error" not in err
    assert "Fatal" not in err


def test_a_process_whose_engine_is_stuck_ends(script, tiny):
    code, out, err = script(
        BEGIN
        + """
import nbengine.engine
nbengine.engine.PATIENCE = 0.5
engine.submit('a', SamplingParams(logits_processors=[lambda output, logits: time.sleep(10000)]))
time.sleep(0.1)
print('end')
""",
        tiny.folder,
    ).end(60)
    assert (code, out.strip()) == (0, "end"), err


def test_an_interrupt_cancels_exactly_the_requests_of_its_call(script, tiny):
    run = script(
        BEGIN
        + """
other = engine.submit('other', SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))
def fresh():
    return {s.request_id for s in list(engine._scheduler.running.values()) + engine._scheduler.waiting} - {other.id}
for round, call in enumerate([
    lambda: engine.generate(['a', 'b', 'c'], forever),
    lambda: engine.generate(['a', 'b', 'c'], forever, use_tqdm=True),
    lambda: list(engine.stream('a', forever)),
]):
    try:
        threading.Timer(0.15, lambda: print('now', flush=True)).start()
        call()
    except KeyboardInterrupt:
        engine.pause()  # comes after the cancellations
        print('cancelled', sorted(fresh()), engine.status, flush=True)
        engine.resume()
print(len(other.result(60).outputs[0].token_ids), engine.generate(['a'], SamplingParams(max_tokens=1))[0].finished)
""",
        tiny.folder,
    )
    for _ in range(3):
        assert run.line() == "now"
        run.interrupt()
        assert run.line() == "cancelled [] paused", run.end()
    code, out, err = run.end()
    assert (code, out.strip()) == (0, "300 True"), err


def test_an_interrupt_of_agenerate_cancels_its_requests(script, tiny):
    run = script(
        BEGIN
        + """
import asyncio
async def main():
    asyncio.get_running_loop().call_later(0.15, lambda: print('now', flush=True))
    await engine.agenerate(['a', 'b'], forever)
try:
    asyncio.run(main())
except KeyboardInterrupt:
    engine.pause()
    print(engine.stats()["num_running"], engine.status)
""",
        tiny.folder,
    )
    assert run.line() == "now"
    run.interrupt()
    code, out, err = run.end()
    assert (code, out.strip()) == (0, "0 paused"), err
    assert "never" not in err  # coroutines never awaited, exceptions never retrieved


def test_an_agenerate_that_fails_leaves_no_task_with_a_secret(make_engine, until, caplog):
    """The others of the call end too, and asyncio has nothing to complain of."""
    import asyncio

    engine = make_engine()
    unraised = []

    def fail(output, logits):
        if len(output) > 2:
            raise ZeroDivisionError("here")
        return logits

    bad = SamplingParams(logits_processors=[fail], max_tokens=50, ignore_eos=True)

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unraised.append(context))
        with pytest.raises(RuntimeError, match="ZeroDivisionError: here"):
            await engine.agenerate([[5], [6], [7]], [GREEDY, bad, bad])
        await asyncio.to_thread(until, lambda: engine.status == "idle")
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main(), debug=True)
    gc.collect()
    assert not unraised
    assert "never" not in caplog.text

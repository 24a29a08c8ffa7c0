"""The engine's handle from many threads, and what it does between two steps."""

import asyncio
import contextlib
import itertools
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nbengine import SamplingParams
from nbengine.errors import EngineClosedError, RequestError
from nbengine.mailbox import Mailbox
from nbengine.policy import Policy, StaticBatching

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def impatient():
    """Threads change places as often as they can, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_many_threads_submit_at_once(engine, tiny, prompts):
    given = prompts(40)
    expected = {tuple(p): tiny.greedy(p, 8) for p in given}

    def work(own):
        return [(p, engine.submit(p, GREEDY).result(60).outputs[0].token_ids) for p in own]

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, given[i::8]) for i in range(8)]:
            for prompt, tokens in done.result(60):
                assert tokens == expected[tuple(prompt)]


def test_a_thousand_tiny_requests(engine):
    outputs = engine.generate([[4 + i % 300] for i in range(1000)], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1] * 1000
    assert engine.stats()["blocks_used"] == 0


def test_requests_of_one_call_are_queued_together(engine):
    engine.pause()
    requests = engine.submit_all([[5], [6], [7]], GREEDY)
    assert [r.id for r in requests] == ["r0", "r1", "r2"]
    (record,) = engine.step()
    assert len(record.uids) == 3
    engine.resume()
    assert all(r.result(30).finished for r in requests)


@pytest.mark.usefixtures("impatient")
def test_no_message_is_lost_when_posters_and_the_sleeping_engine_race():
    """Each poster waits for its message to be taken, so the engine falls asleep all the time, just when the next one comes."""
    mailbox = Mailbox()
    taken = [threading.Event() for _ in range(3000)]
    stopped = threading.Event()

    def engine():
        while not stopped.is_set():
            while (message := mailbox.take()) is not None:
                for number in message[1]:
                    taken[number].set()
            bell = threading.Event()
            if mailbox.sleep(bell.set):
                bell.wait()
                mailbox.awake()

    def post(numbers):
        for number in numbers:
            mailbox.cancel(number)
            if not taken[number].wait(10):
                return number
        return None

    with ThreadPoolExecutor(4) as pool:
        pool.submit(engine)
        lost = [poster.result(60) for poster in [pool.submit(post, range(i, 3000, 3)) for i in range(3)]]
        stopped.set()
        mailbox.cancel(0)
        mailbox.cancel(0)
    assert lost == [None] * 3


def test_a_message_keeps_the_engine_awake_or_wakes_it_whenever_it_comes():
    mailbox, rung = Mailbox(), []
    assert mailbox.take() is None
    mailbox.cancel("after the last look and before the sleep")
    assert not mailbox.sleep(lambda: rung.append(1))
    assert not rung
    assert mailbox.take() is not None
    assert mailbox.sleep(lambda: rung.append(1))
    mailbox.cancel("in the sleep")
    mailbox.cancel("in the sleep, too")
    assert rung
    mailbox.awake()
    rung.clear()
    mailbox.cancel("while it works")
    assert not rung


@pytest.mark.usefixtures("impatient")
def test_submitting_and_closing_at_once_leaves_nobody_waiting(make_engine):
    for _ in range(5):
        engine = make_engine()
        barrier = threading.Barrier(5)

        def submit(engine=engine, barrier=barrier):
            barrier.wait(30)
            requests = []
            with contextlib.suppress(EngineClosedError):
                requests.extend(engine.submit([5, 6], GREEDY) for _ in range(200))
            return requests

        def close(engine=engine, barrier=barrier):
            barrier.wait(30)
            time.sleep(random.random() * 0.02)
            engine.close()

        with ThreadPoolExecutor(5) as pool:
            submitters = [pool.submit(submit) for _ in range(4)]
            pool.submit(close).result(60)
            for request in itertools.chain.from_iterable(s.result(60) for s in submitters):
                assert request.wait(30), request
                if request.status == "failed":
                    with pytest.raises(EngineClosedError):
                        request.result()


@pytest.mark.usefixtures("impatient")
def test_random_submits_cancels_and_readers_leave_nothing_behind(make_engine, tiny):
    engine = make_engine(num_gpu_blocks_override=24, max_model_len=128, max_num_batched_tokens=24)
    want = {n: tiny.greedy([9, 8, 7], n) for n in (5, 30)}

    def work(seed):
        rng = random.Random(seed)
        for _ in range(12):
            n = rng.choice([5, 30])
            request = engine.submit([9, 8, 7], SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, n=rng.choice([1, 2])))
            how = rng.randrange(4)
            if how == 0:
                time.sleep(rng.random() * 0.01)
                request.cancel()
                tokens = request.result(60).outputs[0].token_ids
                assert tokens == want[n][: len(tokens)]
            elif how == 1:
                assert asyncio.run(_await(request)).outputs[0].token_ids == want[n]
            elif how == 2:
                assert list(request.outputs())[-1].outputs[-1].token_ids == want[n]
            else:
                assert request.result(60).outputs[0].token_ids == want[n]

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, seed) for seed in range(6)]:
            done.result(120)
    assert engine.status == "idle"
    assert engine.stats()["blocks_used"] == 0


async def _await(request):
    return await request


def test_stats_are_plain_and_add_up(engine):
    engine.generate([[5, 6, 7]] * 3, GREEDY)
    stats = engine.stats()
    assert stats["status"] == "idle"
    assert stats["generation_tokens"] == 24
    assert stats["prompt_tokens"] == 9
    assert stats["num_running"] == stats["num_waiting"] == stats["blocks_used"] == 0
    assert stats["blocks_total"] == 512
    assert all(v is None or isinstance(v, int | float | str) for v in stats.values())


def test_status_tells_what_it_does(make_engine, gate, until):
    engine = make_engine()
    assert engine.status == "idle"
    request = engine.submit([5], SamplingParams(logits_processors=[gate], max_tokens=1))
    assert gate.reached.wait(30)
    assert engine.status == "running"
    assert request.status in {"waiting", "running"}
    gate.opened.set()
    request.result(30)
    until(lambda: engine.status == "idle")
    engine.close()
    assert engine.status == "closed"
    assert "closed" in repr(engine)


def test_the_policy_is_exchanged_while_it_runs(engine, tiny):
    requests = [engine.submit([5, i], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)) for i in range(4, 8)]
    for policy in ("static", StaticBatching, Policy(), "priority", "fcfs"):
        engine.use(policy=policy)
    assert [r.result(60).outputs[0].token_ids for r in requests] == [tiny.greedy([5, i], 30) for i in range(4, 8)]
    with pytest.raises(ValueError, match="scheduling_policy must be one of"):
        engine.use(policy="fastest")


def test_priority_decides_who_goes_first(make_engine):
    engine = make_engine(scheduling_policy="priority", max_num_seqs=1)
    engine.pause()
    late, soon = engine.submit_all([[5], [6]], GREEDY, priority=[3, 1])
    engine.step()
    assert (late.status, soon.status) == ("paused", "paused")
    assert len(soon.output().outputs[0].token_ids) == 1
    assert len(late.output().outputs[0].token_ids) == 0
    engine.resume()
    assert late.result(30).finished


def test_a_policy_that_fails_to_order_is_refused_and_the_old_one_goes_on(engine):
    class Confused(Policy):
        def key(self, sequence):
            raise LookupError("no key")

    engine.pause()
    request = engine.submit([5], GREEDY)
    with pytest.raises(LookupError, match="no key"):
        engine.use(policy=Confused)
    engine.resume()
    assert request.result(30).finished
    assert engine.generate([[5]], GREEDY)[0].finished


def test_ops_are_exchanged_while_it_runs_and_bad_ones_are_refused(engine, tiny):
    calls = []

    def linear(x, weight, bias=None):
        calls.append(1)
        return torch.nn.functional.linear(x, weight, bias)

    expected = tiny.greedy([5, 6], 8)
    engine.use(ops={"linear": linear})
    assert engine.generate([[5, 6]], GREEDY)[0].outputs[0].token_ids == expected
    assert calls
    with pytest.raises(ValueError, match="differs from linear_reference"):
        engine.use(ops={"linear": lambda x, weight, bias=None: torch.nn.functional.linear(x, weight, bias) * 1.1})
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        engine.use(ops={"liner": linear})
    with pytest.raises(ValueError, match="given for linear, raised ZeroDivisionError"):
        engine.use(ops={"linear": lambda *_: 1 / 0})
    assert engine.generate([[5, 6]], GREEDY)[0].outputs[0].token_ids == expected


def test_waiting_for_the_engine_in_its_own_thread_is_refused(engine):
    found = []

    def processor(output, logits):
        for call in (lambda: engine.generate([[5]], GREEDY), engine.pause, engine.stats):
            try:
                call()
                found.append(None)
            except RuntimeError as error:
                found.append(str(error))
        return logits

    engine.submit([5], SamplingParams(logits_processors=[processor], max_tokens=1)).result(30)
    assert "own thread" in found[0]
    assert "own thread" in found[1]
    assert found[2] is None


def test_it_works_beside_nest_asyncio(script, tiny):
    pytest.importorskip("nest_asyncio2", reason="nest-asyncio2 is not installed: the notebook's side is not here")
    run = script(
        """
import asyncio, sys
import nest_asyncio2
nest_asyncio2.apply()
from nbengine import Engine, SamplingParams
engine = Engine(sys.argv[1], max_model_len=64, num_gpu_blocks_override=8)
async def main():
    return engine.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True)), await engine.submit([5], SamplingParams(max_tokens=2, ignore_eos=True))
async def outer():
    return asyncio.run(main())
print(len(asyncio.run(outer())[0][0].outputs[0].token_ids))
engine.close()
""",
        tiny.folder,
    )
    code, out, err = run.end()
    assert (code, out.strip()) == (0, "3"), err


def test_sleeping_gives_the_cache_back_and_waking_goes_on(engine, tiny, until):
    expected = tiny.greedy([5, 6, 7], 60)
    for level in (1, 2):
        request = engine.submit([5, 6, 7], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        until(lambda request=request: len(request.completions[0].token_ids) > 2)
        engine.sleep(level)
        assert engine.status == "asleep"
        assert engine.stats()["blocks_used"] == 0
        engine.wake_up()
        assert request.result(60).outputs[0].token_ids == expected
    with pytest.raises(ValueError, match="level must be 1"):
        engine.sleep(3)
    engine.wake_up()
    assert engine.status == "idle"


def test_a_pause_outlives_a_sleep(engine):
    engine.pause()
    engine.sleep()
    assert engine.status == "asleep"
    engine.wake_up()
    assert engine.status == "paused"
    engine.resume()
    assert engine.status == "idle"


def test_new_weights_count_from_the_next_step_and_old_prefixes_are_forgotten(engine, tiny):
    from copy import deepcopy

    prompt = list(range(4, 60))
    engine.generate([prompt], GREEDY)
    other = deepcopy(tiny.model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(-2)
    engine.update_weights({"model.layers.0.mlp.down_proj.weight": other.model.layers[0].mlp.down_proj.weight})
    tiny_other = type(tiny)(tiny.folder, other)
    output = engine.generate([prompt], GREEDY)[0]
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == tiny_other.greedy(prompt, 8) != tiny.greedy(prompt, 8)
    with pytest.raises(ValueError, match="has no weight 'nonsense'"):
        engine.update_weights({"nonsense": torch.zeros(1)})
    with pytest.raises(ValueError, match="has the shape"):
        engine.update_weights({"model.norm.weight": torch.zeros(3)})
    assert engine.generate([prompt], GREEDY)[0].finished


def test_new_weights_for_a_model_that_is_asleep_without_them_are_refused(engine):
    engine.sleep(2)
    with pytest.raises(RuntimeError, match="wake_up"):
        engine.update_weights({"model.norm.weight": torch.zeros(32)})
    engine.wake_up()
    assert engine.generate([[5]], GREEDY)[0].finished


def test_a_step_whose_model_fails_fails_its_batch_only(make_engine, monkeypatch):
    engine = make_engine()
    expected = engine.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids

    def broken(x, weight, bias=None):
        if broken.armed:
            broken.armed = False
            raise RuntimeError("no memory for this")
        return torch.nn.functional.linear(x, weight, bias)

    broken.armed = False
    engine.use(ops={"linear": broken})
    broken.armed = True
    with pytest.raises(RequestError, match="RuntimeError: no memory for this"):
        engine.generate([[5, 6, 7]], GREEDY)
    assert engine.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids == expected
    assert engine.stats()["blocks_used"] == 0


def test_a_pool_that_just_holds_one_sequence_serves_it_again_and_again(make_engine, tiny):
    """Three full blocks found in the cache, the last to be copied, and one more to grow: in a pool of four."""
    engine = make_engine(max_model_len=64, num_gpu_blocks_override=4)
    prompt = list(range(4, 52))
    expected = tiny.greedy(prompt, 16)
    for _ in range(3):
        output = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))[0]
        assert output.outputs[0].token_ids == expected
    outputs = engine.generate([prompt] * 4, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, n=2))
    assert all(one.token_ids == expected for output in outputs for one in output.outputs)


def test_two_engines_at_once_agree_with_one(make_engine, tiny, prompts):
    given = prompts(10)
    one, two = make_engine(), make_engine(block_size=8, max_num_batched_tokens=32)
    both = [one.submit_all(given, GREEDY), two.submit_all(given, GREEDY)]
    expected = [tiny.greedy(p, 8) for p in given]
    for requests in both:
        assert [r.result(60).outputs[0].token_ids for r in requests] == expected


def test_the_bundled_names_are_all_there():
    import nbengine

    for name in nbengine.__all__:
        assert getattr(nbengine, name).__name__ == name
    assert set(nbengine.__all__) <= set(dir(nbengine))
    with pytest.raises(AttributeError, match="no attribute 'Enginee'"):
        nbengine.Enginee  # noqa: B018

"""Who has the interpreter, and for how long, while an engine works beside a thread that is busy with Python."""

from __future__ import annotations

import sys
import threading
from statistics import mean
from time import perf_counter, sleep

import numpy as np
import pytest

from nbengine import Engine, SamplingParams, startup, switch_interval
from nbengine.batch import Batch, NewRow
from nbengine.device_runner import DeviceRunner
from nbengine.device_sampler import Drawing
from nbengine.staging import Staging
from nbengine.switch_interval import begin, end, put_others_off, urgent

ROWS = 1000


@pytest.fixture
def usual():
    interval = sys.getswitchinterval()
    yield interval
    sys.setswitchinterval(interval)


def test_the_interval_is_the_users_again_when_nobody_works(usual):
    begin()
    assert sys.getswitchinterval() == pytest.approx(switch_interval.WORKING, abs=2e-6)
    with urgent():
        assert sys.getswitchinterval() == pytest.approx(switch_interval.URGENT, abs=2e-6)
    assert sys.getswitchinterval() == pytest.approx(switch_interval.WORKING, abs=2e-6)
    end()
    assert sys.getswitchinterval() == pytest.approx(usual, abs=2e-6)


def test_what_the_user_sets_meanwhile_stays_and_a_shorter_one_of_theirs_is_kept(usual):
    begin()
    sys.setswitchinterval(0.02)
    put_others_off()
    end()
    assert sys.getswitchinterval() == pytest.approx(0.02, abs=2e-6)
    sys.setswitchinterval(1e-4)
    begin()
    with urgent():
        pass
    assert sys.getswitchinterval() == pytest.approx(1e-4, abs=2e-6)
    end()


def test_going_back_to_pythons_own_interval_is_heard(usual):
    sys.setswitchinterval(0.02)
    begin()
    sys.setswitchinterval(0.005)
    with urgent():
        pass
    end()
    assert sys.getswitchinterval() == pytest.approx(0.005, abs=2e-6)


def a_wait():
    with urgent():
        pass


@pytest.mark.parametrize("setting_it", [a_wait, put_others_off])
def test_before_the_longer_interval_is_set_whoever_waits_is_let_in_at_the_short_one(usual, monkeypatch, setting_it):
    seen = []
    monkeypatch.setattr(switch_interval, "_brief", lambda _: seen.append(sys.getswitchinterval()))
    begin()
    seen.clear()
    setting_it()
    assert 1 <= len(seen) <= switch_interval._TRIES
    assert seen == pytest.approx([switch_interval.URGENT] * len(seen), abs=2e-6)
    assert sys.getswitchinterval() == pytest.approx(switch_interval.WORKING, abs=2e-6)
    end()


def test_what_a_busy_thread_sets_in_the_instant_that_it_is_let_in_stays(usual, monkeypatch):
    begin()
    monkeypatch.setattr(switch_interval, "_brief", lambda _: sys.setswitchinterval(0.011))
    put_others_off()
    monkeypatch.undo()
    with urgent():
        pass
    end()
    assert sys.getswitchinterval() == pytest.approx(0.011, abs=2e-6)


# ── a turn of the engine's ──────────────────────────────────────────────────────────────────────────────────────────


def share_interrupted(rounds=150):
    """Of turns of an engine's, each much shorter than the interval, the share in which a busy main thread took the interpreter."""
    taken = []

    def work():
        begin()
        for _ in range(rounds):
            with urgent():
                sleep(1e-3)
            began = perf_counter()
            sum(number * number for number in range(2000))
            taken.append(perf_counter() - began)
        end()

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        sum(number * number for number in range(500))
    return sum(seconds > switch_interval.WORKING for seconds in taken) / rounds


MANY = 0.1  # of the turns: put off, a busy thread takes some hundredths of them, and a third or more otherwise


def test_a_busy_thread_waits_for_the_longer_interval(usual):
    assert mean(share_interrupted() for _ in range(12)) < MANY


# ── work that keeps the interpreter ─────────────────────────────────────────────────────────────────────────────────


def lets_go(work, times=2000):
    """Whether another thread ever runs while work is done that nobody interrupts."""
    turns, stop = [0], False

    def watch():
        while not stop:
            turns[0] += 1
            switch_interval._brief(0)

    sys.setswitchinterval(100)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    sleep(0.01)
    before = turns[0]
    for _ in range(times):
        work()
        if turns[0] != before:
            break
    ran = turns[0] != before
    stop = True
    thread.join()
    return ran


def keeps(work):
    """Twice, for a thread of the test runner's may have let the other in once."""
    return not lets_go(work) or not lets_go(work)


def test_numpy_lets_go_for_many_numbers(usual):
    """What the tests below rest on."""
    numbers, few = np.zeros(ROWS, np.int32), np.zeros(400, np.int32)
    assert lets_go(lambda: np.add(numbers, 1), times=200_000)
    assert keeps(lambda: np.add(few, 1))


def decoding(count=ROWS, tokens=1):
    def numbers(values):
        return np.array(values, np.int32)

    each = list(range(count))
    counts = numbers([tokens] * count)
    nothing = numbers([])
    ids = numbers([-1] * (count * tokens))
    return Batch(0, numbers(each), numbers(each), counts, ids, nothing.reshape(0, 4), nothing.reshape(0, 2), numbers(each), numbers(each))


@pytest.fixture
def runner(monkeypatch):
    """Of an engine that is idle."""
    made, init = [], DeviceRunner.__init__

    def keeping(self, *args, **options):
        init(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(DeviceRunner, "__init__", keeping)
    monkeypatch.setattr(startup, "_overlaps", lambda loaded: True)
    monkeypatch.setattr(Staging, "send", lambda *_: None)  # a copy of torch's on a CPU; on a GPU a call that keeps the interpreter
    room = {"max_num_seqs": ROWS, "max_num_batched_tokens": 2 * ROWS, "num_gpu_blocks_override": 64}
    with Engine("tales", device="cpu", dtype="float32", max_model_len=64, **room):
        yield made[0]


@pytest.mark.parametrize("tokens", [1, 2], ids=["decoding", "mixed"])
def test_to_pack_a_step_of_many_rows_keeps_the_interpreter(usual, runner, tokens):
    batch, slot = decoding(tokens=tokens), runner._staging.take()
    assert keeps(lambda: runner._send(batch, slot, ROWS, 2 * ROWS, ROWS))


@pytest.mark.parametrize(("admitted", "writes"), [(0, 10), (0, ROWS), (200, 500)])
def test_to_pack_what_changes_in_the_tables_keeps_the_interpreter(usual, runner, monkeypatch, admitted, writes):
    monkeypatch.setattr(Staging, "send_updates", lambda *_: None)
    params = SamplingParams().resolve((), None)
    batch, slot = decoding(), runner._staging.take()
    batch.admitted = [NewRow(row, [1, 2], [], params, 1) for row in range(admitted)]
    batch.table_writes = np.array([(0, row, 0, 1) for row in range(writes)], np.int32)
    assert keeps(lambda: runner._update(batch, slot))


def test_to_collect_the_tokens_of_many_rows_keeps_the_interpreter(usual, runner):
    rows, drawn = decoding().sample_rows, np.array(range(ROWS), np.int64)
    runner.sampler._special.add(ROWS + 1)

    def collect():
        assert runner.sampler.plain(rows)
        runner.sampler.collect(drawn[:ROWS].tolist(), rows, Drawing())

    assert keeps(collect)

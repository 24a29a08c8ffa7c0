"""A cell that keeps Python busy while an engine's device computes; the device only takes time here, a real one is in tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from time import perf_counter, sleep

import numpy as np
import pytest

from nbengine import switch_interval
from nbengine.batch import Sampled
from nbengine.blocks import BlockPool
from nbengine.core import EngineCore
from nbengine.loop import EngineLoop
from nbengine.mailbox import Mailbox
from nbengine.policy import Policy
from nbengine.request import Request
from nbengine.sampling_params import SamplingParams
from nbengine.scheduler import Scheduler
from nbengine.switch_interval import urgent

SEQUENCES, NEW = 600, 120
STEP = 6e-3  # seconds on the device
CALLS = 20  # of those that let go of the interpreter, to launch a step: numpy does for more than 500 numbers
LOST = 0.35  # most that a busy main thread may cost; a few hundredths where nothing else runs

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TimedRunner:
    """Steps take their time one after the other; whoever waits for one lets go of the interpreter, as CUDA's calls do."""

    overlaps = True

    def __init__(self):
        self.flights = deque()
        self.free_at = 0.0

    def launch(self, batch):
        with urgent():
            for _ in range(CALLS):
                np.add(batch.rows, 1)
        self.free_at = max(self.free_at, perf_counter()) + STEP
        self.flights.append((self.free_at, len(batch.sample_index)))

    @property
    def ready(self):
        return bool(self.flights) and perf_counter() >= self.flights[0][0]

    def wait(self, place):
        left = self.flights[place][0] - perf_counter()
        if left > 0:
            with urgent():
                sleep(left)

    def sample(self):
        self.wait(0)
        _, count = self.flights.popleft()
        return Sampled(np.full((count, 1), 5, np.int32), np.ones(count, np.int32), device_s=STEP)

    def close(self):
        pass


@pytest.fixture
def mailbox():
    scheduler = Scheduler(BlockPool(SEQUENCES * (NEW // 16 + 2), 16), Policy(), max_num_batched_tokens=8192, max_num_seqs=SEQUENCES)
    mailbox = Mailbox()
    loop = EngineLoop(mailbox, lambda: EngineCore(scheduler, TimedRunner()), "nbengine-timed")
    loop.thread.start()
    yield mailbox
    mailbox.call("close")
    mailbox.wait_for_end()


@pytest.fixture
def busy_cores():
    """As many processes that compute as leave less than a core for each of the main and the engine's thread."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(min(CORES, 16) - 1)]
    yield
    for process in spinning:
        process.kill()
        process.wait()


def seconds(mailbox, *, busy):
    params = SamplingParams(max_tokens=NEW, ignore_eos=True).resolve((), None)
    requests = [Request(f"r{i}", None, [10, 11, 12], params, mailbox, None, NEW + 3) for i in range(SEQUENCES)]
    began = perf_counter()
    mailbox.submit(requests)
    while busy and not requests[-1].finished:
        sum(number * number for number in range(2000))
    for request in requests:
        request.result(60)
    return perf_counter() - began


def lost(mailbox):
    """The share of its speed that the engine loses to a busy main thread, by turns of both: other tests may run beside this one."""
    for _ in range(8):
        yield 1 - seconds(mailbox, busy=False) / seconds(mailbox, busy=True)


def test_it_costs_little(mailbox):
    assert any(share < LOST for share in lost(mailbox))


def test_it_costs_little_where_the_cores_are_busy_too(mailbox, busy_cores):
    assert any(share < LOST for share in lost(mailbox))


@pytest.mark.slow
def test_it_would_cost_more_were_the_interpreter_wanted_back_at_once(mailbox, busy_cores, monkeypatch):
    monkeypatch.setattr(switch_interval, "URGENT", 5e-6)
    assert any(share > LOST for share in lost(mailbox))

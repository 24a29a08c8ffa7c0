"""The host's work for one decode step: plan, commit, record and delivery of 256 sequences, with a runner that computes nothing.

`python benchmarks/host_step.py` prints the median and the 90th percentile, with the trace on and off.
"""

from __future__ import annotations

import random
import statistics
import time

import numpy as np

from nbengine.batch import Batch, Sampled
from nbengine.blocks import BlockPool
from nbengine.core import EngineCore
from nbengine.loop import EngineLoop
from nbengine.mailbox import Mailbox
from nbengine.policy import Policy
from nbengine.request import Request
from nbengine.sampling_params import SamplingParams
from nbengine.scheduler import Scheduler


class NoRunner:
    """Draws the same token for everybody."""

    overlaps = ready = False

    def launch(self, batch: Batch) -> None:
        self.batch = batch

    def sample(self, mask: object = None) -> Sampled:  # noqa: ARG002 - a Runner's signature
        count = len(self.batch.sample_index)
        return Sampled(np.full((count, 1), 5, np.int32), np.ones(count, np.int32))

    def close(self) -> None:
        pass


def measure(sequences: int = 256, prompt: int = 157, new: int = 312, trace_steps: int = 4096, stream: bool = False) -> list[float]:
    """Seconds of every step in which all sequences decoded."""
    pool = BlockPool(sequences * (prompt + new) // 16 + sequences, 16)
    scheduler = Scheduler(pool, Policy(), max_num_batched_tokens=8192, max_num_seqs=sequences)
    core = EngineCore(scheduler, NoRunner(), trace_steps=trace_steps)
    mailbox = Mailbox()
    loop = EngineLoop(mailbox, lambda: core, "host-step")
    loop.core = core  # driven from here, step by step, in place of its thread
    rng = random.Random(0)
    params = SamplingParams(max_tokens=new, ignore_eos=True).resolve((), None)
    requests = [
        Request(f"r{i}", None, [rng.randrange(10, 1000) for _ in range(prompt)], params, mailbox, None, prompt + new)
        for i in range(sequences)
    ]
    if stream:
        for request in requests:
            request._waiters.append(lambda: None)  # noqa: SLF001 - as if somebody read each
    loop._on_add(requests)  # noqa: SLF001
    taken = []
    while core.has_work():
        began = time.perf_counter()
        updates = core.step()
        loop._deliver(updates)  # noqa: SLF001
        if len(updates) == sequences:
            taken.append(time.perf_counter() - began)
    return taken


if __name__ == "__main__":
    for label, options in (("trace on", {}), ("trace off", {"trace_steps": 0}), ("trace on, every request read", {"stream": True})):
        seconds = measure(**options)
        print(f"{label:30} median {1e3 * statistics.median(seconds):.3f} ms  p90 {1e3 * sorted(seconds)[len(seconds) * 9 // 10]:.3f} ms")

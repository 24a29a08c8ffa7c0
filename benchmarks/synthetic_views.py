"""A load of ShareGPT's shape on the real scheduler with a runner that computes nothing, for `views.py --synthetic`."""

from __future__ import annotations

import gc
import statistics
import time
from types import SimpleNamespace
from typing import Any

from host_step import NoRunner

from nbengine import SamplingParams, widgets
from nbengine.bench.workloads import workload
from nbengine.blocks import BlockPool
from nbengine.core import EngineCore
from nbengine.front import Front
from nbengine.loop import EngineLoop
from nbengine.mailbox import Mailbox
from nbengine.policy import Policy
from nbengine.request import Request
from nbengine.scheduler import Scheduler

VIEWS = (widgets.BlockTableView, widgets.Timeline, widgets.Dashboard)


class _Engine(SimpleNamespace):
    """What views ask of an engine."""

    __slots__ = ("__weakref__",)


class Load:
    """An engine's core that is driven step by step, and views of it that are refreshed in between, in this thread."""

    def __init__(self, count: int, blocks: int) -> None:
        scheduler = Scheduler(BlockPool(blocks, 16), Policy(), max_num_batched_tokens=16_384, max_num_seqs=1024)
        self.core = EngineCore(scheduler, NoRunner())
        mailbox = Mailbox()
        loop = EngineLoop(mailbox, lambda: self.core, "synthetic")
        loop.core = self.core
        self.requests = []
        for i, (prompt, output) in enumerate(workload("sharegpt", count)):
            params = SamplingParams(max_tokens=output, ignore_eos=True).resolve((), None)
            self.requests.append(Request(f"r{i}", None, prompt, params, mailbox, None, len(prompt) + output))
        self.engine = _Engine(
            trace=self.core.trace,
            front=Front("synthetic"),
            status="stepped",
            info=SimpleNamespace(max_num_seqs=1024, max_num_batched_tokens=16_384),
            stats=lambda: {"max_num_seqs": 1024, "max_num_batched_tokens": 16_384},
            policy=scheduler.policy,
        )
        self.views = [kind(self.engine) for kind in VIEWS]
        loop._on_add(self.requests)  # noqa: SLF001 - as its thread would

    def measure(self, every: int) -> dict[str, Any]:
        """Milliseconds of this thread's processor time that an update of each view takes, its message included and no garbage collected."""
        gc.disable()
        self.core.step()
        for view in self.views:  # which imports and compiles what is needed once
            view.refresh()
        names = [kind.__name__ for kind in VIEWS]
        taken: dict[str, list[float]] = {name: [] for name in names}
        running, events, steps = [], 0, 0
        while self.core.has_work():
            self.core.step()
            steps += 1
            events += len(self.core.trace.last.events)
            if steps % every:
                continue
            running.append(len(self.core.scheduler.running))
            for name, view in zip(names, self.views, strict=True):
                began = time.thread_time()
                view.refresh()
                taken[name].append(1e3 * (time.thread_time() - began))
        catching_up = []
        for kind in VIEWS:  # a view that is opened late
            view = kind(self.engine)
            view.playhead._models.clear()  # noqa: SLF001 - as if none had been there
            began = time.thread_time()
            view.refresh()
            catching_up.append(1e3 * (time.thread_time() - began))
        return {
            "steps": steps,
            "events_per_step": round(events / steps, 1),
            "updates": len(running),
            "running": [min(running), max(running)],
            "ms": {name: round(statistics.mean(one), 3) for name, one in taken.items()},
            "ms_together": round(sum(map(statistics.mean, taken.values())), 3),
            "ms_of_the_first": dict(zip(names, (round(one, 3) for one in catching_up), strict=True)),
            "bytes": [len(view.packed["json"]) + len(view.packed["data"]) for view in self.views],
        }

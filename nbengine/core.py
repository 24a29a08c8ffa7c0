"""The engine without its thread: requests in, steps one at a time, updates out. Deterministic; used by one thread at a time."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from nbengine.plan import Plan, Update
from nbengine.scheduler import Scheduler
from nbengine.sequence import Sequence
from nbengine.trace import SequenceInfo, StepRecord, Trace

if TYPE_CHECKING:
    from nbengine.batch import Batch, Sampled
    from nbengine.sampling_params import SamplingParams
    from nbengine.sequence import FinishReason

_SEEDS = 1 << 64


@dataclass(slots=True)
class NewRequest:
    """The message that brings a request to the core: nothing in it needs the process it was written in, but for logits processors."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # resolved for the model
    limit: int  # length at which every output ends
    priority: int = 0
    arrival: float = 0.0
    cache_salt: bytes = b""  # requests share cached prefixes only with those of the same salt


class Runner(Protocol):
    """What the core asks of the side that holds tensors."""

    def launch(self, batch: Batch) -> None:
        """Start computing a batch."""

    def sample(self, mask: Any = None) -> Sampled:
        """Draw the tokens of the batch launched first that has not been sampled, and wait for them."""

    def use(self, ops: dict[str, Any]) -> None:
        """Exchange implementations of ops."""

    def sleep(self, level: int) -> None:
        """Give memory back: the cache (level 1), the weights too (level 2)."""

    def wake_up(self) -> None:
        """Take it again."""

    def update_weights(self, weights: Any) -> None:
        """Put new values into weights by their names in the checkpoint."""

    def close(self) -> None:
        """Release everything."""


class EngineCore:
    """Scheduler, runner and trace, and the one step that ties them."""

    def __init__(self, scheduler: Scheduler, runner: Runner, *, seed: int = 0, trace_steps: int = 4096, max_model_len: int = 0) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.max_model_len = max_model_len
        self.trace = Trace(scheduler.pool, trace_steps)
        self.requests: dict[str, list[Sequence]] = {}
        self._seeds = random.Random(seed)  # noqa: S311 - for sampling, not for secrets
        self.entered: list[Sequence] = []  # who was given a row by the last step
        self._arrivals = 0
        self._uids = 0
        self._finished: list[tuple[int, str]] = []

    # ── coming and going ────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, request: NewRequest) -> None:
        params = request.params
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        sequences = []
        for index in range(params.n):
            sequence = Sequence(
                uid=self._uids,
                request_id=request.request_id,
                index=index,
                params=params,
                tokens=list(request.prompt_token_ids),
                prompt_len=len(request.prompt_token_ids),
                limit=request.limit,
                arrival=self._arrivals,
                stops=params.all_stop_token_ids,
                priority=request.priority,
                seed=(seed + index) % _SEEDS,
                hash_seed=request.cache_salt,
            )
            self._uids += 1
            info = SequenceInfo(request.request_id, index, sequence.prompt_len, request.arrival, tokens=sequence.tokens)
            self.trace.introduce(sequence.uid, info)
            sequences.append(sequence)
        self._arrivals += 1
        self.requests[request.request_id] = sequences
        self.scheduler.add(sequences)

    def end(
        self, request_id: str, reason: FinishReason = "abort", index: int | None = None, stop_reason: str | None = None
    ) -> list[Update]:
        """End a request, or one of its outputs, between two steps. What had ended stays as it was."""
        updates = []
        for sequence in self.requests.get(request_id, []):
            if index is None or sequence.index == index:
                sequence.stop_reason = stop_reason if sequence.finish_reason is None else sequence.stop_reason
                update = self.scheduler.cancel(sequence, reason)
                if update is not None:
                    updates.append(update)
        self._note(updates)
        return updates

    def rejected(self) -> list[Update]:
        """Who was ended, since this was last called, because a user's policy failed to decide on them."""
        updates = self.scheduler.take_rejected()
        self._note(updates)
        return updates

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    # ── the step ────────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[Update]:
        """Plan, run, commit: what every request that took part is given."""
        began = perf_counter()
        batch = self.scheduler.plan()
        rejected = self.rejected()
        if batch is None:
            return rejected
        planned = perf_counter()
        plan = self.scheduler.in_flight[batch.step]
        self.entered = plan.entered
        launched = planned
        try:
            self.runner.launch(batch)
            launched = perf_counter()
            sampled = self.runner.sample()
        except Exception as error:  # noqa: BLE001 - whatever it was, it ends this batch and not the engine
            ran = perf_counter()
            updates = self.scheduler.abandon(batch, f"{type(error).__name__}: {error}")
        else:
            ran = perf_counter()
            updates = self.scheduler.commit(batch, sampled)
        self._note(updates)
        self._record(batch.step, began, plan, (planned - began, launched - planned, ran - launched, perf_counter() - ran))
        return rejected + updates

    def suspend(self) -> None:
        """Let nobody hold a block: whoever runs waits again and is computed anew, and the prefix cache is empty."""
        self.scheduler.suspend()
        self.flush()

    def flush(self) -> None:
        """Record what changed between two steps (a cancellation, an emptied cache), so that the trace ends as the pool is."""
        if self.scheduler.pool.events or self._finished:
            self._record(self.scheduler.steps - 1, perf_counter(), Plan(), (0.0, 0.0, 0.0, 0.0))

    def _note(self, updates: list[Update]) -> None:
        """Forget what has ended."""
        for update in updates:
            sequence = update.sequence
            if sequence.finish_reason is None:
                continue
            self._finished.append((sequence.uid, sequence.finish_reason))
            info = self.trace.sequences.get(sequence.uid)
            if info is not None:
                info.last_step = self.scheduler.steps
            if all(s.finish_reason is not None for s in self.requests.get(sequence.request_id, [])):
                self.requests.pop(sequence.request_id, None)

    def _record(self, step: int, began: float, plan: Plan, seconds: tuple[float, float, float, float]) -> None:
        scheduler, pool = self.scheduler, self.scheduler.pool
        finished, self._finished = self._finished, []
        preempted, scheduler.preempted = scheduler.preempted, []
        if self.trace.capacity == 0:
            pool.take_events()
            return
        record = StepRecord(
            step=step,
            time=began,
            uids=[s.uid for s in plan.sequences],
            starts=array("i", plan.starts),
            counts=plan.counts,
            sampled=[s.uid for s in plan.samples],
            admitted=[s.uid for s in plan.entered],
            preempted=preempted,
            finished=finished,
            events=pool.take_events(),
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            blocks_used=pool.num_used,
            blocks_cached=len(pool.cached),
            plan_s=seconds[0],
            launch_s=seconds[1],
            sample_s=seconds[2],
            commit_s=seconds[3],
        )
        self.trace.add(record, pool, scheduler.running)

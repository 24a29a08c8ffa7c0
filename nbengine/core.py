"""The engine without its thread: requests in, steps one at a time, updates out. Deterministic; used by one thread at a time."""

from __future__ import annotations

import logging
import random
from array import array
from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from nbengine.errors import DeviceLostError, DeviceMemoryError
from nbengine.plan import Plan, Update
from nbengine.scheduler import Scheduler
from nbengine.sequence import Sequence
from nbengine.trace import SequenceInfo, StepRecord, Trace

if TYPE_CHECKING:
    from nbengine.batch import Batch, Sampled
    from nbengine.sampling_params import SamplingParams
    from nbengine.sequence import FinishReason

_SEEDS = 1 << 64
MOST_AHEAD = 32  # steps
LEAST_TOKENS = 16  # a step of so few that finds no memory is not tried smaller
STEPS_TO_GROW = 100
log = logging.getLogger("nbengine")


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

    overlaps: bool  # whether a batch may be launched while others are in flight

    @property
    def ready(self) -> bool:
        """Whether `sample` would not wait."""

    def launch(self, batch: Batch) -> None:
        """Start computing a batch. A runner that overlaps starts drawing its tokens too: the next batch may build on them."""

    def wait(self, place: int) -> None:
        """Wait for a batch in flight, the oldest being at place 0."""

    def sample(self, mask: Any = None) -> Sampled:
        """The tokens of the batch launched first that has not been sampled; waits for them."""

    def use(self, ops: dict[str, Any]) -> None:
        """Exchange implementations of ops."""

    def warm_up(self) -> None:
        """Do once what would make a first step slow."""

    def free(self) -> None:
        """Give back what can be made again."""

    def resize(self, num_blocks: int) -> None:
        """Another KV cache in place of this one, or this one still and an error."""

    def sleep(self, level: int) -> None:
        """Give memory back: the cache (level 1), the weights too (level 2)."""

    def wake_up(self) -> None:
        """Take it again."""

    def update_weights(self, weights: Any) -> None:
        """Put new values into weights by their names in the checkpoint."""

    def close(self) -> None:
        """Release everything."""


@dataclass(slots=True)
class _Flight:
    """A launched step, until it lands."""

    batch: Batch
    plan: Plan
    began: float
    plan_s: float
    launch_s: float


class EngineCore:
    """Scheduler, runner and trace, and the one step that ties them.

    Where the runner overlaps, a step is planned and launched while the one before it is computed. Where besides nobody waits and
    nobody can end but by length, more are launched ahead, as many as take `run_ahead_s` seconds together.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        seed: int = 0,
        trace_steps: int = 4096,
        max_model_len: int = 0,
        overlap: bool = True,
        run_ahead_s: float = 0.02,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.max_model_len = max_model_len
        self.trace = Trace(scheduler.pool, trace_steps)
        self.requests: dict[str, list[Sequence]] = {}
        self._seeds = random.Random(seed)  # noqa: S311 - for sampling, not for secrets
        self.entered: list[Sequence] = []  # who was given a row by the last step
        self.overlap = overlap and runner.overlaps
        self.run_ahead_s = run_ahead_s
        self._flights: deque[_Flight] = deque()
        self._device_s = 0.0  # that the last step took
        self._stoppable = 0  # sequences that a token of theirs may end
        self._tied = 0  # sequences whose next token hangs on what the host knows of the last
        self._wanted_tokens = 0  # of a step, while steps are smaller because one found no memory
        self._freed = False  # all that can be given back was, for a small step, and none has landed since
        self._steps_since = 0
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
        self._count(sequences[0], params.n)
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

    @property
    def in_flight(self) -> int:
        """Steps that are launched and have not landed."""
        return len(self._flights)

    @property
    def depth(self) -> int:
        """Steps that may be in flight while nobody waits for one of them."""
        if not self.overlap or self._tied:
            return 0
        if self._stoppable or self.scheduler.waiting or not self._device_s:
            return 1
        return max(1, min(int(self.run_ahead_s / self._device_s), MOST_AHEAD))

    def step(self) -> list[Update]:
        """Launch a step, and land the one that is due: what every request that took part in that is given."""
        updates: list[Update] = []
        while self._flights and self.runner.ready:
            updates += self._land()
        launched = self._take_off(updates) if len(self._flights) <= self.depth else False
        if self._flights and (not launched or len(self._flights) > self.depth):
            if self.overlap:  # what lies before it lands with it: one wait for several
                self.runner.wait((len(self._flights) - 1) // 2 if launched else 0)
            updates += self._land()
        return updates

    def drain(self) -> list[Update]:
        """Land every step in flight."""
        updates = []
        while self._flights:
            updates += self._land()
        return updates

    def _take_off(self, updates: list[Update]) -> bool:
        """Plan a step and launch it; False if none could be. Who is ended on the way joins the updates."""
        began = perf_counter()
        batch = self.scheduler.plan()
        updates += self.rejected()
        self.entered = []
        if batch is None:
            return False
        planned = perf_counter()
        plan = self.scheduler.in_flight[batch.step]
        self.entered = plan.entered
        try:
            self.runner.launch(batch)
        except DeviceLostError:
            raise
        except DeviceMemoryError as error:
            updates += self.drain()
            updates += self._retreat(_Flight(batch, plan, began, planned - began, perf_counter() - planned), error)
            return True
        except Exception as error:  # noqa: BLE001 - whatever else it was, it ends this batch and not the engine
            updates += self._abandon(_Flight(batch, plan, began, planned - began, perf_counter() - planned), error)
            return True
        self._flights.append(_Flight(batch, plan, began, planned - began, perf_counter() - planned))
        return True

    def _land(self) -> list[Update]:
        """Wait for the oldest step in flight, and commit what it brought."""
        flight = self._flights.popleft()
        waits = perf_counter()
        try:
            sampled = self.runner.sample()
        except DeviceLostError:
            raise
        except DeviceMemoryError as error:
            waited = perf_counter() - waits
            return self._abandon(flight, error, waited) if self._flights else self._retreat(flight, error)
        except Exception as error:  # noqa: BLE001 - as above
            return self._abandon(flight, error, perf_counter() - waits)
        came = perf_counter()
        self._freed = False
        self._device_s = sampled.device_s
        self._grow_again()
        updates = self.scheduler.commit(flight.batch, sampled)
        self._note(updates)
        self._record(flight, came - waits, perf_counter() - came, sampled.device_s)
        return updates

    def _retreat(self, flight: _Flight, error: Exception) -> list[Update]:
        """A step found no memory: whoever was in it is computed again later, in smaller steps; one that is as small as can be is
        tried once more with all memory that can be given back, and then they end.
        """
        tokens = flight.batch.num_tokens
        if tokens > LEAST_TOKENS:
            self._wanted_tokens = max(self._wanted_tokens, self.scheduler.max_num_batched_tokens)
            self.scheduler.max_num_batched_tokens = max(tokens // 2, LEAST_TOKENS)
            self._steps_since = 0
            log.warning(
                "a step of %d tokens found no memory on the device; steps are at most %d for a while",
                tokens,
                max(tokens // 2, LEAST_TOKENS),
            )
        elif self._freed:
            return self._abandon(flight, error)
        else:
            self._freed = True
            log.warning("a step of %d tokens found no memory on the device; it is tried once more", tokens)
        self.runner.free()
        self.scheduler.postpone(flight.batch)
        self._record(flight, 0.0, 0.0, 0.0)
        return []

    def _grow_again(self) -> None:
        """After many steps that fitted, try larger ones, up to what was asked for."""
        if self._wanted_tokens:
            self._steps_since += 1
            if self._steps_since >= STEPS_TO_GROW:
                self._steps_since = 0
                self.scheduler.max_num_batched_tokens = min(2 * self.scheduler.max_num_batched_tokens, self._wanted_tokens)
                if self.scheduler.max_num_batched_tokens == self._wanted_tokens:
                    self._wanted_tokens = 0

    def _abandon(self, flight: _Flight, error: Exception, waited: float = 0.0) -> list[Update]:
        updates = self.scheduler.abandon(flight.batch, f"{type(error).__name__}: {error}")
        self._note(updates)
        self._record(flight, waited, 0.0, 0.0)
        return updates

    def suspend(self) -> None:
        """Let nobody hold a block: whoever runs waits again and is computed anew, and the prefix cache is empty."""
        self.scheduler.suspend()
        self.flush()

    def limit(self, max_num_batched_tokens: int | None, max_num_seqs: int | None) -> None:
        """Change how much a step takes."""
        self.scheduler.limit(max_num_batched_tokens, max_num_seqs)
        self._wanted_tokens = 0

    def resize(self, num_blocks: int) -> None:
        """Another KV cache; whoever runs waits and is computed anew. MemoryError where it does not fit: then all is as before."""
        needed = self.scheduler.pool.blocks_for(self.max_model_len)
        if num_blocks < needed:
            raise ValueError(
                f"max_model_len={self.max_model_len} takes {needed} blocks: num_blocks must be at least that, not {num_blocks}"
            )
        self.suspend()
        self.runner.resize(num_blocks)
        self.scheduler.pool.resize(num_blocks)
        self.trace.num_blocks = num_blocks
        self.flush()

    def flush(self) -> None:
        """Record what changed between two steps (a cancellation, an emptied cache), so that the trace ends as the pool is."""
        if not self._flights and (self.scheduler.pool.events or self._finished):  # else the next step to land tells of it
            self._record(None, 0.0, 0.0, 0.0)

    def _note(self, updates: list[Update]) -> None:
        """Forget what has ended."""
        for update in updates:
            sequence = update.sequence
            if sequence.finish_reason is None:
                continue
            self._finished.append((sequence.uid, sequence.finish_reason))
            self._count(sequence, -1)
            info = self.trace.sequences.get(sequence.uid)
            if info is not None:
                info.last_step = self.scheduler.steps
            if all(s.finish_reason is not None for s in self.requests.get(sequence.request_id, [])):
                self.requests.pop(sequence.request_id, None)

    def _count(self, sequence: Sequence, times: int) -> None:
        """Keep count of what the depth hangs on, as sequences come and go."""
        params = sequence.params
        self._stoppable += times * bool(sequence.stops or params.stop)
        self._tied += times * params.needs_history

    def _record(self, flight: _Flight | None, waited: float, committed: float, device_s: float) -> None:
        """Tell the trace of a step that landed, or (None) of what changed between steps."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        finished, self._finished = self._finished, []
        preempted, scheduler.preempted = scheduler.preempted, []
        if self.trace.capacity == 0:
            pool.take_events()
            return
        plan = Plan() if flight is None else flight.plan
        record = StepRecord(
            step=scheduler.steps - 1 if flight is None else flight.batch.step,
            time=perf_counter() if flight is None else flight.began,
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
            plan_s=0.0 if flight is None else flight.plan_s,
            launch_s=0.0 if flight is None else flight.launch_s,
            sample_s=waited,
            commit_s=committed,
            gpu_s=device_s,
            landed=0.0 if flight is None else perf_counter(),
        )
        self.trace.add(record, pool, scheduler.running)

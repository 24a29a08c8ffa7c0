"""What the engine did: a ring of step records and block events, from which any moment still in it can be drawn again."""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbengine.pool_state import PoolState

if TYPE_CHECKING:
    from nbengine.blocks import BlockPool
    from nbengine.sequence import Sequence


@dataclass(slots=True)
class StepRecord:
    """One step, or (with no sequences) what a cancellation or another control changed between two steps.

    `events` are the changes of the block pool in order, those since the step before included:
    ("take", block, uid)           a blank block became this sequence's own, the next in its table
    ("evict", block)               its cached content was dropped; a "take" of it follows
    ("share", block, uid)          one more holder, the next in that sequence's table
    ("copy", source, target, uid)  the target, just taken, stands in the source's place in the table
    ("seal", block, digest)        full and final: can be found by its content
    ("free", block, uid)           one holder less
    ("forget",)                    the prefix cache was emptied
    ("resize", blocks)             there are so many blocks now, all of them blank
    """

    step: int
    time: float  # seconds on the engine's clock (time.perf_counter) when the step began
    uids: list[int] = field(default_factory=list)  # who ran, in batch order
    starts: array[int] = field(default_factory=lambda: array("i"))  # packed: thousands of records of hundreds of numbers are kept
    counts: list[int] = field(default_factory=list)  # tokens computed for each
    sampled: list[int] = field(default_factory=list)  # uids that were given a token
    admitted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    finished: list[tuple[int, str]] = field(default_factory=list)  # uid, reason
    events: list[tuple[Any, ...]] = field(default_factory=list)
    num_waiting: int = 0
    num_running: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    plan_s: float = 0.0  # how long each part took, in seconds
    launch_s: float = 0.0
    sample_s: float = 0.0
    commit_s: float = 0.0
    gpu_s: float = 0.0  # how long a GPU worked on it, whatever the host did meanwhile; 0 on a CPU
    landed: float = 0.0  # when its tokens were committed; steps overlap, so this is more than the sum of the host's parts

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def duration(self) -> float:
        """Seconds from when it began to be planned until its tokens were committed."""
        return self.landed - self.time if self.landed else self.plan_s + self.launch_s + self.sample_s + self.commit_s

    def __repr__(self) -> str:
        decodes = sum(1 for c in self.counts if c == 1)
        return (
            f"<step {self.step}: {len(self.uids)} sequences, {self.num_tokens - decodes} prefill + {decodes} decode tokens, "
            f"{self.num_waiting} waiting, {self.blocks_used} blocks, {1e3 * self.duration:.2f} ms>"
        )


@dataclass(slots=True)
class SequenceInfo:
    """Who a uid is, for as long as the ring speaks of it."""

    request_id: str
    index: int
    prompt_len: int
    arrival: float
    last_step: int = sys.maxsize  # set when it ends
    tokens: Ids[int] = ()  # its token ids: the very list that its engine goes on appending to


@dataclass(slots=True)
class _Segment:
    """A keyframe and the records after it."""

    start: PoolState
    first: int = 0  # the number of its first record
    records: list[StepRecord] = field(default_factory=list)
    num_events: int = 0

    @property
    def end(self) -> int:
        return self.first + len(self.records)


class Trace:
    """The last `capacity` records. Written by the engine thread; reading takes a snapshot and may be done from any thread.

    Records are numbered in the order in which they came, from 0; those of [first, end) are still here. A new keyframe is taken
    after as many events as there are blocks, so its cost is a constant a block event.
    """

    def __init__(self, pool: BlockPool, capacity: int) -> None:
        self.num_blocks = pool.num_blocks
        self.block_size = pool.block_size
        self.capacity = capacity
        self.sequences: dict[int, SequenceInfo] = {}
        self.name = ""  # of what was traced, for those who look
        self.token_text: Callable[[int], str] | None = None  # a token as text, where there is a tokenizer
        self.playhead: Any = None  # the moment that its views show together, made by the first of them
        self._segments: deque[_Segment] = deque([_Segment(PoolState.of(pool, {}))])

    def __len__(self) -> int:
        return sum(len(segment.records) for segment in list(self._segments))

    def __iter__(self) -> Iterator[StepRecord]:
        for segment in list(self._segments):
            yield from segment.records.copy()

    @property
    def records(self) -> list[StepRecord]:
        """All records still in the ring, oldest first."""
        return list(self)

    @property
    def last(self) -> StepRecord | None:
        for segment in reversed(list(self._segments)):
            if segment.records:
                return segment.records[-1]
        return None

    @property
    def first(self) -> int:
        """The number of the oldest record that is still here."""
        return self._segments[0].first

    @property
    def end(self) -> int:
        """How many records have come so far: one more than the number of the last."""
        return self._segments[-1].end

    def since(self, number: int) -> list[StepRecord]:
        """The records from this number on, as far as they are still here."""
        records: list[StepRecord] = []
        for segment in reversed(list(self._segments)):
            if segment.end <= number:
                break
            records[:0] = segment.records[max(0, number - segment.first) :]
        return records

    def record(self, number: int) -> StepRecord:
        """The record of this number."""
        segment, i = self._find(number)
        return segment.records[i]

    def state(self, number: int) -> PoolState:
        """The pool right after the record of this number."""
        segment, i = self._find(number)
        state = segment.start.copy()
        for record in segment.records[: i + 1]:
            state.apply(record.events)
        return state

    def keyframe(self, number: int) -> int:
        """The number of the first record of those that `state` goes through to come to this one."""
        segment, _ = self._find(number)
        return segment.first

    def start(self) -> PoolState:
        """The pool before the oldest record."""
        return self._segments[0].start.copy()

    def introduce(self, uid: int, info: SequenceInfo) -> None:
        """Say who a uid is; forgotten once it has ended and no record in the ring speaks of it."""
        if self.capacity:
            self.sequences[uid] = info

    def add(self, record: StepRecord, pool: BlockPool, running: Mapping[int, Sequence]) -> None:
        """Append a record; `pool` and `running` are the state after it, copied only when a keyframe is due."""
        if self.capacity == 0:
            return
        if self._append(record):
            self._segments.append(_Segment(PoolState.of(pool, running), self.end))
            while len(self) - len(self._segments[0].records) >= self.capacity:
                self._drop()

    def _append(self, record: StepRecord) -> bool:
        """Append a record; whether a keyframe is due after it."""
        segment = self._segments[-1]
        segment.records.append(record)
        segment.num_events += len(record.events)
        return segment.num_events >= max(1024, self.num_blocks) or len(segment.records) >= max(1, self.capacity // 8)

    def snapshot(self) -> tuple[PoolState, int, list[StepRecord]]:
        """The pool before the oldest record, the number of that, and all records: what belongs together, while the ring goes on."""
        segments = list(self._segments)
        return segments[0].start.copy(), segments[0].first, [record for segment in segments for record in segment.records.copy()]

    def restore(self, start: PoolState, first: int, records: Iterable[StepRecord]) -> None:
        """Hold what a snapshot had in place of what it holds."""
        self._segments = deque([_Segment(start.copy(), first)])
        state = start.copy()
        for record in records:
            state.apply(record.events)
            if self._append(record):
                self._segments.append(_Segment(state.copy(), self.end))

    def save(self, path: str | Path) -> Path:
        """Write it to a file, tokens included; `Trace.load(path)` reads it, without an engine or a GPU."""
        from nbengine.trace_file import save_trace

        return save_trace(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """A trace that was saved: views draw it as they draw a live one."""
        from nbengine.trace_file import load_trace

        return load_trace(path)

    def at(self, record: StepRecord | int) -> PoolState:
        """The pool as it was right after a record (or after the last record of that step)."""
        for segment in reversed(list(self._segments)):
            records = segment.records.copy()
            for i in range(len(records) - 1, -1, -1):
                if records[i] is record or records[i].step == record:
                    return self.state(segment.first + i)
        raise LookupError(f"{record!r} is not in the trace any more; it keeps the last {self.capacity} steps (trace_steps=)")

    def figure(self, kind: Any = "overview", **options: Any) -> Any:
        """A plotly figure for a paper, or to look at afterwards.

        `kind` is one of overview, occupancy, batch, queue, throughput, latency, first_token, token_gap, prefix_hits, step_time,
        timeline and blocks, or a function of a trace that returns a dict from labels to values, one for each record.
        `at` is the step (or its record) whose blocks are shown, `points` how finely lines are drawn; `template`, `width` and
        `height` are plotly's.

        >>> engine.trace.figure("occupancy", width=640).write_html("kv.html")                   # doctest: +SKIP
        """
        from nbengine.trace_figures import figure

        return figure(self, kind, **options)

    def __repr__(self) -> str:
        records = self.records
        span = f"steps {records[0].step} to {records[-1].step}" if records else "empty"
        return f"<Trace {span}, {self.num_blocks} blocks of {self.block_size}>"

    def _find(self, number: int) -> tuple[_Segment, int]:
        """Where a record is."""
        for segment in reversed(list(self._segments)):
            if segment.first <= number < segment.end:
                return segment, number - segment.first
        raise LookupError(f"record {number} is not in the trace: it has {self.first} to {self.end - 1} (trace_steps= keeps more)")

    def _drop(self) -> None:
        self._segments.popleft()
        oldest = next((r.step for segment in self._segments for r in segment.records), 0)
        for uid in [uid for uid, info in self.sequences.items() if info.last_step < oldest]:
            del self.sequences[uid]

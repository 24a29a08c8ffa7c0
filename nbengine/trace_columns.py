"""What the charts need of a trace: a few numbers a record, worked out once as records come, in columns."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbengine.trace import StepRecord, Trace

IDLE = 0.05  # seconds without a step that are drawn as a pause
NAMES = (
    "time",  # seconds on the engine's clock; a row speaks of the time up to the next row's
    "end",
    "steps",  # 1 for a step; 0 for what changed between two steps, and for a pause
    "blocks",  # that there are, held and free
    "used",  # blocks, after it
    "cached",
    "waiting",  # sequences, after it
    "running",
    "prefill",  # tokens computed
    "decode",
    "sampled",  # tokens drawn
    "preempted",  # sequences
    "asked",  # prompt tokens looked up in the prefix cache
    "found",  # and found there
    "plan",  # seconds
    "launch",
    "gpu",
    "commit",
    "gaps",  # tokens that came after an earlier one of their sequence
    "waited",  # and the seconds between the two, of all of them
)
PLACE = {name: i for i, name in enumerate(NAMES)}


class Columns:
    """A row for each record of a trace, and one for each pause between two; read by one thread at a time.

    `read` takes in what is new. It holds no record but the last, and of the trace nothing.
    """

    def __init__(self, num_blocks: int, capacity: int) -> None:
        self.num_blocks = num_blocks
        self.capacity = max(1, capacity)
        self.first_tokens: deque[tuple[float, float, int]] = deque(maxlen=self.capacity)  # when, how long after its arrival, whose
        self.origin: float | None = None  # of the time axis
        self._rows = np.zeros((2 * self.capacity, len(NAMES)))
        self._begin = self._end = 0
        self._last: StepRecord | None = None
        self._next = 0  # the number of the record to read next
        self._latest: dict[int, float] = {}  # when a sequence that runs was given its last token
        self._together: tuple[list[int], float] = [], 0.0  # the same of those in the last record
        self._evicted: set[int] = set()  # preempted, and not yet running again

    @classmethod
    def of(cls, trace: Trace) -> Columns:
        """All that is in a trace."""
        columns = cls(trace.num_blocks, 2 * max(len(trace), 1))
        columns.read(trace)
        return columns

    def __len__(self) -> int:
        return self._end - self._begin

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """A column, oldest first: a view, good until the next `read`."""
        return self._rows[self._begin : self._end, PLACE[name]]

    @property
    def last(self) -> StepRecord | None:
        """The newest record read."""
        return self._last

    def read(self, trace: Trace) -> int:
        """Take in the records that came since the last time; how many there were."""
        new = self._new(trace)
        if new and self.origin is None:
            self.origin = _origin(trace, new[0])
            self.num_blocks = len(trace.start().references)
        for record in new:
            self._take(trace, record)
        return len(new)

    def _new(self, trace: Trace) -> list[StepRecord]:
        while True:
            end, records = trace.end, trace.since(self._next)
            if trace.end == end:  # none came in between
                self._next = end
                return records

    def _take(self, trace: Trace, record: StepRecord) -> None:
        before = self._last
        end = record.time + record.duration
        if len(self) and record.time - self["end"][-1] > IDLE:
            last = self._rows[self._end - 1]
            pause = dict.fromkeys(NAMES, 0.0) | {name: last[PLACE[name]] for name in ("blocks", "used", "cached", "waiting", "running")}
            self._append(pause | {"time": last[PLACE["end"]], "end": record.time})
        for kind, *about in record.events:
            if kind == "resize":
                (self.num_blocks,) = about
        decode = _decodes(trace, record, before)
        self._evicted.update(record.preempted)  # before the admissions: it may be among them
        asked, found = self._looked_up(trace, record) if record.admitted else (0, 0)
        gaps, waited = self._gaps(trace, record, before, end)
        self._append(
            {
                "time": record.time,
                "end": end,
                "steps": float(bool(record.uids)),
                "blocks": self.num_blocks,
                "used": record.blocks_used,
                "cached": record.blocks_cached,
                "waiting": record.num_waiting,
                "running": record.num_running,
                "prefill": record.num_tokens - decode,
                "decode": decode,
                "sampled": len(record.sampled),
                "preempted": len(record.preempted),
                "asked": asked,
                "found": found,
                "plan": record.plan_s,
                "launch": record.launch_s,
                "gpu": record.gpu_s or record.sample_s,
                "commit": record.commit_s,
                "gaps": gaps,
                "waited": waited,
            }
        )
        if record.finished:
            self._remember()
        for uid, _ in record.finished:
            self._latest.pop(uid, None)
            self._evicted.discard(uid)
        self._last = record

    def _looked_up(self, trace: Trace, record: StepRecord) -> tuple[int, int]:
        """How many prompt tokens of those admitted for the first time were looked up in the prefix cache, and how many were there."""
        asked = found = 0
        rows = {uid: i for i, uid in enumerate(record.uids)}
        for uid in record.admitted:
            row, info = rows.get(uid), trace.sequences.get(uid)
            if uid in self._evicted:
                self._evicted.discard(uid)
            elif row is not None and info is not None:  # who has no row forks from a prompt that is in already
                asked += info.prompt_len
                found += record.starts[row]
        return asked, found

    def _gaps(self, trace: Trace, record: StepRecord, before: StepRecord | None, end: float) -> tuple[int, float]:
        """How many tokens followed another one of their sequence, and the seconds between, summed."""
        sampled = record.sampled
        if before is not None and sampled == before.sampled and not before.finished:
            waited = len(sampled) * (end - self._together[1])
            self._together = sampled, end
            return len(sampled), waited
        self._remember()
        gaps, waited = 0, 0.0
        for uid in sampled:
            if uid in self._latest:
                gaps += 1
                waited += end - self._latest[uid]
            elif (arrival := _arrival_of_first(trace, record, uid)) is not None:
                self.first_tokens.append((end, end - arrival, uid))
        self._together = sampled, end
        return gaps, waited

    def _remember(self) -> None:
        """Note when each of those that were last given a token was: put off, since most often the same ones are given the next."""
        sampled, end = self._together
        self._latest.update(dict.fromkeys(sampled, end))
        self._together = [], 0.0

    def _append(self, row: dict[str, Any]) -> None:
        if self._end == len(self._rows):
            kept = self._rows[self._end - self.capacity :].copy()
            self._rows[: len(kept)] = kept
            self._end = len(kept)
        self._rows[self._end] = [row[name] for name in NAMES]
        self._end += 1
        self._begin = max(0, self._end - self.capacity)


def _origin(trace: Trace, first: StepRecord) -> float:
    """The first arrival where the trace begins with the first step, else the oldest record's time."""
    arrivals = [info.arrival for info in list(trace.sequences.values()) if info.arrival] if first.step == 0 else []
    return min([first.time, *arrivals])


def _decodes(trace: Trace, record: StepRecord, before: StepRecord | None) -> int:
    """How many rows go on from a token of their own, in place of computing a prompt or what a preemption lost."""
    counts = record.counts
    if before is not None and len(counts) == record.num_tokens and record.uids == record.sampled == before.sampled:
        return len(counts)  # all of them decoded the step before, too
    infos = trace.sequences
    return sum(
        1
        for uid, start, count in zip(record.uids, record.starts, counts, strict=True)
        if count == 1 and (uid not in infos or start >= infos[uid].prompt_len)
    )


def _arrival_of_first(trace: Trace, record: StepRecord, uid: int) -> float | None:
    """When the sequence arrived, if the token that it was given is its first: its own row ends with the prompt, and who forks has none."""
    info = trace.sequences.get(uid)
    if info is None:
        return None
    if uid in record.uids:
        row = record.uids.index(uid)
        if record.starts[row] + record.counts[row] != info.prompt_len:
            return None
    return info.arrival

"""What the charts need of a trace: a few numbers a record, worked out once as records come, in columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nbengine.trace_rows import KnownRows, decodes

if TYPE_CHECKING:
    from collections.abc import Sequence

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
LASTING = {"blocks", "used", "cached", "waiting", "running"}  # what stays as it is in a pause
PLACE = {name: i for i, name in enumerate(NAMES)}
END = PLACE["end"]


class Columns:
    """A row for each record of a trace, and one for each pause between two; read by one thread at a time.

    `read` takes in what is new. It holds no record but the last, and of the trace nothing.
    """

    def __init__(self, num_blocks: int, capacity: int, rows: KnownRows | None = None, *, sequences: int = 0) -> None:
        self.num_blocks = num_blocks
        self.capacity = max(1, capacity)
        self.origin: float | None = None  # of the time axis
        self._table = _Table(len(NAMES), self.capacity)
        self._firsts = _Table(3, max(self.capacity, sequences))  # a step may bring the first tokens of many
        self._last: StepRecord | None = None
        self._next = 0  # the number of the record to read next
        self._rows = rows
        self._row: list[float] = []  # of the last record
        self._latest: dict[int, float] = {}  # when a sequence that runs was given its last token
        self._together: list[int] = []  # of whom that is not said, since all were given it in the last step
        self._together_at = 0.0
        self._usual = False  # whether in that step all were given a token, but for those in the midst of their prompt
        self._evicted: set[int] = set()  # preempted, and not yet running again

    @classmethod
    def of(cls, trace: Trace) -> Columns:
        """All that is in a trace."""
        columns = cls(trace.num_blocks, 2 * max(len(trace), 1), sequences=len(trace.sequences))
        columns.read(trace)
        return columns

    def __len__(self) -> int:
        return self._table.values.shape[1]

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """A column, oldest first: a view, good until the next `read`."""
        return self._table.values[PLACE[name]]

    @property
    def first_tokens(self) -> NDArray[np.float64]:
        """[3, requests]: when each was given its first token, how long after its arrival, and its uid; good until the next `read`."""
        return self._firsts.values

    @property
    def last(self) -> StepRecord | None:
        """The newest record read."""
        return self._last

    def read(self, trace: Trace) -> int:
        """Take in the records that came since the last time; how many there were."""
        new = self._new(trace)
        if new and self._last is None:
            self.num_blocks = len(trace.start().references)
            if self.origin is None:
                self.origin = origin(trace, new[0])
        known = self._rows = self._rows or KnownRows(trace)
        rows: list[list[float]] = []
        for number, record in enumerate(new, self._next - len(new)):
            self._take(trace, record, known.at(number, record), rows)
        self._table.extend(rows)
        return len(new)

    def _new(self, trace: Trace) -> list[StepRecord]:
        while True:
            end, records = trace.end, trace.since(self._next)
            if trace.end == end:  # none came in between
                self._next = end
                return records

    def _take(self, trace: Trace, record: StepRecord, unsettled: Sequence[int] | None, rows: list[list[float]]) -> None:
        """Make a row of a record, and one of the pause before it; `unsettled` are the places in its batch that need a look."""
        end = record.time + record.duration
        if self._row and record.time - self._row[END] > IDLE:
            pause = [value if name in LASTING else 0.0 for name, value in zip(NAMES, self._row, strict=True)]
            pause[0], pause[END] = self._row[END], record.time
            rows.append(pause)
        if not record.uids:  # controls act between steps
            self.num_blocks = next((event[1] for event in reversed(record.events) if event[0] == "resize"), self.num_blocks)
        places = {record.uids[i]: i for i in (range(len(record.uids)) if unsettled is None else unsettled)}
        tokens, prefill = record.num_tokens, sum([record.counts[i] for i in places.values() if not decodes(trace, record, i)])
        self._evicted.update(record.preempted)  # before the admissions: it may be among them
        asked, found = self._looked_up(trace, record, places) if record.admitted else (0, 0)
        gaps, waited = self._gaps(trace, record, places, end, of_all=unsettled is None)
        self._row = [
            record.time,
            end,
            float(bool(record.uids)),
            self.num_blocks,
            record.blocks_used,
            record.blocks_cached,
            record.num_waiting,
            record.num_running,
            prefill,
            tokens - prefill,
            len(record.sampled),
            len(record.preempted),
            asked,
            found,
            record.plan_s,
            record.launch_s,
            record.gpu_s or record.sample_s,
            record.commit_s,
            gaps,
            waited,
        ]
        rows.append(self._row)
        for uid, _ in record.finished:
            self._leave(uid)
            self._latest.pop(uid, None)
            self._evicted.discard(uid)
        self._last = record

    def _looked_up(self, trace: Trace, record: StepRecord, places: dict[int, int]) -> tuple[int, int]:
        """How many prompt tokens of those admitted for the first time were looked up in the prefix cache, and how many were there."""
        asked = found = 0
        for uid in record.admitted:
            row, info = places.get(uid), trace.sequences.get(uid)
            if uid in self._evicted:
                self._evicted.discard(uid)
            elif row is not None and info is not None:  # who has no row forks from a prompt that is in already
                asked += info.prompt_len
                found += record.starts[row]
        return asked, found

    def _gaps(self, trace: Trace, record: StepRecord, places: dict[int, int], end: float, *, of_all: bool) -> tuple[int, float]:
        """How many tokens followed another one of their sequence, and the seconds between, summed.

        `places` are those of all rows, or of the ones beside which everybody went on decoding.
        """
        for uid in record.preempted:
            if self._leave(uid):
                self._latest[uid] = self._together_at
        if not record.uids:
            return 0, 0.0
        unfinished = [uid for uid, i in places.items() if not _ends_prompt(trace, record, i)]
        was_usual, self._usual = self._usual, record.sampled == _without(record.uids, unfinished)
        if was_usual and self._usual and not of_all:
            apart = [uid for uid in places if uid not in unfinished]
        else:
            self._remember()
            apart = record.sampled
        gaps = len(record.sampled) - len(apart)
        waited = gaps * (end - self._together_at)
        together = set(self._together).intersection(apart) if apart else ()
        for uid in apart:
            before = self._together_at if uid in together else self._latest.get(uid)
            if before is not None:
                gaps += 1
                waited += end - before
            elif (arrival := _arrival_of_first(trace, record, uid, places)) is not None:
                self._firsts.extend([[end, end - arrival, uid]])
        self._together, self._together_at = record.sampled, end
        return gaps, waited

    def _remember(self) -> None:
        """Note when each of those that were last given a token was: put off, since most often the same ones are given the next."""
        self._latest.update(dict.fromkeys(self._together, self._together_at))
        self._together = []

    def _leave(self, uid: int) -> bool:
        """Have it no more among those who were given a token together; whether it was."""
        try:
            self._together = _without(self._together, [uid])
        except ValueError:
            return False
        return True


class _Table:
    """So many columns; of their rows the newest are kept."""

    def __init__(self, columns: int, capacity: int) -> None:
        self.capacity = capacity
        self._values = np.zeros((columns, 2 * capacity))
        self._end = 0  # in these, where the newest half of what there is room for is kept

    @property
    def values(self) -> NDArray[np.float64]:
        """[columns, rows], oldest first."""
        return self._values[:, max(0, self._end - self.capacity) : self._end]

    def extend(self, rows: list[list[float]]) -> None:
        rows = rows[-self.capacity :]
        if not rows:
            return
        if self._end + len(rows) > self._values.shape[1]:
            kept = self.values.copy()
            self._values[:, : kept.shape[1]] = kept
            self._end = kept.shape[1]
        self._values[:, self._end : self._end + len(rows)] = np.array(rows).T
        self._end += len(rows)


def origin(trace: Trace, first: StepRecord) -> float:
    """Where the time axis begins: the first arrival where the trace begins with the first step, else the oldest record's time."""
    arrivals = [info.arrival for info in list(trace.sequences.values()) if info.arrival] if first.step <= 0 else []
    return min([first.time, *arrivals])


def _ends_prompt(trace: Trace, record: StepRecord, row: int) -> bool:
    """Whether its prompt is computed after it."""
    info = trace.sequences.get(record.uids[row])
    return info is None or record.starts[row] + record.counts[row] >= info.prompt_len


def _arrival_of_first(trace: Trace, record: StepRecord, uid: int, places: dict[int, int]) -> float | None:
    """When the sequence arrived, if the token that it was given is its first: its own row ends with the prompt, and who forks has none."""
    info, row = trace.sequences.get(uid), places.get(uid)
    if info is None or (row is not None and record.starts[row] + record.counts[row] != info.prompt_len):
        return None
    return info.arrival


def _without(uids: list[int], some: list[int]) -> list[int]:
    if not some:
        return uids
    left = uids.copy()
    for uid in some:
        left.remove(uid)
    return left

"""What each sequence did, record by record, as runs: queued, prefill, decode, preempted, held. Follows a trace as it grows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nbengine.trace_rows import KnownRows
from nbengine.widgets.block_facts import sequence_name

if TYPE_CHECKING:
    from nbengine.trace import StepRecord, Trace

KINDS = ("queued", "prefill", "decode", "preempted", "held")  # in the order of their numbers
QUEUED, PREFILL, DECODE, PREEMPTED, HELD = range(len(KINDS))  # held: it has its blocks and sits a step out
OPEN = -1


@dataclass(slots=True)
class Lane:
    """One sequence. `runs` are [kind, first record, one past its last or OPEN, tokens]; a chunk of a prompt is a run of its own."""

    uid: int
    name: str = ""
    prompt_len: int = 0
    runs: list[list[int]] = field(default_factory=list)
    ended: int = OPEN  # in which record
    reason: str = ""

    def turn(self, kind: int, number: int) -> None:
        """Be this from a record on; the same as before goes on."""
        last = self.runs[-1] if self.runs else None
        if last is None or last[2] != OPEN or last[0] != kind:
            self.stop(number)
            self.runs.append([kind, number, OPEN, 0])

    def stop(self, number: int) -> None:
        """End the open run before this record."""
        if self.runs and self.runs[-1][2] == OPEN:
            self.runs[-1][2] = number
            if self.runs[-1][1] >= number:
                self.runs.pop()

    def between(self, first: int, end: int) -> list[list[int]]:
        """Its runs within [first, end), cut to it: [kind, first, end, tokens]; a decode step is a token."""
        found = []
        for kind, begin, stop, tokens in self.runs:
            low, high = max(begin, first), end if stop == OPEN else min(stop, end)
            if low < high:
                found.append([kind, low, high, high - low if kind == DECODE else tokens])
        return found


class Lanes:
    """Shared by the views of a trace; used under their playhead's lock. Of a step only what changes with it is gone through."""

    def __init__(self, trace: Trace, rows: KnownRows | None = None) -> None:
        self.trace = trace
        self.number = trace.first  # of the next record
        self.lanes: dict[int, Lane] = {}  # by uid, in the order in which they came
        self._newest = -1
        self._rows = rows or KnownRows(trace)
        self._ran: list[int] = []  # in the last step

    def follow(self) -> None:
        """Take in what the trace has now."""
        records = self.trace.since(self.number)
        end = self.trace.end
        self.number = max(self.number, end - len(records))
        self._meet()
        for record in records:
            self._take(record)
            self.number += 1
        if len(self.lanes) > 2 * len(self.trace.sequences) + 64:
            self.lanes = {uid: lane for uid, lane in self.lanes.items() if lane.ended == OPEN or lane.ended >= self.trace.first}

    def within(self, first: int, end: int) -> list[Lane]:
        """The lanes that have anything in these records."""
        return [lane for lane in self.lanes.values() if (lane.ended == OPEN or lane.ended >= first) and lane.runs and lane.runs[0][1] < end]

    def _meet(self) -> None:
        """Let those who have come since wait, from the record during which they came."""
        new = [uid for uid in list(self.trace.sequences) if uid > self._newest]
        if not new:
            return
        self._newest = max(new)
        records = self.trace.since(self.trace.first)
        first, times = self.trace.end - len(records), [record.time for record in records]
        for uid in new:
            info = self.trace.sequences.get(uid)
            if info is not None:
                self.lanes[uid] = lane = Lane(uid, sequence_name(self.trace, uid), info.prompt_len)
                lane.turn(QUEUED, first + bisect_right(times, info.arrival))

    def _take(self, record: StepRecord) -> None:
        uids, number = record.uids, self.number
        rows = self._rows.at(number, record)
        for uid in record.preempted:
            self._lane(uid).turn(PREEMPTED, number)
        self._run(record, range(len(uids)) if rows is None else rows)
        forked: set[int] = set()
        if rows is None:
            forked = set(record.admitted).difference(uids)  # from the leader of a request, with a first token from the same step
            for uid in forked:
                self._lane(uid).turn(DECODE, number)
            for uid in set(self._ran).difference(uids, forked, record.preempted):
                if self._lane(uid).ended == OPEN:
                    self._lane(uid).turn(HELD, number)
        if uids:
            self._ran = [*uids, *forked] if forked else uids
        for uid, reason in record.finished:
            lane = self._lane(uid)
            lane.stop(number + 1 if uid in uids or uid in forked else number)
            lane.ended, lane.reason = number, reason

    def _run(self, record: StepRecord, rows: Iterable[int]) -> None:
        """Have these rows of a batch in the lanes of their sequences."""
        number = self.number
        for i in rows:
            uid, start, count = record.uids[i], record.starts[i], record.counts[i]
            lane = self._lane(uid)
            if count > 1 or start + count < lane.prompt_len:
                lane.stop(number)
                lane.runs.append([PREFILL, number, number + 1, count])
            else:
                lane.turn(DECODE, number)

    def _lane(self, uid: int) -> Lane:
        if uid not in self.lanes:
            self.lanes[uid] = Lane(uid, sequence_name(self.trace, uid))
        return self.lanes[uid]

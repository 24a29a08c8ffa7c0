"""What each sequence did, record by record, as runs: queued, prefill, decode, preempted, held. Follows a trace as it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbengine.trace import StepRecord, Trace

KINDS = ("queued", "prefill", "decode", "preempted", "held")  # in the order of their numbers
QUEUED, PREFILL, DECODE, PREEMPTED, HELD = range(len(KINDS))  # held: it has its blocks and sits a step out
OPEN = -1


@dataclass(slots=True)
class Lane:
    """One sequence. `runs` are [kind, first record, one past its last or OPEN, tokens]; a chunk of a prompt is a run of its own."""

    uid: int
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
    """Shared by the views of a trace; used under their playhead's lock. Steps in which the same sequences decode again cost nothing."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.number = trace.first  # of the next record
        self.lanes: dict[int, Lane] = {}  # by uid, in the order in which they came
        self._newest = -1
        self._ran: list[int] = []  # in the last step
        self._all_decode = True  # whether nothing of a prompt was in it

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
        return [lane for lane in self.lanes.values() if lane.runs and lane.runs[0][1] < end and (lane.ended == OPEN or lane.ended >= first)]

    def _meet(self) -> None:
        """Let those who have come since wait, from the record during which they came."""
        for uid in [uid for uid in list(self.trace.sequences) if uid > self._newest]:
            self._newest = uid
            info = self.trace.sequences.get(uid)
            if info is not None:
                self.lanes[uid] = lane = Lane(uid)
                lane.turn(QUEUED, self._number_at(info.arrival))

    def _number_at(self, time: float) -> int:
        """The number of the record that was the next one at this time."""
        number, first = self.trace.end, self.trace.first
        while number > first and self.trace.record(number - 1).time > time:
            number -= 1
        return number

    def _take(self, record: StepRecord) -> None:
        uids, number = record.uids, self.number
        quiet = not (record.admitted or record.preempted or record.finished)
        if quiet and (not uids or (self._all_decode and uids == self._ran and record.num_tokens == len(uids))):
            return
        if uids:
            self._all_decode = True
        for uid in record.preempted:
            self._lane(uid).turn(PREEMPTED, number)
        for uid, start, count in zip(uids, record.starts, record.counts, strict=True):
            lane = self._lane(uid)
            if count > 1 or start + count < self._prompt(uid):
                lane.stop(number)
                lane.runs.append([PREFILL, number, number + 1, count])
                self._all_decode = False
            else:
                lane.turn(DECODE, number)
        now = set(uids)
        for uid in record.admitted:
            if uid not in now:  # it forked from the leader of its request, and had its first token from the same step
                self._lane(uid).turn(DECODE, number)
                now.add(uid)
        if uids:
            for uid in set(self._ran) - now - set(record.preempted):
                if self._lane(uid).ended == OPEN:
                    self._lane(uid).turn(HELD, number)
            self._ran = uids if len(now) == len(uids) else [*uids, *(now - set(uids))]
        for uid, reason in record.finished:
            lane = self._lane(uid)
            lane.stop(number + 1 if uid in now else number)
            lane.ended, lane.reason = number, reason

    def _prompt(self, uid: int) -> int:
        info = self.trace.sequences.get(uid)
        return 0 if info is None else info.prompt_len

    def _lane(self, uid: int) -> Lane:
        return self.lanes.setdefault(uid, Lane(uid))

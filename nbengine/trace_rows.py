"""Which rows of a batch need a look, step after step: all but those of sequences that go on decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbengine.trace import StepRecord, Trace

FEW = 32  # rows; to look up more one by one costs as much as to note the places of all


def decodes(trace: Trace, record: StepRecord, row: int) -> bool:
    """Whether a row goes on from a token of its own, in place of computing a prompt or what a preemption lost."""
    info = trace.sequences.get(record.uids[row])
    return record.counts[row] == 1 and (info is None or record.starts[row] >= info.prompt_len)


class Rows:
    """Follows the records of a trace, one after the other, at the cost of what changes from one to the next.

    A sequence is settled once it has decoded a token of its own: then each of its rows is one token further, until it is preempted.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._expected: list[int] = []  # who runs next, in batch order, if nobody comes
        self._unsettled: set[int] = set()  # of those

    def follow(self, record: StepRecord) -> Sequence[int] | None:
        """The places in its batch of the rows of sequences that were not settled before it.

        None: there may be others, or somebody has sat it out, who ran before and has not ended; all must be gone through.
        """
        places = self._places(record)
        if places is None:
            self._unsettled = {record.uids[i] for i in range(len(record.uids)) if not decodes(self._trace, record, i)}
        else:
            for i in places:
                if decodes(self._trace, record, i):
                    self._unsettled.discard(record.uids[i])
                else:
                    self._unsettled.add(record.uids[i])
        if record.uids:
            self._expected = record.uids
        if record.finished:
            self._expect_no_more([uid for uid, _ in record.finished])
        return places

    def _places(self, record: StepRecord) -> Sequence[int] | None:
        uids = record.uids
        if not uids:
            self._expect_no_more(record.preempted)
            return ()
        if record.preempted:
            self._expect_no_more(record.preempted)
        if uids != (self._expected + record.admitted if record.admitted else self._expected):
            return None
        places: list[int] = []
        if self._unsettled or record.admitted:
            if 2 * (len(self._unsettled) + len(record.admitted)) > max(FEW, len(uids)):
                return None
            few = len(self._unsettled) <= FEW
            place_of = uids.index if few else {uid: i for i, uid in enumerate(uids)}.__getitem__
            places = [*sorted(map(place_of, self._unsettled)), *range(len(uids) - len(record.admitted), len(uids))]
        others = record.num_tokens - sum([record.counts[i] for i in places])
        return places if others == len(uids) - len(places) else None

    def _expect_no_more(self, uids: list[int]) -> None:
        if uids:
            self._expected = self._expected.copy()
        for uid in uids:
            if uid in self._expected:
                self._expected.remove(uid)
            self._unsettled.discard(uid)


class KnownRows(Rows):
    """The same for several who follow a trace, each at its own pace: what was found of a record is kept as long as the ring keeps that."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._found: deque[Sequence[int] | None] = deque(maxlen=2 * trace.capacity + 1)
        self._end = trace.first  # one more than the number of the last record of them

    def at(self, number: int, record: StepRecord) -> Sequence[int] | None:
        """As `follow`, of the record of this number: the next one, or one that somebody else has asked about."""
        if number > self._end:  # the ring has dropped some that nobody asked about
            self._expected, self._unsettled = [], set()
            self._found.clear()
            self._end = number
        if number == self._end:
            self._found.append(self.follow(record))
            self._end += 1
        place = number - self._end
        return self._found[place] if -place <= len(self._found) else None

"""The pool's blocks at one moment and who holds them: moved on event by event, rebuilt from a keyframe to go back or far on."""

from __future__ import annotations

from array import array
from itertools import chain
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from nbengine.pool_state import PoolState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nbengine.trace import StepRecord, Trace

HELD, CACHED, SHARED, COPIED = 1, 2, 4, 8  # of a block: in a table; free but findable; in several; began as a copy
NOBODY = -1
FAR = 256  # records: from there on a keyframe in between is the shorter way
_NOT_CACHED = bytes(kind & ~CACHED for kind in range(256))


class FollowedPool:
    """The pool right after one record of a trace: `seek` moves it to another one.

    hashes, tables and copied are those of a PoolState. Beside them:
    kinds    [blocks] flags, as above
    owners   [blocks] uid of the first who holds it
    others   who else holds those that are shared
    computed tokens whose keys and values each sequence has in its blocks
    """

    number: int  # of the record after which the pool was so
    hashes: list[bytes | None]
    tables: dict[int, list[int]]
    copied: dict[int, int]
    kinds: bytearray
    owners: array[int]
    others: dict[int, list[int]]
    computed: dict[int, int]

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._rebuild(trace.first - 1)

    def seek(self, number: int) -> None:
        """Become what the pool was right after the record of this number."""
        if number == self.number:
            return
        records = self.trace.since(self.number + 1)
        behind = self.trace.end - len(records) - self.number - 1
        try:
            if number < self.number or behind > 0 or number - self.number > len(records) or self.trace.keyframe(number) - self.number > FAR:
                self._rebuild(number)
                return
        except LookupError:  # the ring has just dropped it
            self._rebuild(self.trace.first)
            return
        records = records[: number - self.number]
        for record in records:
            self._follow(record.events)
        self._compute(records)
        self.number = number

    def holders(self, block: int) -> list[int]:
        """The uids of those who hold it, in the order in which they came to it."""
        owner = self.owners[block]
        return [] if owner == NOBODY else [owner, *self.others.get(block, ())]

    @property
    def num_blocks(self) -> int:
        """How many there are at this moment: an engine can be given another cache while it runs."""
        return len(self.kinds)

    def _follow(self, events: Iterable[tuple[Any, ...]]) -> None:
        """As `PoolState.apply` does, but for the order in which blocks are free; in one go, as there are thousands of events a second."""
        hashes, tables, copied, kinds, owners, others = self.hashes, self.tables, self.copied, self.kinds, self.owners, self.others
        for event in events:
            kind = event[0]
            if kind == "take":
                _, block, uid = event
                owners[block] = uid
                kinds[block] = HELD
                if uid in tables:
                    tables[uid].append(block)
                else:
                    tables[uid] = [block]
            elif kind == "seal":
                hashes[event[1]] = event[2]
            elif kind == "free":
                _, block, uid = event
                table = tables[uid]
                last = table.pop()
                assert last == block
                if not table:
                    del tables[uid]
                if block in others:
                    self._leave(block, uid)
                    continue
                owners[block] = NOBODY
                kinds[block] = 0 if hashes[block] is None else CACHED
                if copied:
                    copied.pop(block, None)
            else:
                getattr(self, f"_{kind}")(*event[1:])
                hashes, tables, copied, kinds, owners, others = self.hashes, self.tables, self.copied, self.kinds, self.owners, self.others

    def _leave(self, block: int, uid: int) -> None:
        """One holder less of a shared block."""
        rest = self.others[block]
        if self.owners[block] == uid:
            self.owners[block] = rest.pop(0)
        else:
            rest.remove(uid)
        if not rest:
            del self.others[block]
            self.kinds[block] &= ~SHARED

    def _share(self, block: int, uid: int) -> None:
        self.tables.setdefault(uid, []).append(block)
        if self.owners[block] == NOBODY:
            self.owners[block] = uid
            self.kinds[block] = HELD
        else:
            self.others.setdefault(block, []).append(uid)
            self.kinds[block] |= SHARED

    def _copy(self, source: int, target: int, uid: int) -> None:
        table = self.tables[uid]
        table[table.index(source)] = target
        table[-1] = source  # the "free" that follows takes it away
        self.copied[target] = source
        self.kinds[target] |= COPIED

    def _evict(self, block: int) -> None:
        self.hashes[block] = None
        self.kinds[block] = 0

    def _forget(self) -> None:
        self.hashes = [None] * self.num_blocks
        self.kinds = self.kinds.translate(_NOT_CACHED)

    def _resize(self, num_blocks: int) -> None:
        self._become(PoolState(num_blocks))

    def _become(self, pool: PoolState) -> None:
        self.hashes, self.tables, self.copied = pool.hashes, pool.tables, pool.copied
        count = len(pool.references)
        flat = np.fromiter(chain.from_iterable(pool.tables.values()), np.int64)
        uids = np.repeat(np.fromiter(pool.tables, np.int64), [len(table) for table in pool.tables.values()])
        references = np.bincount(flat, minlength=count)
        kinds = np.where(references > 0, HELD, 0).astype(np.uint8)
        kinds[references > 1] |= SHARED
        kinds[list(pool.copied)] |= COPIED
        kinds[list(pool.cached)] = CACHED
        self.kinds = bytearray(kinds)
        owners = np.full(count, NOBODY, np.int64)
        owners[flat[::-1]] = uids[::-1]  # of several the first
        self.owners = array("q", owners.tobytes())
        self.others = {}
        shared = references[flat] > 1
        for block, uid in zip(flat[shared].tolist(), uids[shared].tolist(), strict=True):
            if uid != self.owners[block]:
                self.others.setdefault(block, []).append(uid)

    def _compute(self, records: Sequence[StepRecord]) -> None:
        """How far each who holds blocks is now, if these are the newest records; nothing is said of those that none of them speaks of."""
        wanted = set(self.tables)
        found: dict[int, int] = {}
        for record in reversed(records):
            if not wanted:
                break
            ran = wanted.intersection(record.uids)
            if len(ran) == len(record.uids):
                found.update(zip(record.uids, map(add, record.starts, record.counts), strict=True))
            elif ran:
                found.update(
                    (uid, start + count) for uid, start, count in zip(record.uids, record.starts, record.counts, strict=True) if uid in ran
                )
            wanted -= ran
            for uid in wanted.intersection(record.admitted):  # it forked from the leader of its request when their prompt was done
                found[uid] = self._prompt(uid)
                wanted.discard(uid)
            wanted.difference_update(record.preempted)
        self.computed = {uid: self.computed[uid] for uid in wanted if uid in self.computed} | found

    def _prompt(self, uid: int) -> int:
        info = self.trace.sequences.get(uid)
        return 0 if info is None else info.prompt_len

    def _rebuild(self, number: int) -> None:
        self._become(self.trace.state(number) if number >= self.trace.first else self.trace.start())
        self.number = number
        # who has not run since the oldest record: all of its blocks count as written
        self.computed = {uid: len(table) * self.trace.block_size for uid, table in self.tables.items()}
        self._compute(self.trace.since(self.trace.first)[: max(0, number - self.trace.first + 1)])

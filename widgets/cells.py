"""The pool's blocks at one moment, as a block table draws them: moved on event by event, rebuilt from a keyframe to go back."""

from __future__ import annotations

from array import array
from itertools import islice
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np

from nbengine.pool_state import PoolState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from nbengine.trace import StepRecord, Trace

HELD, CACHED, SHARED, COPIED, EMPTY = 1, 2, 4, 8, 16  # of a block: in a table; free but findable; in several; began as a copy; unwritten
MOST_CELLS = 10_000  # up to so many blocks each has a cell of its own
GROUPED_CELLS = 5_000  # and at most so many where a cell stands for several
SEVERAL = 0xFFFF  # owners


class Cells:
    """Shared by the views of a trace; used under their playhead's lock.

    kinds    [blocks] flags, as above
    owners   [blocks] uid of the first who holds it, its low 16 bits
    computed tokens whose keys and values each sequence has in its blocks
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.number = -1
        self.pool = PoolState(0)
        self.kinds = bytearray()
        self.owners = array("H")
        self.holders: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self._rebuild(trace.first - 1)

    def seek(self, number: int) -> None:
        """Become what the pool was right after the record of this number."""
        if number == self.number:
            return
        records = self.trace.since(self.number + 1)
        behind = self.trace.end - len(records) - self.number - 1
        if number < self.number or behind > 0 or number - self.number > len(records):
            try:
                self._rebuild(number)
            except LookupError:  # the ring has just dropped it
                self._rebuild(self.trace.first)
            return
        for record in islice(records, number - self.number):
            self._apply(record)
        self.number = number

    @property
    def num_blocks(self) -> int:
        """How many there are at this moment: an engine can be given another cache while it runs."""
        return len(self.pool.references)

    @property
    def group(self) -> int:
        """How many blocks stand in one cell."""
        return 1 if self.num_blocks <= MOST_CELLS else -(-self.num_blocks // GROUPED_CELLS)

    # ── what is drawn ───────────────────────────────────────────────────────────────────────────────────────────────

    def slots(self, block: int) -> int:
        """How many of a block's slots hold keys and values."""
        size = self.trace.block_size
        if self.pool.references[block] == 0:
            return size if self.pool.hashes[block] is not None else 0
        if self.pool.hashes[block] is not None:
            return size
        written = [self.computed.get(uid, 0) - size * self.pool.tables[uid].index(block) for uid in self.holders[block]]
        return min(max(0, *written), size)

    def partial(self) -> tuple[list[int], list[int]]:
        """The blocks that are neither full nor empty with their slots, and the held blocks that nothing was written to."""
        size, hashes, holders = self.trace.block_size, self.pool.hashes, self.holders
        partial: dict[int, int] = {}
        empty: list[int] = []
        for uid, table in self.pool.tables.items():
            full, rest = divmod(self.computed.get(uid, 0), size)
            for i in range(full, len(table)):
                block = table[i]
                if hashes[block] is not None:
                    continue
                slots = rest if i == full else 0
                if len(holders[block]) > 1:
                    slots = self.slots(block)
                if 0 < slots < size:
                    partial[block] = slots
                elif slots == 0:
                    empty.append(block)
        return [number for pair in partial.items() for number in pair], empty

    def encode(self) -> dict[str, Any]:
        """`data` [owners: uint16][kinds: uint8] for each block, or what groups of blocks are (`_encode_groups`); and `totals`."""
        partial, empty = self.partial()
        kinds = np.frombuffer(bytes(self.kinds), np.uint8).copy()
        kinds[empty] |= EMPTY
        about = {"group": self.group, "blocks": self.num_blocks, "totals": self._count(kinds, partial)}
        if self.group == 1:
            return {**about, "partial": partial, "data": self.owners.tobytes() + kinds.tobytes()}
        return {**about, "partial": [], "data": self._encode_groups(self.group, kinds, partial)}

    def totals(self) -> dict[str, int]:
        """Counts of blocks, and of the slots in the held ones."""
        partial, empty = self.partial()
        kinds = np.frombuffer(bytes(self.kinds), np.uint8).copy()
        kinds[empty] |= EMPTY
        return self._count(kinds, partial)

    def _count(self, kinds: NDArray[np.uint8], partial: list[int]) -> dict[str, int]:
        counts = np.bincount(kinds, minlength=32).tolist()

        def having(flags: int) -> int:
            return sum(count for kind, count in enumerate(counts) if kind & flags == flags)

        full = having(HELD) - having(HELD | EMPTY) - len(partial) // 2
        totals = {"blocks": len(kinds), "held": having(HELD), "cached": having(CACHED), "shared": having(SHARED), "copied": having(COPIED)}
        return {**totals, "slots": full * self.trace.block_size + sum(partial[1::2])}

    def _encode_groups(self, group: int, kinds: NDArray[np.uint8], partial: list[int]) -> bytes:
        """For each cell [owner: uint16], then [held][shared][copied][cached][filled: uint8]: shares of the cell, 255 for all of it.

        A share that is not nothing is at least 1 of 255, one that is not all at most 254.
        """
        blocks, size = len(kinds), self.trace.block_size
        cells = -(-blocks // group)
        room = np.full(cells, group)
        room[-1] = blocks - group * (cells - 1)
        padded = np.zeros(cells * group, np.uint8)
        padded[:blocks] = kinds
        slots = np.where(padded & HELD, size, 0)
        slots[(padded & EMPTY) > 0] = 0
        slots[partial[::2]] = partial[1::2]
        owners = np.zeros(cells * group, np.int64)
        owners[:blocks] = np.frombuffer(self.owners, np.uint16)
        held = (padded & HELD) > 0
        lowest = np.where(held, owners, SEVERAL).reshape(cells, group).min(1)
        highest = np.where(held, owners, -1).reshape(cells, group).max(1)
        parts = [np.where((lowest != highest) & (highest >= 0), SEVERAL, np.maximum(highest, 0)).astype(np.uint16).tobytes()]
        parts += [_share(((padded & flag) > 0).reshape(cells, group).sum(1), room) for flag in (HELD, SHARED, COPIED, CACHED)]
        parts.append(_share(slots.reshape(cells, group).sum(1), room * size))
        return b"".join(parts)

    # ── following the trace ─────────────────────────────────────────────────────────────────────────────────────────

    def _apply(self, record: StepRecord) -> None:
        self.pool.apply(record.events)
        touched: set[int] = set()
        for event in record.events:
            kind = event[0]
            if kind == "take":
                self.holders[event[1]] = [event[2]]
            elif kind == "share":
                self.holders.setdefault(event[1], []).append(event[2])
            elif kind == "free":
                holders = self.holders[event[1]]
                holders.remove(event[2])
                if not holders:
                    del self.holders[event[1]]
            elif kind in {"forget", "resize"}:
                if kind == "resize":
                    self.holders.clear()
                    touched.clear()
                touched.update(range(self.num_blocks))
                continue
            touched.add(event[1])
            if kind == "copy":
                touched.add(event[2])
        if len(self.kinds) == self.num_blocks:
            self._mark(touched)
        else:
            self._mark_all()
        self._compute(record)

    def _mark_all(self) -> None:
        self.kinds = bytearray(self.num_blocks)
        self.owners = array("H", bytes(2 * self.num_blocks))
        self._mark(range(self.num_blocks))

    def _mark(self, blocks: Iterable[int]) -> None:
        pool, kinds, owners = self.pool, self.kinds, self.owners
        for block in blocks:
            references = pool.references[block]
            if references == 0:
                kinds[block] = CACHED if pool.hashes[block] is not None else 0
                owners[block] = 0
            else:
                kinds[block] = HELD | (SHARED if references > 1 else 0) | (COPIED if block in pool.copied else 0)
                owners[block] = self.holders[block][0] & 0xFFFF

    def _compute(self, record: StepRecord) -> None:
        ran = record.uids
        self.computed.update(zip(ran, map(add, record.starts, record.counts), strict=True))
        if len(record.admitted) + len(record.preempted) + len(record.finished) == 0:
            return
        took_part = set(ran)
        for uid in record.admitted:
            if uid not in took_part:  # it forked from the leader of its request when their prompt was done
                self.computed[uid] = self._prompt(uid)
        for uid in [uid for uid in record.preempted if uid not in took_part] + [uid for uid, _ in record.finished]:
            self.computed.pop(uid, None)

    def _prompt(self, uid: int) -> int:
        info = self.trace.sequences.get(uid)
        return 0 if info is None else info.prompt_len

    def _rebuild(self, number: int) -> None:
        self.pool = self.trace.state(number) if number >= self.trace.first else self.trace.start()
        self.number = number
        self.holders = {}
        for uid, table in self.pool.tables.items():
            for block in table:
                self.holders.setdefault(block, []).append(uid)
        self._mark_all()
        self.computed = {}
        wanted = set(self.pool.tables)
        for record in reversed(self.trace.since(self.trace.first)[: max(0, number - self.trace.first + 1)]):
            if not wanted:
                break
            for uid, start, count in zip(record.uids, record.starts, record.counts, strict=True):
                if uid in wanted:
                    self.computed[uid] = start + count
                    wanted.discard(uid)
            for uid in wanted.intersection(record.admitted):
                self.computed[uid] = self._prompt(uid)
                wanted.discard(uid)
        for uid in wanted:  # it has not run since the oldest record: all of its blocks count as written
            self.computed[uid] = len(self.pool.tables[uid]) * self.trace.block_size


def _share(part: NDArray[Any], whole: NDArray[Any]) -> bytes:
    scaled = np.rint(255 * part / whole)
    scaled = np.where(part > 0, np.maximum(scaled, 1), 0)
    return np.where(part < whole, np.minimum(scaled, 254), 255).astype(np.uint8).tobytes()

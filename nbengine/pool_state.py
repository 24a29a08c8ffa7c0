"""The block pool at one moment, rebuilt from the events of a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbengine.blocks import BlockPool
    from nbengine.sequence import Sequence


class PoolState:
    """The block pool at one moment: the same fields as `BlockPool`, and every sequence's table."""

    def __init__(self, num_blocks: int) -> None:
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.blank = list(range(num_blocks - 1, -1, -1))
        self.cached: dict[int, None] = {}
        self.copied: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}

    @classmethod
    def of(cls, pool: BlockPool, running: Mapping[int, Sequence]) -> PoolState:
        """A copy of what a pool is now."""
        state = cls(0)
        state.references = pool.references.copy()
        state.hashes = pool.hashes.copy()
        state.blank = pool.blank.copy()
        state.cached = dict.fromkeys(pool.cached)
        state.copied = pool.copied.copy()
        state.tables = {uid: sequence.blocks.copy() for uid, sequence in running.items() if sequence.blocks}
        return state

    def copy(self) -> PoolState:
        state = PoolState(0)
        state.references, state.hashes, state.blank = self.references.copy(), self.hashes.copy(), self.blank.copy()
        state.cached, state.copied = self.cached.copy(), self.copied.copy()
        state.tables = {uid: blocks.copy() for uid, blocks in self.tables.items()}
        return state

    def apply(self, events: Iterable[tuple[Any, ...]]) -> None:
        """Follow the events of a record. The usual ones are here, and not in methods of their own: they come by thousands a second."""
        references, hashes, blank, cached, tables = self.references, self.hashes, self.blank, self.cached, self.tables
        for event in events:
            kind = event[0]
            if kind == "take":
                _, block, uid = event
                taken = blank.pop()
                assert taken == block
                references[block] = 1
                if uid in tables:
                    tables[uid].append(block)
                else:
                    tables[uid] = [block]
            elif kind == "seal":
                hashes[event[1]] = event[2]
            elif kind == "free":
                _, block, uid = event
                table = tables[uid]
                dropped = table.pop()
                assert dropped == block
                if not table:
                    del tables[uid]
                left = references[block] = references[block] - 1
                if left:
                    continue
                if self.copied:
                    self.copied.pop(block, None)
                if hashes[block] is None:
                    blank.append(block)
                else:
                    cached[block] = None
            else:
                getattr(self, f"_{kind}")(*event[1:])
                references, hashes, blank, cached, tables = self.references, self.hashes, self.blank, self.cached, self.tables

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PoolState)
            and (self.references, self.hashes, self.blank, self.tables) == (other.references, other.hashes, other.blank, other.tables)
            and self.copied == other.copied
            and list(self.cached) == list(other.cached)
        )

    __hash__ = None  # type: ignore[assignment]

    def _evict(self, block: int) -> None:
        del self.cached[block]
        self.hashes[block] = None
        self.blank.append(block)

    def _share(self, block: int, uid: int) -> None:
        self.cached.pop(block, None)
        self.references[block] += 1
        self.tables.setdefault(uid, []).append(block)

    def _copy(self, source: int, target: int, uid: int) -> None:
        table = self.tables[uid]
        assert table[-1] == target
        table[table.index(source)] = target
        self.copied[target] = source
        table[-1] = source  # the "free" that follows takes it away

    def _resize(self, num_blocks: int) -> None:
        self.__init__(num_blocks)  # type: ignore[misc] # all of it is as new

    def _forget(self) -> None:
        self.blank.extend(self.cached)
        self.cached.clear()
        self.hashes = [None] * len(self.hashes)

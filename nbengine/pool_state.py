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
        for kind, *arguments in events:
            getattr(self, f"_{kind}")(*arguments)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, PoolState)
            and (self.references, self.hashes, self.blank, self.tables) == (other.references, other.hashes, other.blank, other.tables)
            and self.copied == other.copied
            and list(self.cached) == list(other.cached)
        )

    __hash__ = None  # type: ignore[assignment]

    def _take(self, block: int, uid: int) -> None:
        assert self.blank[-1] == block
        self.blank.pop()
        self.references[block] = 1
        self.tables.setdefault(uid, []).append(block)

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

    def _seal(self, block: int, digest: bytes) -> None:
        self.hashes[block] = digest

    def _free(self, block: int, uid: int) -> None:
        table = self.tables[uid]
        assert table[-1] == block
        table.pop()
        if not table:
            del self.tables[uid]
        self._let_go(block)

    def _let_go(self, block: int) -> None:
        """One table fewer has it."""
        self.references[block] -= 1
        if self.references[block] == 0:
            self.copied.pop(block, None)
            if self.hashes[block] is None:
                self.blank.append(block)
            else:
                self.cached[block] = None

    def _resize(self, num_blocks: int) -> None:
        self.__init__(num_blocks)  # type: ignore[misc] # all of it is as new

    def _forget(self) -> None:
        self.blank.extend(self.cached)
        self.cached.clear()
        self.hashes = [None] * len(self.hashes)

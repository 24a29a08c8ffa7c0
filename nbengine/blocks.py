"""The pool of KV blocks: who holds each, what is cached in it, and which is taken next. Knows no tensors."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Ids
from typing import Any


def block_hash(parent: bytes, tokens: Ids[int]) -> bytes:
    """The name of a full block: what it holds and everything before it (`parent` is the seed for a first block)."""
    return hashlib.sha256(parent + array("I", tokens).tobytes()).digest()


class BlockPool:
    """Fixed-size blocks, each in one of three states.

    held    references[b] > 0: in the table of that many sequences
    cached  references[b] == 0 and hashes[b] set: free, but its content can still be found; evicted oldest first
    blank   references[b] == 0 and no hash: free; taken before any cached block is evicted

    Every change is appended to `events`, from which `nbengine.pool_state.PoolState` rebuilds the pool.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.references = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.blank = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers go first, so early tables are consecutive
        self.cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self.index: dict[bytes, int] = {}
        self.copied: dict[int, int] = {}  # held blocks that began as a copy: of which block
        self.events: list[tuple[Any, ...]] = []

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def find(self, digest: bytes) -> int | None:
        """The block with this content, held or cached."""
        return self.index.get(digest)

    def must_copy(self, block: int) -> bool:
        """Whether a sequence that holds this block must take a copy before it writes to it."""
        return self.references[block] > 1 or self.hashes[block] is not None

    def take(self, owner: int) -> int:
        """A block of `owner`'s own, blank. The caller has looked at `num_free`."""
        if self.blank:
            block = self.blank.pop()
        else:
            block, _ = self.cached.popitem(last=False)
            self._drop_hash(block)
            self.events.append(("evict", block))
        self.references[block] = 1
        self.events.append(("take", block, owner))
        return block

    def share(self, block: int, owner: int) -> None:
        """One more holder for a held block, or the first one for a cached block."""
        if self.references[block] == 0:
            del self.cached[block]
        self.references[block] += 1
        self.events.append(("share", block, owner))

    def copy_on_write(self, block: int, owner: int) -> int:
        """A block of `owner`'s own in place of one it shares; the runner copies the content."""
        target = self.take(owner)
        self.copied[target] = block
        self.events.append(("copy", block, target, owner))
        self.free(block, owner)
        return target

    def seal(self, block: int, digest: bytes) -> None:
        """The block is full and its content final: others may find it. The first block of a given content stays the one found."""
        if digest in self.index or self.hashes[block] is not None:
            return
        assert self.references[block] > 0
        self.hashes[block] = digest
        self.index[digest] = block
        self.events.append(("seal", block, digest))

    def free(self, block: int, owner: int) -> None:
        """One holder less. Free a sequence's last block first, so that its beginning is evicted last."""
        assert self.references[block] > 0, f"block {block} freed twice"
        self.references[block] -= 1
        self.events.append(("free", block, owner))
        if self.references[block] == 0:
            if self.copied:
                self.copied.pop(block, None)
            if self.hashes[block] is None:
                self.blank.append(block)
            else:
                self.cached[block] = None

    def forget(self) -> None:
        """Empty the prefix cache: no content can be found any more; held blocks stay with their holders."""
        self.events.append(("forget",))
        self.blank.extend(self.cached)
        self.cached.clear()
        self.index.clear()
        self.hashes = [None] * self.num_blocks

    def resize(self, num_blocks: int) -> None:
        """Another number of blocks; nobody may hold any."""
        assert self.num_used == 0, "blocks are held"
        self.forget()
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.hashes = [None] * num_blocks
        self.blank = list(range(num_blocks - 1, -1, -1))
        self.events.append(("resize", num_blocks))

    def take_events(self) -> list[tuple[Any, ...]]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events

    def check(self) -> None:
        """Assert that every block is in exactly one state and the index agrees with the blocks."""
        free = [*self.blank, *self.cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert all(self.references[b] == 0 for b in free), "a free block has holders"
        assert sum(1 for r in self.references if r == 0) == len(free), "a block is lost"
        assert all(self.hashes[b] is None for b in self.blank), "a blank block has a hash"
        assert all(self.hashes[b] is not None for b in self.cached), "a cached block has no hash"
        assert self.index == {h: b for b, h in enumerate(self.hashes) if h is not None}, "the index and the hashes differ"

    def _drop_hash(self, block: int) -> None:
        digest = self.hashes[block]
        assert digest is not None
        del self.index[digest]
        self.hashes[block] = None

"""The pool's blocks at one moment, as a block table draws them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nbengine.widgets.followed_pool import CACHED, COPIED, HELD, SHARED, FollowedPool

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMPTY = 16  # of a held block, beside the flags of a FollowedPool: nothing was written to it
COUNTED = (HELD, CACHED, SHARED, COPIED, EMPTY)
MOST_CELLS = 10_000  # up to so many blocks each has a cell of its own
GROUPED_CELLS = 5_000  # and at most so many where a cell stands for several
SEVERAL = 0xFFFF  # owners; one is sent as what its uid leaves over beside this


class Cells(FollowedPool):
    """Shared by the views of a trace; used under their playhead's lock."""

    @property
    def group(self) -> int:
        """How many blocks stand in one cell."""
        return 1 if self.num_blocks <= MOST_CELLS else -(-self.num_blocks // GROUPED_CELLS)

    def slots(self, block: int) -> int:
        """How many of a block's slots hold keys and values."""
        size = self.trace.block_size
        if self.hashes[block] is not None:
            return size
        written = [self.computed.get(uid, 0) - size * self.tables[uid].index(block) for uid in self.holders(block)]
        return min(max(0, *written), size) if written else 0

    def partial(self) -> tuple[list[int], list[int], list[int]]:
        """The blocks that are neither full nor empty, how many of the slots of each are used, and the held blocks that nothing was written to."""
        size, hashes, others, computed = self.trace.block_size, self.hashes, self.others, self.computed
        partial: dict[int, int] = {}
        empty: list[int] = []
        for uid, table in self.tables.items():
            written = computed.get(uid, 0)
            full = written // size
            for i in range(full, len(table)):
                block = table[i]
                if hashes[block] is not None:
                    continue
                slots = self.slots(block) if block in others else written - size * full if i == full else 0
                if slots == 0:
                    empty.append(block)
                elif slots < size:
                    partial[block] = slots
        return list(partial), list(partial.values()), empty

    def encode(self) -> dict[str, Any]:
        """`data` [owners: uint16, uids modulo SEVERAL][kinds: uint8] for each block, or what groups of blocks are (`_encode_groups`); and `totals`."""
        partial, slots, empty = self.partial()
        kinds = self._kinds(empty)
        counts = _counts(kinds)
        about = {"group": self.group, "blocks": self.num_blocks, "totals": self._totals(counts, slots)}
        owners = self._by_cell((np.frombuffer(self.owners, np.int64) % SEVERAL).astype(np.uint16))
        if self.group == 1:
            pairs = [number for pair in zip(partial, slots, strict=True) for number in pair]
            return {**about, "partial": pairs, "data": (owners * (kinds & HELD)).tobytes() + kinds.tobytes()}
        return {**about, "partial": [], "data": self._encode_groups(owners, kinds, counts, partial, slots)}

    def totals(self) -> dict[str, int]:
        """Counts of blocks, and of the slots in the held ones."""
        _, slots, empty = self.partial()
        return self._totals(_counts(self._kinds(empty)), slots)

    def _kinds(self, empty: list[int]) -> NDArray[np.uint8]:
        """The flags of all blocks, [group, cells]."""
        kinds = np.frombuffer(self.kinds, np.uint8).copy()
        kinds[empty] |= EMPTY
        return self._by_cell(kinds)

    def _by_cell(self, blocks: NDArray[Any]) -> NDArray[Any]:
        """[group, cells]: what is said of the blocks of a cell in a column, zeros after the last one. Reduced along its columns it is quick."""
        group = self.group
        padded = np.zeros(-(-len(blocks) // group) * group, blocks.dtype)
        padded[: len(blocks)] = blocks
        return np.ascontiguousarray(padded.reshape(-1, group).T)

    def _totals(self, counts: dict[int, NDArray[np.int64]], slots: list[int]) -> dict[str, int]:
        held, cached, shared, copied, empty = (int(counts[flag].sum()) for flag in COUNTED)
        used = (held - empty - len(slots)) * self.trace.block_size + sum(slots)
        return {"blocks": self.num_blocks, "held": held, "cached": cached, "shared": shared, "copied": copied, "slots": used}

    def _encode_groups(
        self,
        owners: NDArray[np.uint16],
        kinds: NDArray[np.uint8],
        counts: dict[int, NDArray[np.int64]],
        partial: list[int],
        slots: list[int],
    ) -> bytes:
        """For each cell [owner: uint16], then [held][shared][copied][cached][filled: uint8]: shares of the cell, 255 for all of it.

        A share that is not nothing is at least 1 of 255, one that is not all at most 254.
        """
        size, group = self.trace.block_size, self.group
        held = (kinds & HELD).astype(np.uint16)
        highest = (owners * held).max(0)
        lowest = (owners | (held - np.uint16(1))).min(0)
        parts = [np.where((lowest != highest) & (counts[HELD] > 0), SEVERAL, highest).astype(np.uint16).tobytes()]
        filled = (counts[HELD] - counts[EMPTY]) * size
        np.subtract.at(filled, np.array(partial, np.intp) // group, size - np.array(slots, np.int64))
        last = self.num_blocks - group * (len(filled) - 1)  # blocks of the last cell
        parts += [_shares(counts[flag], group, last) for flag in (HELD, SHARED, COPIED, CACHED)]
        parts.append(_shares(filled, group * size, last * size))
        return b"".join(parts)


def _counts(kinds: NDArray[np.uint8]) -> dict[int, NDArray[np.int64]]:
    """How many blocks of each cell have which flag."""
    return {flag: (kinds & flag > 0).sum(0) for flag in COUNTED}


def _shares(parts: NDArray[np.int64], whole: int, last: int) -> bytes:
    """Parts of cells that are this large, but for the last of them."""
    shares = _scale(whole)[parts]
    shares[-1] = _scale(last)[parts[-1]]
    return shares.tobytes()


@cache
def _scale(whole: int) -> NDArray[np.uint8]:
    """The share that each part is of a whole."""
    part = np.arange(whole + 1)
    scaled = np.clip(np.rint(255 * part / whole), 1, 254).astype(np.uint8)
    scaled[0], scaled[-1] = 0, 255
    return scaled

"""The prefix cache as sequences use it: which blocks already hold a beginning of theirs, and which of their own they offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from nbengine.blocks import BlockPool, block_hash

if TYPE_CHECKING:
    from nbengine.sequence import Sequence


class Rotation(Protocol):
    """How a model's keys turn with a sequence's length (models/rope.py), as far as sharing them goes."""

    def rope_anchor(self, prompt_len: int, known_len: int) -> int:
        """What the rotation of a sequence's tokens hangs on, fixed when it is given a row."""

    def rope_regime(self, anchor: int) -> int:
        """Equal for two sequences exactly if equal tokens give equal keys."""

    @property
    def rope_boundary(self) -> int | None:
        """A sequence that grows past this many tokens is computed again from its first; None: never."""


class PrefixCache:
    """Names a sequence's full blocks by their content, and finds or offers them in the pool under these names."""

    def __init__(self, pool: BlockPool, *, enabled: bool, rotation: Rotation | None) -> None:
        self.pool = pool
        self.enabled = enabled
        self.rotation = rotation

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks of the longest beginning of a waiting sequence's tokens that is in the pool."""
        if self.rotation is not None:
            self._turn(sequence, self.rotation)
        if not self.enabled or sequence.wants_scores:
            return []
        hits = []
        for i in range(len(sequence.tokens) // self.pool.block_size):
            block = self.pool.find(self._hash(sequence, i))
            if block is None:
                break
            hits.append(block)
        return hits

    def offer(self, sequence: Sequence, full: int) -> list[int]:
        """Let others find the first `full` blocks of its table, which are; returns those offered for the first time."""
        offered = sequence.blocks[sequence.sealed : full] if self.enabled else []
        for block in offered:
            self.pool.seal(block, self._hash(sequence, sequence.sealed))
            sequence.sealed += 1
        return offered

    def outgrown(self, sequence: Sequence) -> bool:
        """Whether it has grown past the length up to which its keys are turned as they are, and must be computed anew."""
        boundary = None if self.rotation is None else self.rotation.rope_boundary
        return boundary is not None and sequence.anchor <= boundary < sequence.length

    def _turn(self, sequence: Sequence, rotation: Rotation) -> None:
        """Fix what the rotation of its keys hangs on before it is given a row; keys that turn otherwise are other content."""
        sequence.anchor = rotation.rope_anchor(sequence.prompt_len, len(sequence.tokens))
        regime = rotation.rope_regime(sequence.anchor)
        if regime != sequence.regime:
            sequence.regime = regime
            sequence.hashes.clear()

    def _hash(self, sequence: Sequence, i: int) -> bytes:
        hashes, size = sequence.hashes, self.pool.block_size
        while len(hashes) <= i:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else sequence.hash_seed + sequence.regime.to_bytes(8)
            hashes.append(block_hash(parent, sequence.tokens[start : start + size]))
        return hashes[i]

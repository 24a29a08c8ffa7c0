"""What a scheduler hands out: a step in the making, then in flight, and what it meant for each sequence once it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nbengine.batch import Batch, NewRow, TokenLogprobs

if TYPE_CHECKING:
    from nbengine.sequence import Sequence


class Update:
    """What a step, or a cancellation, means for one sequence; a step brings at most one for each, and the last of all says so."""

    __slots__ = "last", "logprobs", "prompt_logprobs", "sequence", "tokens"

    def __init__(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        prompt_logprobs: list[TokenLogprobs] | None = None,
    ) -> None:
        self.sequence = sequence
        self.tokens = tokens
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.last = sequence.finish_reason is not None  # whether it has ended with this: a later step may have landed before this is read


@dataclass(slots=True)
class Plan:
    """A batch in the making, then in flight: the arrays of the Batch as lists, and the sequences they speak of."""

    sequences: list[Sequence] = field(default_factory=list)  # by batch row
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    table_writes: list[tuple[int, int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    sample_index: list[int] = field(default_factory=list)
    samples: list[Sequence] = field(default_factory=list)
    admitted: list[NewRow] = field(default_factory=list)
    entered: list[Sequence] = field(default_factory=list)  # who was given a row
    filled: set[int] = field(default_factory=set)  # blocks that this very step fills: they may be read in it, but not copied
    held: set[int] = field(default_factory=set)  # uids that sit this step out, to be preempted once no step in flight needs them
    long_room: int = 0  # tokens that long prompts may still compute in this step
    forks: bool = False  # whether there are samples of sequences that have no row of the batch
    squeezed: bool = False  # blocks ran out for who was running: nobody new in this step
    prompt_logprobs: dict[int, int] = field(default_factory=dict)

    @property
    def everyone(self) -> list[Sequence]:
        """Who takes part, each once: by rows of its own, or by its sample alone (a follower in the step it forks in)."""
        return list(dict.fromkeys(self.sequences + self.samples)) if self.forks else self.sequences

    def to_batch(self, step: int) -> Batch:
        rows = np.array([s.row for s in self.sequences], np.int32)
        return Batch(
            step=step,
            rows=rows,
            starts=np.array(self.starts, np.int32),
            counts=np.array(self.counts, np.int32),
            tokens=np.array(self.tokens, np.int32),
            table_writes=np.array(self.table_writes, np.int32).reshape(-1, 4),
            copies=np.array(self.copies, np.int32).reshape(-1, 2),
            sample_index=np.array(self.sample_index, np.int32),
            sample_rows=rows if self.samples == self.sequences else np.array([s.row for s in self.samples], np.int32),
            admitted=self.admitted,
            prompt_logprobs=self.prompt_logprobs,
        )

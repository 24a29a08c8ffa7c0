"""What crosses between the scheduler and a runner: plain arrays, no torch, nothing that cannot be sent to another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nbengine.sampling_params import SamplingParams

LogitsProcessor = Callable[[list[int], Any], Any]


@dataclass(slots=True)
class NewRow:
    """Everything a runner must know of a sequence when it is given a row of the state tables.

    A row belongs to one sequence from the step that admits it until that sequence finishes or is preempted.
    """

    row: int
    prompt: Sequence[int]  # the user's prompt
    output: Sequence[int]  # tokens sampled before a preemption
    params: SamplingParams
    seed: int  # 64 bits; the noise of a sampled token depends on this, its position and its id alone
    anchor: int = 0  # what the rotation of its tokens hangs on (models/rope.py); 0: nothing


@dataclass(slots=True)
class Batch:
    """One step: which rows run, on how many tokens each, and what changes in the tables before they do.

    Row i of the batch computes the tokens [starts[i], starts[i] + counts[i]) of the sequence in state row rows[i].
    Sample j takes the logits after the last token of batch row sample_index[j] and draws a token for state row
    sample_rows[j]; several samples may share a batch row (n > 1 forks at the end of its prompt).
    """

    step: int
    rows: NDArray[np.int32]  # [rows] state row of each sequence
    starts: NDArray[np.int32]  # [rows] tokens whose keys and values are already in the cache
    counts: NDArray[np.int32]  # [rows] tokens computed in this step
    tokens: NDArray[np.int32]  # [sum(counts)] ids; -1 where the row's newest token is still only on the device
    table_writes: NDArray[np.int32]  # [writes, 4] cache group, state row, column, block
    copies: NDArray[np.int32]  # [copies, 2] source, target; before anything is computed, and no target before all sources are read
    sample_index: NDArray[np.int32]  # [samples] batch row
    sample_rows: NDArray[np.int32]  # [samples] state row
    admitted: list[NewRow] = field(default_factory=list)
    prompt_logprobs: dict[int, int] = field(default_factory=dict)  # batch row -> how many top tokens are wanted

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the token in question first, then the most likely ones, best first."""

    ids: list[int]
    values: list[float]
    rank: int  # of the token in question, 1 is the most likely


@dataclass(slots=True)
class Sampled:
    """What a step brought: for sample j the counts[j] tokens tokens[j, :counts[j]].

    A row that a later step in flight already builds on brings exactly one; otherwise none (the last token is then computed
    once more) or several.
    """

    tokens: NDArray[np.int32]  # [samples, most tokens of one sample]
    counts: NDArray[np.int32]  # [samples]
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # sample -> one entry a token
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # batch row -> one a position after its first
    failed: dict[int, str] = field(default_factory=dict)  # sample -> why (a logits processor that raised, say)
    device_s: float = 0.0  # seconds that a device worked on the step; 0 where nobody measures

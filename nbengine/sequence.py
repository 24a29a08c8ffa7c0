"""One sequence of tokens as the scheduler sees it: counters, a block table, and what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from nbengine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been sampled after it. A request with n > 1 has n of them.

    tokens  [0, computed)            keys and values are, or are being, written to the cache
            [computed, length)       known or on their way; to be computed next
            length = len(tokens) + pending, pending: sampled by steps in flight, ids not here yet
    blocks  position p lives in blocks[p // block_size]; [0, sealed) of them have been offered to the prefix cache
    """

    uid: int
    request_id: str
    index: int  # which of the request's n
    params: SamplingParams
    tokens: list[int]
    prompt_len: int
    limit: int  # length at which it ends
    arrival: int
    stops: frozenset[int] = frozenset()  # tokens that end it
    priority: int = 0
    seed: int = 0
    hash_seed: bytes = b""  # everything but the tokens that changes its keys and values: adapter, salt, weights' version
    followers: list[Sequence] = field(default_factory=list)  # the rest of the n; they fork from this one when its prompt is done

    anchor: int = 0  # what the rotation of its keys hangs on, and what that makes them (models/rope.py)
    regime: int = 0
    computed: int = 0
    pending: int = 0
    in_flight: int = 0  # launched steps that still touch its blocks
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as worked out
    sealed: int = 0
    row: int = -1
    place: Any = None  # in the queue, as the policy said when it last began to wait
    step: int = -1  # the last step it was planned into
    reserved: int = 0  # tokens for which its policy had blocks taken in advance
    scored: int = 0  # prompt positions after the first whose log-probabilities have been given out (for a follower: by its leader)
    cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 for a sequence that decodes."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of its prompt are still to be given out, so that none of it may come from the cache."""
        return self.params.prompt_logprobs is not None and self.scored < self.prompt_len - 1

    @property
    def running(self) -> bool:
        return self.row >= 0

    def __repr__(self) -> str:
        state = self.finish_reason or ("running" if self.running else "waiting")
        return f"<Sequence {self.request_id}/{self.index} {state} {self.computed}/{self.length} blocks={self.blocks}>"

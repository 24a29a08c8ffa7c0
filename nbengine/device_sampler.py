"""From logits to tokens without waiting for either: what each row asks for beyond a plain draw, on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from nbengine.batch import Sampled, TokenLogprobs
from nbengine.penalty_tables import PenaltyTables, has_penalties
from nbengine.sampler import Edits, ProcessorError, has_edits, logprob_entries, logprob_tensors, why_nothing
from nbengine.staging import to_device, to_host

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbengine.batch import Batch, NewRow
    from nbengine.kernels.prepare_step import SampleInputs
    from nbengine.ops import Ops
    from nbengine.sampler import LogprobTensors
    from nbengine.state_tables import StateTables

_ALWAYS = np.iinfo(np.int64).max
NOTHING_DRAWN = "the model's logits held NaN or infinity; try dtype='float32' or check its weights"


@dataclass(slots=True)
class Drawing:
    """What a draw leaves on the way to the host."""

    edited: list[int] = field(default_factory=list)  # samples whose rows keep a history
    failed: dict[int, str] = field(default_factory=dict)
    scores: torch.Tensor | None = None  # of a step with edits, for saying why nothing could be drawn
    wanted: list[tuple[int, int]] = field(default_factory=list)  # sample, and how many log-probabilities
    logprobs: list[LogprobTensors] = field(default_factory=list)


class DeviceSampler:
    """The rows' parameters beyond those in the state tables."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, ops: Ops, tables: StateTables) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.ops = ops
        self.tables = tables
        self.penalties = PenaltyTables(vocab_size, max_rows, device)
        self._edits: list[Edits | None] = [None] * max_rows
        self._edit_until: NDArray[np.int64] = np.zeros(max_rows, np.int64)  # logits are edited while the sequence is shorter
        self._logprobs: NDArray[np.int64] = np.full(max_rows, -1, np.int64)  # most likely tokens wanted; -1: no logprobs
        self._special: set[int] = set()  # rows with any of these
        self._ones: NDArray[np.int32] = np.ones(max_rows, np.int32)
        self._ones.flags.writeable = False  # handed out as what most steps count

    @staticmethod
    def keeps_tensors(new: NewRow) -> bool:
        """Whether to admit a sequence takes calls of torch's."""
        return has_penalties(new.params) or has_edits(new.params)

    def admit(self, new: NewRow) -> None:
        """Give a state row to a sequence; whatever was there is gone."""
        params, row = new.params, new.row
        self.penalties.admit(new)
        wanted = params.logprobs
        self._logprobs[row] = -1 if wanted is None else self.vocab_size if wanted == -1 else min(wanted, self.vocab_size)
        self._edits[row], self._edit_until[row] = None, 0
        if has_edits(params):
            edits = Edits(new, self.vocab_size, self.device, penalties=False)
            self._edit_until[row] = _ALWAYS if edits.always else len(new.prompt) + params.min_tokens if len(edits.stops) else 0
            self._edits[row] = edits if self._edit_until[row] else None
        special = self._edits[row] is not None or wanted is not None or self.penalties.slots[row] >= 0
        (self._special.add if special else self._special.discard)(row)

    def plain(self, rows: NDArray[np.int32]) -> bool:
        """Whether these rows ask for nothing but the draw itself."""
        return not self._special or self._special.isdisjoint(rows.tolist())

    def draw_plainly(self, logits: torch.Tensor, inputs: SampleInputs) -> torch.Tensor:
        """Tokens [samples] int64, -1 where nothing could be drawn; nothing of it needs the host, so that it may be captured."""
        drawn: torch.Tensor = self.ops.sample(logits, *inputs.arguments)
        self.ops.keep_drawn(drawn, inputs.rows, self.tables.newest)
        return drawn

    def draw(self, logits: torch.Tensor, batch: Batch, inputs: SampleInputs) -> tuple[torch.Tensor, Drawing]:
        """The same for rows that ask for more."""
        rows, drawing = batch.sample_rows, Drawing()
        lengths = (batch.starts + batch.counts)[batch.sample_index]
        drawing.edited = np.flatnonzero(lengths < self._edit_until[rows]).tolist()
        slots = self.penalties.slots[rows]
        counted = bool((slots >= 0).any())
        on_device = to_device(slots, self.device) if counted else None
        scores = logits
        if drawing.edited or counted:
            scores = drawing.scores = logits.to(torch.float32, copy=True)
            for j in drawing.edited:
                self._edit(scores[j], int(rows[j]), int(lengths[j]), j, drawing)
            if counted:
                self.ops.penalise(scores, self.penalties.counts, on_device, self.penalties.rates)
        drawn: torch.Tensor = self.ops.sample(scores, *inputs.arguments)
        self.ops.keep_drawn(drawn, inputs.rows, self.tables.newest, self.penalties.counts if counted else None, on_device)
        wanted = np.flatnonzero(self._logprobs[rows] >= 0)
        if len(wanted):
            tops = self._logprobs[rows[wanted]]
            drawing.wanted = list(zip(wanted.tolist(), tops.tolist(), strict=True))
            picked = to_device(wanted, self.device)
            pieces = logprob_tensors(logits[picked], drawn[picked].clamp(min=0), int(tops.max()))
            drawing.logprobs = [(to_host(ids), to_host(values), to_host(ranks)) for ids, values, ranks in pieces]
        return drawn, drawing

    def collect(self, tokens: list[int], rows: NDArray[np.int32], drawing: Drawing) -> Sampled:
        """What the host has of it once the device is done."""
        failed, counts = drawing.failed, self._ones[: len(rows)]
        if min(tokens, default=0) < 0:
            scores = drawing.scores
            for j, token in enumerate(tokens):
                if token < 0:
                    failed.setdefault(j, NOTHING_DRAWN if scores is None else why_nothing(scores[j], scores[j]))
        if failed:
            counts = counts.copy()
            counts[list(failed)] = 0
        for j in drawing.edited:
            edits = self._edits[rows[j]]
            if j not in failed and edits is not None:
                edits.append(tokens[j])
        logprobs: dict[int, list[TokenLogprobs]] = {}
        entries = [entry for piece in drawing.logprobs for entry in logprob_entries(*piece)]
        for (j, top), entry in zip(drawing.wanted, entries, strict=True):
            if j not in failed:
                logprobs[j] = [TokenLogprobs(entry.ids[: top + 1], entry.values[: top + 1], entry.rank)]
        return Sampled(tokens=np.array(tokens, np.int32)[:, None], counts=counts, logprobs=logprobs, failed=failed)

    def _edit(self, scores: torch.Tensor, row: int, length: int, sample: int, drawing: Drawing) -> None:
        edits = self._edits[row]
        assert edits is not None
        try:
            edits.apply(scores, length - len(edits.prompt))
        except ProcessorError as error:
            drawing.failed[sample] = str(error)

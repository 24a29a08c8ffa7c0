"""How often each sequence with penalties has had each token, on the device: no step waits for the host to count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from nbengine.kernels.penalise import IN_PROMPT
from nbengine.staging import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbengine.batch import NewRow
    from nbengine.sampling_params import SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or bool(params.frequency_penalty or params.presence_penalty)


class PenaltyTables:
    """A slot of the tables belongs to a state row from the step that admits a sequence with penalties to it until another is."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.slots: NDArray[np.int64] = np.full(max_rows, -1, np.int64)  # by state row
        self.counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # as kernels/penalise.py reads them
        self.rates = torch.zeros((0, 3), dtype=torch.float32, device=device)
        self._free: list[int] = []

    def admit(self, new: NewRow) -> None:
        """Begin to count for a sequence, or stop counting for who had its row before."""
        held = int(self.slots[new.row])
        if not has_penalties(new.params):
            if held >= 0:
                self._free.append(held)
                self.slots[new.row] = -1
            return
        if held < 0:
            if not self._free:
                self._grow()
            held = self.slots[new.row] = self._free.pop()
        params, counts = new.params, self.counts[held]
        rates = np.array([params.repetition_penalty, params.frequency_penalty, params.presence_penalty], np.float32)
        self.rates[held] = to_device(rates, self.device)  # here and below: the device has steps to do, and nobody waits for them
        counts.zero_()
        output, times = np.unique(np.asarray(new.output, np.int64), return_counts=True)
        counts[to_device(output, self.device)] = to_device(times.astype(np.int32), self.device)
        counts[to_device(np.unique(np.asarray(new.prompt, np.int64)), self.device)] += IN_PROMPT

    def _grow(self) -> None:
        """Twice the slots: what is not used costs nothing."""
        size = self.counts.shape[0]
        more = max(8, size)
        self.counts = torch.cat((self.counts, self.counts.new_zeros((more, self.vocab_size))))
        self.rates = torch.cat((self.rates, self.rates.new_zeros((more, 3))))
        self._free = [*range(size + more - 1, size - 1, -1), *self._free]

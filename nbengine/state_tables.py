"""What a device knows of every live sequence, each in a row that it keeps from the step that admits it until it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from nbengine.kernels.update_tables import ROW

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nbengine.batch import NewRow


class StateTables:
    """Tables by state row, on the device. Row `spare` is nobody's: what pads a step reads and writes there, and draws greedily."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.spare = rows
        self.blocks = torch.zeros((rows + 1, columns), dtype=torch.int32, device=device)
        self.newest = torch.zeros(rows + 1, dtype=torch.int64, device=device)  # the token drawn last
        self.anchors = torch.zeros(rows + 1, dtype=torch.int32, device=device)  # what the rotation of its tokens hangs on
        self.parameters = torch.zeros((rows + 1, 4), dtype=torch.int64, device=device)  # as `packed_row` lays them out

    @property
    def temperature(self) -> torch.Tensor:
        return self.parameters.view(torch.float32)[:, 0]

    @property
    def top_k(self) -> torch.Tensor:
        return self.parameters.view(torch.int32)[:, 1]

    @property
    def top_p(self) -> torch.Tensor:
        return self.parameters.view(torch.float64)[:, 1]

    @property
    def min_p(self) -> torch.Tensor:
        return self.parameters.view(torch.float64)[:, 2]

    @property
    def seeds(self) -> torch.Tensor:
        return self.parameters[:, 3]


def packed_rows(admitted: Sequence[NewRow]) -> NDArray[np.int32]:
    """New rows [rows, ROW] as `update_tables` reads them."""
    packed = np.zeros((len(admitted), ROW), np.int32)
    first, wide, seeds = (np.zeros((len(admitted), size), dtype) for size, dtype in ((2, np.float32), (2, np.float64), (1, np.int64)))
    for i, new in enumerate(admitted):
        params = new.params
        packed[i, :2] = new.row, new.anchor
        packed[i, 3] = params.top_k
        first[i, 0] = params.temperature
        wide[i] = params.top_p, params.min_p
        seeds[i, 0] = (new.seed + 2**63) % 2**64 - 2**63  # the same 64 bits, signed
    packed[:, 2] = first.view(np.int32)[:, 0]
    packed[:, 4:8] = wide.view(np.int32)
    packed[:, 8:] = seeds.view(np.int32)
    return packed

"""What a device knows of every live sequence, each in a row that it keeps from the step that admits it until it leaves."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbengine.batch import NewRow

_ROW = Struct("=iifiddQ")  # ROW numbers of kernels/update_tables.py: state row, anchor, temperature, top_k, top_p, min_p, seed
_HOTTEST = float(torch.finfo(torch.float32).max)


class StateTables:
    """Tables by state row, on the device. Row `spare` is nobody's: what pads a step reads and writes there, and draws greedily."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.spare = rows
        self.blocks = torch.zeros((rows + 1, columns), dtype=torch.int32, device=device)
        self.newest = torch.zeros(rows + 1, dtype=torch.int64, device=device)  # the token drawn last
        self.anchors = torch.zeros(rows + 1, dtype=torch.int32, device=device)  # what the rotation of its tokens hangs on
        self.parameters = torch.zeros((rows + 1, 4), dtype=torch.int64, device=device)  # as `packed_rows` lays them out

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


def packed_rows(admitted: Sequence[NewRow]) -> memoryview:
    """New rows of ROW numbers each, one after the other, as `update_tables` reads them."""
    packed = bytearray()
    for new in admitted:
        params = new.params
        temperature = min(params.temperature, _HOTTEST)
        packed += _ROW.pack(new.row, new.anchor, temperature, params.top_k, params.top_p, params.min_p, new.seed % 2**64)
    return memoryview(packed).cast("i")

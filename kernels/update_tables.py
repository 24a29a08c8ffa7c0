"""What changes in the state tables before a step: new rows, and blocks that were given to rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nbengine.kernels._triton import chained, follow, jit

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it

    from nbengine.state_tables import StateTables

ROW = 10  # numbers of a new row: its state row, its anchor, and its parameters as four 64-bit words
_TILE = 128


def update_tables_reference(step: torch.Tensor, packed: torch.Tensor, tables: StateTables, most: int) -> None:
    """In packed int32: new rows of ROW numbers each, then writes of three (state row, column, block); step[3:5] says how many of each.

    No more than `most` of either are looked at: a graph is captured for a number of programs, and what is more than they do is done
    apart, before it. To do an update twice changes nothing.
    """
    rows, writes = step[3:5].tolist()
    new, written = packed[: rows * ROW].view(-1, ROW), packed[rows * ROW : rows * ROW + 3 * writes].view(-1, 3)
    new, written = new[:most], written[:most]
    tables.anchors[new[:, 0].long()] = new[:, 1]
    tables.parameters.view(torch.int32)[new[:, 0].long()] = new[:, 2:]
    tables.blocks[written[:, 0].long(), written[:, 1].long()] = written[:, 2]


def update_tables(step: torch.Tensor, packed: torch.Tensor, tables: StateTables, most: int) -> None:
    """As update_tables_reference, in one launch, for `most` rounded up to a multiple of 128."""
    update_tables_kernel[(-(-most // _TILE),)](
        step, packed, tables.anchors, tables.parameters.view(torch.int32), tables.blocks, tables.blocks.stride(0),
        tile=_TILE, row=ROW, num_warps=4, **chained(packed.device),
    )  # fmt: skip


@jit(do_not_specialize=("table_stride",))
def update_tables_kernel(
    p_step: tl.tensor,
    p_packed: tl.tensor,
    p_anchors: tl.tensor,
    p_parameters: tl.tensor,
    p_blocks: tl.tensor,
    table_stride: int,
    tile: tl.constexpr,
    row: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    o = tl.program_id(0) * tile + tl.arange(0, tile)
    rows, writes = tl.load(p_step + 3), tl.load(p_step + 4)
    m = o < rows
    p_new = p_packed + o * row
    state = tl.load(p_new, mask=m, other=0)
    tl.store(p_anchors + state, tl.load(p_new + 1, mask=m), mask=m)
    for i in tl.static_range(8):
        tl.store(p_parameters + state * 8 + i, tl.load(p_new + 2 + i, mask=m), mask=m)
    m = o < writes
    p_write = p_packed + rows * row + o * 3
    state = tl.load(p_write, mask=m, other=0).to(tl.int64)
    tl.store(p_blocks + state * table_stride + tl.load(p_write + 1, mask=m), tl.load(p_write + 2, mask=m), mask=m)

"""What was drawn becomes the rows' newest tokens, and is counted where that is wanted: before the host has seen it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nbengine.kernels._triton import chained, follow, jit

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it


def keep_drawn_reference(
    drawn: torch.Tensor, rows: torch.Tensor, newest: torch.Tensor, counts: torch.Tensor | None = None, slots: torch.Tensor | None = None
) -> None:
    """newest[rows[j]] = drawn[j], or 0 where nothing could be drawn (-1); counts[slots[j], drawn[j]] += 1 where slots[j] >= 0."""
    newest.index_copy_(0, rows, drawn.clamp(min=0))
    if counts is not None and slots is not None:
        where = (slots >= 0) & (drawn >= 0)
        counts.index_put_((slots[where], drawn[where]), torch.ones((), dtype=counts.dtype, device=counts.device), accumulate=True)


def keep_drawn(
    drawn: torch.Tensor, rows: torch.Tensor, newest: torch.Tensor, counts: torch.Tensor | None = None, slots: torch.Tensor | None = None
) -> None:
    """As keep_drawn_reference. A slot and a row stand in one sample at most, the spare row apart."""
    size = drawn.shape[0]
    if size:
        keep_drawn_kernel[(-(-size // 128),)](
            drawn, rows, newest, counts, slots, size, 0 if counts is None else counts.stride(0), tile=128, num_warps=4,
            **chained(drawn.device),
        )  # fmt: skip


@jit(do_not_specialize=("size",))
def keep_drawn_kernel(
    p_drawn: tl.tensor,
    p_rows: tl.tensor,
    p_newest: tl.tensor,
    p_counts: tl.tensor | None,
    p_slots: tl.tensor | None,
    size: int,
    stride: int,
    tile: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    o = tl.program_id(0) * tile + tl.arange(0, tile)
    m = o < size
    drawn = tl.load(p_drawn + o, mask=m, other=-1)
    tl.store(p_newest + tl.load(p_rows + o, mask=m, other=0), tl.maximum(drawn, 0), mask=m)
    if p_counts is not None:
        slot = tl.load(p_slots + o, mask=m, other=-1)
        m &= (slot >= 0) & (drawn >= 0)
        p_count = p_counts + slot * stride + drawn
        tl.store(p_count, tl.load(p_count, mask=m, other=0) + 1, mask=m)

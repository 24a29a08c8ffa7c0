"""A step's inputs, made on the device from what the host packs into one copy and from the state tables that stay there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nbengine.kernels._triton import chained, follow, jit

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it

    from nbengine.state_tables import StateTables
    from nbengine.step_inputs import StepInputs

HEADER = 8  # rows, tokens, samples, new rows and writes (kernels/update_tables.py), and three to spare
_TILE = 128


@dataclass(slots=True)
class SampleInputs:
    """What drawing tokens needs to know of each sample; sample j belongs to state row rows[j]."""

    rows: torch.Tensor  # [samples] int64
    last: torch.Tensor  # [samples] int64, the token of the step whose logits it is drawn from
    temperature: torch.Tensor  # [samples] float32
    top_k: torch.Tensor  # [samples] int64
    top_p: torch.Tensor  # [samples] float64
    min_p: torch.Tensor  # [samples] float64
    seeds: torch.Tensor  # [samples] int64
    positions: torch.Tensor  # [samples] int64, where the drawn token will stand

    @classmethod
    def empty(cls, count: int, device: torch.device) -> SampleInputs:
        def made(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        whole, wide = torch.int64, torch.float64
        return cls(*map(made, (whole, whole, torch.float32, whole, wide, wide, whole, whole)))

    def first(self, count: int) -> SampleInputs:
        """Views of the first samples."""
        return SampleInputs(*(getattr(self, name)[:count] for name in self.__slots__))

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """As the op `sample` takes them after the logits."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.seeds, self.positions


def packed_size(rows: int, tokens: int, samples: int) -> int:
    """Numbers that a step of at most so many rows, tokens and samples is packed into."""
    return HEADER + 3 * rows + 1 + 2 * samples + tokens


def prepare_step_reference(packed: torch.Tensor, tables: StateTables, inputs: StepInputs, samples: SampleInputs) -> None:
    """Fill `inputs` and `samples` from packed int32: header, state rows, starts and query starts of the rows, batch rows and state
    rows of the samples, token ids (-1: the row's newest). Each part has the size of what it fills; the header says how much counts.

    Rows past those that count are to have no tokens. Tokens past those of the rows are given no slot (-1), and samples past those that
    count the spare row: a graph of a step stays right with fewer of each. A token's position is its row's start and its place in the row.
    """
    size, count, block_size = len(inputs.context_lens), len(samples.rows), inputs.block_size
    rows_n, _, samples_n = packed[:3].tolist()
    parts = packed[HEADER : packed_size(size, len(inputs.tokens), count)]
    rows, starts, ends, sample_index, sample_rows, tokens = parts.split([size, size, size + 1, count, count, len(inputs.tokens)])
    live = torch.arange(size, device=packed.device) < rows_n
    rows, starts = torch.where(live, rows, tables.spare).long(), torch.where(live, starts, 0)
    counts = ends.diff()
    inputs.query_starts.copy_(ends)
    inputs.context_lens.copy_(torch.where(live, starts + counts, 0))
    of_token = torch.repeat_interleave(torch.arange(size, device=packed.device), counts.long())
    owned, tokens = len(of_token), tokens[: len(of_token)]
    positions = torch.arange(owned, device=packed.device) - ends[of_token] + starts[of_token]
    inputs.positions.zero_()[:owned] = positions
    inputs.tokens.zero_()[:owned] = torch.where(tokens < 0, tables.newest[rows[of_token]].int(), tokens).long()
    inputs.slots.fill_(-1)[:owned] = tables.blocks[rows[of_token], positions // block_size].long() * block_size + positions % block_size
    if inputs.lengths is not None:
        inputs.lengths.fill_(1)[:owned] = torch.maximum(tables.anchors[rows[of_token]].long(), positions + 1)
    inputs.block_tables.copy_(tables.blocks[rows, : inputs.block_tables.shape[1]])
    live = torch.arange(count, device=packed.device) < samples_n
    state, index = torch.where(live, sample_rows, tables.spare).long(), torch.where(live, sample_index, 0).long()
    samples.rows.copy_(state)
    samples.last.copy_(torch.where(live, ends[index + 1] - 1, 0))
    samples.positions.copy_(torch.where(live, inputs.context_lens[index], 0))
    samples.temperature.copy_(tables.temperature[state])
    samples.top_k.copy_(tables.top_k[state])
    for name in ("top_p", "min_p", "seeds"):
        getattr(samples, name).copy_(getattr(tables, name)[state])


def prepare_step(packed: torch.Tensor, tables: StateTables, inputs: StepInputs, samples: SampleInputs) -> None:
    """As prepare_step_reference: a program for each row and each sample."""
    size, count = len(inputs.context_lens), len(samples.rows)
    prepare_step_kernel[(max(size, count),)](
        packed, tables.blocks, tables.newest, tables.anchors, tables.parameters, tables.parameters.view(torch.float64),
        inputs.tokens, inputs.positions, inputs.slots, inputs.lengths, inputs.block_tables, inputs.query_starts, inputs.context_lens,
        samples.rows, samples.last, samples.temperature, samples.top_k, samples.top_p, samples.min_p, samples.seeds, samples.positions,
        size, len(inputs.tokens), count, tables.spare, tables.blocks.stride(0), inputs.block_tables.stride(0),
        block_size=inputs.block_size, tile=_TILE if len(inputs.tokens) > size else 16, num_warps=1, **chained(packed.device),
    )  # fmt: skip


@jit(do_not_specialize=("size", "tokens", "samples", "spare", "table_stride", "out_stride"))
def prepare_step_kernel(
    p_packed: tl.tensor,
    p_blocks: tl.tensor,
    p_newest: tl.tensor,
    p_anchors: tl.tensor,
    p_whole: tl.tensor,
    p_wide: tl.tensor,
    p_tokens: tl.tensor,
    p_positions: tl.tensor,
    p_slots: tl.tensor,
    p_lengths: tl.tensor | None,
    p_tables: tl.tensor,
    p_starts: tl.tensor,
    p_contexts: tl.tensor,
    p_sample_rows: tl.tensor,
    p_last: tl.tensor,
    p_temperature: tl.tensor,
    p_top_k: tl.tensor,
    p_top_p: tl.tensor,
    p_min_p: tl.tensor,
    p_seeds: tl.tensor,
    p_sample_positions: tl.tensor,
    size: int,
    tokens: int,
    samples: int,
    spare: tl.tensor,
    table_stride: int,
    out_stride: int,
    block_size: tl.constexpr,
    tile: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    i = tl.program_id(0)
    p_rows = p_packed + 8
    p_ends = p_rows + 2 * size
    p_index = p_ends + size + 1
    p_ids = p_index + 2 * samples
    o = tl.arange(0, tile)
    if i < size:
        live = i < tl.load(p_packed)
        row = tl.load(p_rows + i) if live else spare
        start = tl.load(p_rows + size + i) if live else 0
        begin, end = tl.load(p_ends + i), tl.load(p_ends + i + 1)
        context = start + end - begin if live else 0
        tl.store(p_starts + i, begin)
        if i == size - 1:
            tl.store(p_starts + size, end)
        tl.store(p_contexts + i, context)
        p_row = p_blocks + row.to(tl.int64) * table_stride
        newest = tl.load(p_newest + row)
        anchor = tl.load(p_anchors + row)
        for first in range(begin, end, tile):
            o_token = first + o
            m = o_token < end
            position = start + o_token - begin
            token = tl.load(p_ids + o_token, mask=m, other=0)
            block = tl.load(p_row + position // block_size, mask=m, other=0).to(tl.int64)
            tl.store(p_tokens + o_token, tl.where(token < 0, newest, token.to(tl.int64)), mask=m)
            tl.store(p_positions + o_token, position.to(tl.int64), mask=m)
            tl.store(p_slots + o_token, block * block_size + position % block_size, mask=m)
            if p_lengths is not None:
                tl.store(p_lengths + o_token, tl.maximum(anchor, position + 1).to(tl.int64), mask=m)
        for first in range(end if i == size - 1 else tokens, tokens, tile):  # nobody's
            o_token = first + o
            m = o_token < tokens
            tl.store(p_tokens + o_token, o_token.to(tl.int64) * 0, mask=m)
            tl.store(p_positions + o_token, o_token.to(tl.int64) * 0, mask=m)
            tl.store(p_slots + o_token, o_token.to(tl.int64) * 0 - 1, mask=m)
            if p_lengths is not None:
                tl.store(p_lengths + o_token, o_token.to(tl.int64) * 0 + 1, mask=m)
        columns = tl.cdiv(context, block_size)
        p_table = p_tables + i.to(tl.int64) * out_stride
        for first in range(0, columns, 128):
            o_column = first + tl.arange(0, 128)
            m = o_column < columns
            tl.store(p_table + o_column, tl.load(p_row + o_column, mask=m), mask=m)
    if i < samples:
        live = i < tl.load(p_packed + 2)
        row = (tl.load(p_index + samples + i) if live else spare).to(tl.int64)
        index = tl.load(p_index + i) if live else 0
        begin, end = tl.load(p_ends + index), tl.load(p_ends + index + 1)
        start = tl.load(p_rows + size + index) if live else 0
        tl.store(p_sample_rows + i, row)
        tl.store(p_last + i, tl.where(live, end - 1, 0).to(tl.int64))
        tl.store(p_sample_positions + i, tl.where(live, start + end - begin, 0).to(tl.int64))
        first = tl.load(p_whole + row * 4)  # temperature in the low half, top_k in the high one
        tl.store(p_temperature + i, first.to(tl.int32).to(tl.float32, bitcast=True))
        tl.store(p_top_k + i, first >> 32)
        tl.store(p_top_p + i, tl.load(p_wide + row * 4 + 1))
        tl.store(p_min_p + i, tl.load(p_wide + row * 4 + 2))
        tl.store(p_seeds + i, tl.load(p_whole + row * 4 + 3))

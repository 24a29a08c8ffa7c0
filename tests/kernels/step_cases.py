"""Steps for the kernels that prepare and keep them, for the interpreter and for a GPU alike."""

from __future__ import annotations

import numpy as np
import torch

from nbengine.batch import NewRow
from nbengine.kernels.keep_drawn import keep_drawn, keep_drawn_reference
from nbengine.kernels.prepare_step import HEADER, SampleInputs, packed_size, prepare_step, prepare_step_reference
from nbengine.kernels.update_tables import update_tables, update_tables_reference
from nbengine.sampling_params import SamplingParams
from nbengine.state_tables import StateTables, packed_rows
from nbengine.step_inputs import StepInputs

ROWS, COLUMNS, BLOCK = 9, 40, 16


def tables(device: str) -> StateTables:
    """Every row has its own parameters, newest token, anchor and blocks."""
    made = StateTables(ROWS, COLUMNS, torch.device(device))
    made.blocks[:] = torch.arange(ROWS * COLUMNS + COLUMNS).view(ROWS + 1, COLUMNS).flip(0) % 300
    made.newest[:] = torch.arange(ROWS + 1) + 500
    made.anchors[:] = torch.arange(ROWS + 1) * 37
    admitted = [
        NewRow(
            row, [1], [], SamplingParams(temperature=0.1 + row, top_k=row, top_p=1 / (row + 1.5), min_p=row / 100), 2**63 + row**9, 7 * row
        )
        for row in range(ROWS)
    ]
    packed = torch.from_numpy(packed_rows(admitted)).ravel().to(device)
    update_tables_reference(torch.tensor([0, 0, 0, ROWS, 0]), packed, made, ROWS)
    return made


def check_updates(device: str) -> None:
    new = [NewRow(row, [1], [], SamplingParams(temperature=row, top_k=3, min_p=0.25), -row, row) for row in (4, 0, 7)]
    writes = np.array([(row, column, row * 100 + column) for row in range(ROWS) for column in range(0, COLUMNS, 2)], np.int32)
    packed = torch.from_numpy(np.concatenate((packed_rows(new).ravel(), writes.ravel()))).to(device)
    expected, got = tables(device), tables(device)
    step = torch.tensor([0, 0, 0, len(new), len(writes)], dtype=torch.int32, device=device)
    update_tables_reference(step, packed, expected, len(writes))
    update_tables(step, packed, got, len(writes))
    for name in ("blocks", "anchors", "parameters"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.temperature[[4, 0, 7]].tolist() == [4, 0, 7]
    assert got.seeds[[4, 0, 7]].tolist() == [-4, 0, -7]
    assert int(got.blocks[8, 38]) == 838


def check_keeping(device: str) -> None:
    drawn, rows = torch.tensor([5, -1, 9, 0], device=device), torch.tensor([3, 1, 8, 9], device=device)
    counts, slots = torch.zeros(3, 10, dtype=torch.int32, device=device), torch.tensor([2, 0, -1, 1], device=device)
    for keep in (keep_drawn_reference, keep_drawn):
        newest, own = torch.full((10,), 77, device=device), counts.clone()
        keep(drawn, rows, newest, own, slots)
        assert newest.tolist() == [77, 0, 77, 5, 77, 77, 77, 77, 9, 0]
        assert own.nonzero().tolist() == [[1, 0], [2, 5]]
        keep(drawn, rows, newest)


def packed(
    rows: list[tuple[int, int, int]], samples: list[tuple[int, int]], size: int, tokens: int, count: int, device: str
) -> torch.Tensor:
    """A step of rows (state row, start, tokens) and samples (batch row, state row), packed into parts of these sizes."""
    array = np.full(packed_size(size, tokens, count) + 5, -99, np.int32)
    counts = [n for _, _, n in rows]
    ends = np.cumsum([0, *counts, *[0] * (size - len(rows))])
    array[:3] = len(rows), sum(counts), len(samples)
    ids = [-1 if n == 1 and row % 2 else 1000 + i for row, _, n in rows for i in range(n)]
    at = HEADER
    for values, room in (
        ([row for row, _, _ in rows], size),
        ([start for _, start, _ in rows], size),
        (ends, size + 1),
        ([row for row, _ in samples], count),
        ([row for _, row in samples], count),
        (ids, tokens),
    ):
        array[at : at + len(values)] = values
        at += room
    return torch.from_numpy(array).to(device)


def filled(size: int, tokens: int, count: int, device: str, *, lengths: bool) -> tuple[StepInputs, SampleInputs]:
    """What is to be written, poisoned."""

    def bad(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, -12345, dtype=dtype, device=device)

    inputs = StepInputs(
        tokens=bad(tokens), positions=bad(tokens), slots=bad(tokens), block_tables=bad(size, COLUMNS, dtype=torch.int32),
        query_starts=bad(size + 1, dtype=torch.int32), context_lens=bad(size, dtype=torch.int32), block_size=BLOCK, query_lens_host=[],
        context_lens_host=[], lengths=bad(tokens) if lengths else None,
    )  # fmt: skip
    samples = SampleInputs.empty(count, torch.device(device))
    for name in SampleInputs.__slots__:
        getattr(samples, name).fill_(-77)
    return inputs, samples


DECODES = [(3, 17, 1), (8, 0, 1), (1, 255, 1), (4, 256, 1)]
MIXED = [(3, 17, 1), (8, 0, 130), (5, 300, 33), (1, 31, 1), (0, 0, 2)]


def check_preparing(device: str) -> None:
    for rows, size, tokens, samples, count, lengths in (
        (DECODES, 4, 4, [(i, row) for i, (row, _, _) in enumerate(DECODES)], 4, False),
        (DECODES, 8, 8, [(i, row) for i, (row, _, _) in enumerate(DECODES)], 8, True),
        (MIXED, 5, 167, [(0, 3), (1, 8), (1, 7), (4, 0)], 4, True),
        (MIXED, 5, 512, [(0, 3), (1, 8), (1, 7), (4, 0)], 5, True),
        (MIXED, 8, 192, [(0, 3)], 8, False),
        (MIXED, 5, 167, [], 0, False),
        ([], 1, 16, [], 1, True),
    ):
        step = packed(rows, samples, size, tokens, count, device)
        expected, got = (filled(size, tokens, count, device, lengths=lengths) for _ in range(2))
        prepare_step_reference(step, tables(device), *expected)
        prepare_step(step, tables(device), *got)
        for name in ("tokens", "positions", "slots", "query_starts", "context_lens", "lengths"):
            one, other = getattr(got[0], name), getattr(expected[0], name)
            assert (one is None and other is None) or torch.equal(one, other), (name, one, other)
        for i, (_, start, n) in enumerate(rows):
            columns = -(-(start + n) // BLOCK)
            assert torch.equal(got[0].block_tables[i, :columns], expected[0].block_tables[i, :columns])
        for name in SampleInputs.__slots__:
            assert torch.equal(getattr(got[1], name), getattr(expected[1], name)), name
        assert got[0].slots[sum(n for _, _, n in rows) :].tolist() == [-1] * (tokens - sum(n for _, _, n in rows))

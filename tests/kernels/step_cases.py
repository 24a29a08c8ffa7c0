"""Steps for the kernels that prepare and keep them, for the interpreter and for a GPU alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from nbengine.batch import NewRow
from nbengine.kernels.keep_drawn import keep_drawn
from nbengine.kernels.prepare_step import HEADER, SampleInputs, packed_size, prepare_step, prepare_step_reference
from nbengine.kernels.update_tables import update_tables, update_tables_reference
from nbengine.sampling_params import SamplingParams
from nbengine.state_tables import StateTables, packed_rows
from nbengine.step_inputs import StepInputs

Op = Callable[..., None]
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
    packed = torch.from_numpy(np.array(packed_rows(admitted))).to(device)
    update_tables_reference(torch.tensor([0, 0, 0, ROWS, 0]), packed, made, ROWS)
    return made


def check_updates(device: str, update: Op = update_tables) -> None:
    new = [NewRow(row, [1], [], SamplingParams(temperature=row, top_k=3, min_p=0.25), -row, row) for row in (4, 0, 7)]
    writes = np.array([(row, column, row * 100 + column) for row in range(ROWS) for column in range(0, COLUMNS, 2)], np.int32)
    packed = torch.from_numpy(np.concatenate((np.array(packed_rows(new)), writes.ravel()))).to(device)
    expected, got = tables(device), tables(device)
    step = torch.tensor([0, 0, 0, len(new), len(writes)], dtype=torch.int32, device=device)
    update_tables_reference(step, packed, expected, len(writes))
    update(step, packed, got, len(writes))
    for name in ("blocks", "anchors", "parameters"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.temperature[[4, 0, 7]].tolist() == [4, 0, 7]
    assert got.seeds[[4, 0, 7]].tolist() == [-4, 0, -7]
    assert int(got.blocks[8, 38]) == 838


def check_keeping(device: str, keep: Op = keep_drawn) -> None:
    drawn, rows = torch.tensor([5, -1, 9, 0], device=device), torch.tensor([3, 1, 8, 9], device=device)
    counts, slots = torch.zeros(3, 10, dtype=torch.int32, device=device), torch.tensor([2, 0, -1, 1], device=device)
    newest = torch.full((10,), 77, device=device)
    keep(drawn, rows, newest, counts, slots)
    assert newest.tolist() == [77, 0, 77, 5, 77, 77, 77, 77, 9, 0]
    assert counts.nonzero().tolist() == [[1, 0], [2, 5]]
    newest.fill_(77)
    keep(drawn, rows, newest)
    assert newest.tolist() == [77, 0, 77, 5, 77, 77, 77, 77, 9, 0]


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


def check_preparing(device: str, prepare: Op = prepare_step) -> None:
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
        prepare(step, tables(device), *got)
        for name in ("tokens", "positions", "slots", "query_starts", "context_lens", "lengths"):
            one, other = getattr(got[0], name), getattr(expected[0], name)
            assert (one is None and other is None) or torch.equal(one, other), (name, one, other)
        for i, (_, start, n) in enumerate(rows):
            columns = -(-(start + n) // BLOCK)
            assert torch.equal(got[0].block_tables[i, :columns], expected[0].block_tables[i, :columns])
        for name in SampleInputs.__slots__:
            assert torch.equal(getattr(got[1], name), getattr(expected[1], name)), name
        assert got[0].slots[sum(n for _, _, n in rows) :].tolist() == [-1] * (tokens - sum(n for _, _, n in rows))


# ── kernels gone wrong, each of which its check must find ───────────────────────────────────────────────────────────────


def one_write_less(step: torch.Tensor, packed: torch.Tensor, tables: StateTables, most: int) -> None:
    update_tables(step - torch.tensor([0, 0, 0, 0, 1], dtype=torch.int32, device=step.device), packed, tables, most)


def new_row_in_anothers_place(step: torch.Tensor, packed: torch.Tensor, tables: StateTables, most: int) -> None:
    packed = packed.clone()
    packed[0] += 1
    update_tables(step, packed, tables, most)


def writes_in_the_next_column(step: torch.Tensor, packed: torch.Tensor, tables: StateTables, most: int) -> None:
    update_tables(step, packed, tables, most)
    tables.blocks.copy_(tables.blocks.roll(1, 1))


def permuted_page_table(packed: torch.Tensor, tables: StateTables, inputs: StepInputs, samples: SampleInputs) -> None:
    prepare_step(packed, tables, inputs, samples)
    inputs.block_tables[:, :2] = inputs.block_tables[:, :2].flip(1)


def slots_of_a_permuted_page_table(packed: torch.Tensor, tables: StateTables, inputs: StepInputs, samples: SampleInputs) -> None:
    blocks = tables.blocks.clone()
    tables.blocks[:, :2] = blocks[:, :2].flip(1)
    prepare_step(packed, tables, inputs, samples)
    inputs.block_tables[:, :2] = inputs.block_tables[:, :2].flip(1)


def one_row_less(packed: torch.Tensor, tables: StateTables, inputs: StepInputs, samples: SampleInputs) -> None:
    packed = packed.clone()
    packed[0] -= 1
    prepare_step(packed, tables, inputs, samples)


def newest_of_another_row(packed: torch.Tensor, tables: StateTables, inputs: StepInputs, samples: SampleInputs) -> None:
    tables.newest.copy_(tables.newest.roll(1))
    prepare_step(packed, tables, inputs, samples)


def parameters_of_another_row(packed: torch.Tensor, tables: StateTables, inputs: StepInputs, samples: SampleInputs) -> None:
    tables.parameters.copy_(tables.parameters.roll(1, 0))
    prepare_step(packed, tables, inputs, samples)


def one_drawn_less(drawn: torch.Tensor, rows: torch.Tensor, newest: torch.Tensor, *counted: torch.Tensor) -> None:
    keep_drawn(drawn[1:], rows[1:], newest, *(counted[:1]), *(slots[1:] for slots in counted[1:]))


def kept_in_anothers_row(drawn: torch.Tensor, rows: torch.Tensor, newest: torch.Tensor, *counted: torch.Tensor) -> None:
    keep_drawn(drawn, rows.roll(1), newest, *counted)


def counted_for_another(drawn: torch.Tensor, rows: torch.Tensor, newest: torch.Tensor, *counted: torch.Tensor) -> None:
    keep_drawn(drawn, rows, newest, *counted[:1], *(slots.roll(1) for slots in counted[1:]))


MUTANTS: list[tuple[Callable[[str, Op], None], Op]] = [
    *((check_updates, op) for op in (one_write_less, new_row_in_anothers_place, writes_in_the_next_column)),
    *((check_preparing, op) for op in (permuted_page_table, slots_of_a_permuted_page_table, one_row_less)),
    *((check_preparing, op) for op in (newest_of_another_row, parameters_of_another_row)),
    *((check_keeping, op) for op in (one_drawn_less, kept_in_anothers_row, counted_for_another)),
]

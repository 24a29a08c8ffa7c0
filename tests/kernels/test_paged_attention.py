"""Against softmax(q k / sqrt d) v written out, query by query and head by head, in numpy's float64 over unpaged keys."""

import copy

import numpy as np
import pytest
import torch

from nbengine.kernels import paged_attention as module
from nbengine.kernels.paged_attention import paged_attention_reference
from nbengine.step_inputs import LayerCache, StepInputs


class Step:
    """Rows [(queries, context)] over shuffled pages of a cache that holds NaN wherever no row has a token."""

    def __init__(self, rows, *, heads=6, kv_heads=2, head_dim=16, block_size=16, dtype=torch.float32, seed=0, in_order=False):
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.heads, self.kv_heads, self.head_dim = rows, heads, kv_heads, head_dim
        needed = [-(-context // block_size) for _, context in rows]
        total = sum(needed) + 3
        pages = torch.arange(total) if in_order else torch.randperm(total, generator=generator)
        self.cache = LayerCache(*torch.full((2, total, block_size, kv_heads, head_dim), float("nan"), dtype=dtype))
        tables = pages[-1].repeat(len(rows), max(needed) + 1).int()  # past its context a row's table names a page full of NaN
        flat_keys, flat_values = (t.view(-1, kv_heads, head_dim) for t in (self.cache.keys, self.cache.values))
        self.keys, self.values, slots, positions, taken = [], [], [], [], 0
        for row, (count, context) in enumerate(rows):
            own = pages[taken : taken + needed[row]]
            taken += needed[row]
            tables[row, : len(own)] = own.int()
            where = own[torch.arange(context) // block_size] * block_size + torch.arange(context) % block_size
            k, v = (torch.randn(context, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
            flat_keys[where], flat_values[where] = k, v
            self.keys.append(np.asarray(k.double()))
            self.values.append(np.asarray(v.double()))
            slots.append(where[context - count :])
            positions.append(torch.arange(context - count, context))
        counts, contexts = [count for count, _ in rows], [context for _, context in rows]
        self.q = (torch.randn(sum(counts), heads, head_dim, generator=generator) * 2).to(dtype)
        self.inputs = StepInputs(
            tokens=torch.zeros(sum(counts), dtype=torch.int64),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            block_tables=tables,
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            context_lens=torch.tensor(contexts).int(),
            block_size=block_size,
            query_lens_host=counts,
            context_lens_host=contexts,
        )

    def run(self, scale=0.3, window=None, softcap=None):
        return paged_attention_reference(self.q, self.cache, self.inputs, scale, window, softcap)

    def by_hand(self, scale=0.3, window=None, softcap=None):
        out, token = np.zeros(self.q.shape), 0
        for (count, context), keys, values in zip(self.rows, self.keys, self.values, strict=True):
            for position in range(context - count, context):
                first = max(0, position + 1 - window) if window else 0
                for head in range(self.heads):
                    source = head * self.kv_heads // self.heads
                    scores = keys[first : position + 1, source] @ np.asarray(self.q[token, head].double()) * scale
                    if softcap:
                        scores = softcap * np.tanh(scores / softcap)
                    weights = np.exp(scores - scores.max())
                    out[token, head] = weights @ values[first : position + 1, source] / weights.sum()
                token += 1
        return out.reshape(len(out), -1)


def relative_rms(got, expected):
    got = np.asarray(got.double())
    return np.sqrt(np.square(got - expected).mean() / np.square(expected).mean())


MIXES = {
    "one decode": [(1, 63)],
    "one token": [(1, 1)],
    "decodes of one length": [(1, 40)] * 3,
    "decodes of like length": [(1, 100), (1, 90), (1, 63), (1, 64), (1, 65)],
    "decodes of very unlike length": [(1, 1000), (1, 1), (1, 63), (1, 5), (1, 470)],
    "a whole prompt": [(63, 63)],
    "a chunk after a cached prefix": [(17, 80)],
    "mixed": [(1, 63), (30, 30), (1, 7), (5, 64), (1, 1), (2, 130)],
}


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (24, None), (None, 3.0), (7, 3.0), (1, None)])
def test_equals_attention_by_hand_in_float64(rows, block_size, window, softcap):
    step = Step(rows, block_size=block_size)
    got = step.run(window=window, softcap=softcap)
    assert got.is_contiguous()
    assert relative_rms(got, step.by_hand(window=window, softcap=softcap)) < 2e-6


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (9, 3, 63), (8, 1, 1), (7, 7, 5)])
def test_every_grouping_of_heads(heads, kv_heads, head_dim):
    step = Step(MIXES["mixed"], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    assert relative_rms(step.run(), step.by_hand()) < 2e-6


@pytest.mark.parametrize("rows", [[(1000, 1000)], [(300, 1000), (1, 1000)], [(257, 259)]])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (63, None), (300, 5.0)])
def test_long_prompts_and_chunks_of_several_tiles(rows, window, softcap):
    step = Step(rows, heads=2, kv_heads=1)
    assert relative_rms(step.run(window=window, softcap=softcap), step.by_hand(window=window, softcap=softcap)) < 2e-6


def test_pages_in_order_are_read_in_place():
    for rows in ([(1, 100)], [(40, 100)], [(1, 63), (9, 40)]):
        step = Step(rows, in_order=True)
        for window in (None, 20):
            assert relative_rms(step.run(window=window), step.by_hand(window=window)) < 2e-6


def test_small_memory_bounds_change_nothing(monkeypatch):
    monkeypatch.setattr(module, "_GROUP_SLOTS", 50)
    monkeypatch.setattr(module, "_TILE_SCORES", 700)
    for rows in MIXES.values():
        step = Step(rows)
        assert relative_rms(step.run(window=40), step.by_hand(window=40)) < 2e-6


def test_one_long_row_among_short_ones_does_not_widen_them():
    groups = module._groups(list(range(64)), [30000] + [40] * 63, None)
    assert sum(len(group) * max([30000] + [40] * 63 if 0 in group else [40]) for group in groups) < 2 * (30000 + 63 * 40)


def test_queries_that_are_a_view_of_a_larger_tensor_are_read_right():
    step = Step(MIXES["mixed"])
    expected = step.run()
    step.q = torch.cat((step.q, torch.full_like(step.q, float("nan"))), dim=1)[:, : step.heads]
    assert torch.equal(step.run(), expected)


def test_bfloat16_stays_close():
    step = Step(MIXES["mixed"], dtype=torch.bfloat16)
    assert relative_rms(step.run(), step.by_hand()) < 1e-2


def test_windows_of_two_layers_do_not_mix_in_one_step():
    step = Step(MIXES["mixed"])
    for window in (None, 9, None, 30, 9):
        assert relative_rms(step.run(window=window), step.by_hand(window=window)) < 2e-6


def test_a_row_does_not_change_with_those_beside_it():
    rows = [(1, 63), (1, 300), (30, 30), (5, 64)]
    together = Step(rows)
    got, token = together.run(), 0
    for row, (count, context) in enumerate(rows):
        inputs, of_row = together.inputs, slice(token, token + count)
        alone = StepInputs(
            inputs.tokens[of_row], inputs.positions[of_row], inputs.slots[of_row], inputs.block_tables[row : row + 1],
            torch.tensor([0, count]).int(), torch.tensor([context]).int(), inputs.block_size, [count], [context],
        )  # fmt: skip
        single = paged_attention_reference(together.q[of_row], together.cache, alone, 0.3)
        assert (single - got[of_row]).abs().max() < 1e-6
        token += count


@pytest.mark.parametrize("rows", [[(1, 63)], [(1, 100), (1, 90)], [(17, 80)]])
def test_a_wrong_page_or_a_dropped_tail_would_be_seen(rows):
    step = Step(rows)
    expected = step.by_hand()
    doubled = copy.deepcopy(step)
    doubled.inputs.block_tables[:, 0] = doubled.inputs.block_tables[:, 1]
    last = copy.deepcopy(step)  # full pages may change places without a trace, but not one that is partly filled
    tail = (rows[0][1] - 1) // 16
    last.inputs.block_tables[0, [0, tail]] = last.inputs.block_tables[0, [tail, 0]]
    cut = copy.deepcopy(step)
    cut.inputs.context_lens_host = [context - 1 for context in cut.inputs.context_lens_host]
    for broken in (doubled, last, cut):
        assert not relative_rms(broken.run(), expected) < 1e-3  # right is 1e-6; NaN is wrong too


def test_pages_swapped_between_rows_would_be_seen():
    step = Step([(1, 100), (1, 90)])
    step.inputs.block_tables[[0, 1], [2, 2]] = step.inputs.block_tables[[1, 0], [2, 2]]
    assert relative_rms(step.run(), step.by_hand()) > 1e-2


def test_swapped_pages_would_be_seen_through_a_window():
    step = Step([(1, 100)])
    step.inputs.block_tables[0, [0, 5]] = step.inputs.block_tables[0, [5, 0]]
    assert relative_rms(step.run(window=40), step.by_hand(window=40)) > 1e-2

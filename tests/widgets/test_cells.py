"""What a block table is sent equals the pool, at every recorded step of random schedules, whichever way the moment was come to."""

from __future__ import annotations

import itertools
import random
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_model import Simulation, storm

from nbengine.blocks import BlockPool
from nbengine.pool_state import PoolState
from nbengine.trace import StepRecord, Trace
from nbengine.widgets.cells import EMPTY, MOST_CELLS, SEVERAL, Cells
from nbengine.widgets.followed_pool import CACHED, COPIED, HELD, SHARED


def seen(cells):
    """Everything that is drawn of each block, from what a view is sent: (state, flags, owner, slots)."""
    state = cells.encode()
    size, count = cells.trace.block_size, cells.num_blocks
    assert state["group"] == 1
    owners = np.frombuffer(state["data"][: 2 * count], np.uint16)
    kinds = np.frombuffer(state["data"][2 * count :], np.uint8)
    partial = dict(zip(state["partial"][::2], state["partial"][1::2], strict=True))
    drawn = []
    for block in range(count):
        kind = int(kinds[block])
        full = kind & (HELD | CACHED) and not kind & EMPTY
        drawn.append((kind & ~EMPTY, int(owners[block]), partial.get(block, size if full else 0)))
    return drawn


def assert_is(cells, pool):
    """The cells are what a pool, rebuilt by itself, is."""
    holders = {}
    for uid, table in pool.tables.items():
        for block in table:
            holders.setdefault(block, []).append(uid)
    assert (cells.hashes, cells.tables, cells.copied) == (pool.hashes, pool.tables, pool.copied)
    assert [sorted(cells.holders(block)) for block in range(cells.num_blocks)] == [
        sorted(holders.get(b, [])) for b in range(len(pool.hashes))
    ]
    for block, kind in enumerate(cells.kinds):
        assert bool(kind & HELD) == (pool.references[block] > 0)
        assert bool(kind & SHARED) == (pool.references[block] > 1)
        assert bool(kind & CACHED) == (block in pool.cached)
        assert bool(kind & COPIED) == (block in pool.copied)


def truth(pool, running, computed):
    """The same from the engine's own pool and sequences."""
    holders = {}
    for uid, sequence in running.items():
        for i, block in enumerate(sequence.blocks):
            holders.setdefault(block, []).append((uid, i))
    drawn = []
    for block in range(pool.num_blocks):
        if block not in holders:
            cached = block in pool.cached
            drawn.append((CACHED if cached else 0, {0}, pool.block_size if cached else 0))
            continue
        flags = HELD | (SHARED if pool.references[block] > 1 else 0) | (COPIED if block in pool.copied else 0)
        slots = max(computed[uid] - i * pool.block_size for uid, i in holders[block])
        full = pool.hashes[block] is not None
        drawn.append((flags, {uid for uid, _ in holders[block]}, pool.block_size if full else min(max(slots, 0), pool.block_size)))
    return drawn


def same(drawn, expected):
    return [(kind, slots) for kind, _, slots in drawn] == [(kind, slots) for kind, _, slots in expected] and all(
        owner in owners for (_, owner, _), (_, owners, _) in zip(drawn, expected, strict=True)
    )


def told(trace, number, expected):
    """What is expected as far as the trace tells it: the blocks of who has not run since its oldest record count as written."""
    heard = {uid for record in trace.since(trace.first)[: number - trace.first + 1] for uid in (*record.uids, *record.admitted)}
    return [(kind, owners, trace.block_size if kind & HELD and owners - heard else slots) for kind, owners, slots in expected]


def record_truth(sim):
    """Note what the pool is at each record that is made from now on."""
    noted = []
    trace_add = sim.core.trace.add
    written = {}

    def noting(record, pool, running):
        trace_add(record, pool, running)
        for uid, start, count in zip(record.uids, record.starts, record.counts, strict=True):
            written[uid] = start + count
        for uid, sequence in running.items():
            if uid in record.admitted and uid not in record.uids:
                written[uid] = sequence.prompt_len
        noted.append(truth(pool, running, {uid: written.get(uid, 0) for uid in running}))

    sim.core.trace.add = noting
    return noted


@st.composite
def schedules(draw):
    rng = random.Random(draw(st.integers(0, 10**9)))
    size = draw(st.sampled_from([1, 2, 4]))
    sim = Simulation(
        num_blocks=draw(st.integers(5, 14)), block_size=size, max_num_seqs=draw(st.integers(1, 5)), budget=draw(st.integers(2, 12)),
        trace_steps=draw(st.sampled_from([16, 64, 4096])), prefix_caching=draw(st.booleans()),
    )  # fmt: skip
    noted = record_truth(sim)
    for _ in range(draw(st.integers(5, 60))):
        chance = rng.random()
        if chance < 0.4 and len(sim.alive) < 6:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, min(18, sim.capacity - 1)))]
            tokens = min(rng.randrange(1, 9), sim.capacity - len(prompt))
            sim.add(prompt, tokens, n=rng.choice([1, 1, 3]), seed=rng.randrange(99))
        elif chance < 0.45 and sim.alive:
            sim.cancel(rng.choice(sim.alive))
        elif chance < 0.48:
            sim.forget()
        sim.step()
    return sim, noted, rng


@given(schedules())
@settings(max_examples=150)
def test_at_every_recorded_step_the_table_equals_the_pool(schedule):
    sim, noted, rng = schedule
    trace = sim.core.trace
    assert trace.end == len(noted)
    if trace.end == 0:
        return
    cells = Cells(trace)
    for number in range(trace.first, trace.end):  # forwards
        cells.seek(number)
        assert_is(cells, trace.state(number))
        assert same(seen(cells), told(trace, number, noted[number]))
    for number in (rng.randrange(trace.first, trace.end) for _ in range(12)):  # to and fro
        cells.seek(number)
        assert_is(cells, trace.state(number))
        assert same(seen(cells), told(trace, number, noted[number]))


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_it_follows_a_storm_live(seed):
    tables = []

    def follow(self):
        if self not in [sim for sim, _ in tables]:
            tables.append((self, Cells(self.core.trace)))
        cells = next(cells for sim, cells in tables if sim is self)
        checked(self)
        cells.seek(self.core.trace.end - 1)
        assert [len(cells.holders(block)) for block in range(cells.num_blocks)] == self.pool.references
        assert {b for b, k in enumerate(cells.kinds) if k & CACHED} == set(self.pool.cached)

    checked = Simulation.check
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simulation, "check", follow)
        storm(seed, 30)


class Holders:
    """Sequences that take, share, fill, copy, and let go of a pool's blocks at random, or see it emptied and resized; each time a record."""

    def __init__(self, seed, capacity):
        self.random = random.Random(seed)
        self.pool = BlockPool(12, 2)
        self.trace = Trace(self.pool, capacity)
        self.running = {}
        self.ids = itertools.count()

    def act(self):
        for _ in range(self.random.randrange(1, 4)):
            getattr(self, self.random.choice(["take", "take", "take", "share", "seal", "copy", "end", "end", "forget", "resize"]))()
        events = self.pool.take_events()
        self.trace.add(StepRecord(self.trace.end, float(self.trace.end), events=events), self.pool, self.running)

    def anyone(self, fork=False):
        if fork or not self.running or self.random.random() < 0.3:
            self.running[next(self.ids) + 65_530] = SimpleNamespace(blocks=[])
        return self.random.choice(list(self.running.items()))

    def take(self):
        uid, sequence = self.anyone()
        if self.pool.num_free:
            sequence.blocks.append(self.pool.take(uid))

    def share(self):
        uid, sequence = self.anyone(fork=True)
        found = [block for block, digest in enumerate(self.pool.hashes) if digest is not None and block not in sequence.blocks]
        for block in self.random.sample(found, min(2, len(found))):
            self.pool.share(block, uid)
            sequence.blocks.append(block)

    def seal(self):
        _, sequence = self.anyone()
        for block in sequence.blocks[:2]:
            self.pool.seal(block, self.random.randbytes(8))

    def copy(self):
        uid, sequence = self.anyone()
        if sequence.blocks and self.pool.num_free and self.pool.must_copy(sequence.blocks[-1]):
            sequence.blocks[-1] = self.pool.copy_on_write(sequence.blocks[-1], uid)

    def end(self):
        uid, sequence = self.anyone()
        for block in reversed(sequence.blocks):
            self.pool.free(block, uid)
        del self.running[uid]

    def forget(self):
        if self.random.random() < 0.3:
            self.pool.forget()

    def resize(self):
        if self.random.random() < 0.2:
            while self.running:
                self.end()
            self.pool.resize(self.random.randrange(6, 20))
            self.trace.num_blocks = self.pool.num_blocks


@given(st.integers(0, 10**9), st.sampled_from([8, 16, 4096]), st.sampled_from([1, 3, 256]))
@settings(max_examples=120)
def test_followed_live_looked_back_at_and_followed_again_it_is_the_pool_whatever_became_of_that(seed, capacity, far):
    holders = Holders(seed, capacity)
    trace, rng = holders.trace, random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbengine.widgets.followed_pool.FAR", far)
        cells = Cells(trace)
        for _ in range(60):
            for _ in range(rng.choice([1, 1, 2, 12, 40])):
                holders.act()
            cells.seek(trace.end - 1)
            assert_is(cells, PoolState.of(holders.pool, holders.running))
            if rng.random() < 0.3:
                number = rng.randrange(trace.first, trace.end)
                cells.seek(number)
                assert_is(cells, trace.state(number))
                fresh = Cells(trace)
                fresh.seek(number)
                assert cells.encode()["totals"]["held"] == fresh.encode()["totals"]["held"]
    assert trace.first > 0 or capacity > 1000


def test_a_table_that_forgets_an_event_is_caught():
    sim = Simulation(num_blocks=9)
    noted = record_truth(sim)
    sim.add([0, 1, 0, 1, 0], 6, n=3)
    while sim.core.has_work():
        sim.step()
    for spoiled in ("share", "copy", "free", "seal"):
        cells = Cells(sim.core.trace)
        wrong = False
        for number in range(sim.core.trace.end):
            record = sim.core.trace.record(number)
            kept = record.events
            try:
                record.events = [event for event in kept if event[0] != spoiled]
                cells.seek(number)
                wrong |= not same(seen(cells), noted[number])
            except (AssertionError, KeyError, ValueError):
                wrong = True
            finally:
                record.events = kept
            if wrong:
                break
        assert wrong, spoiled


def full_pool(blocks, sequences=256, block_size=16):
    """A trace of one record in which sequences of this many share out the pool."""
    pool = BlockPool(blocks, block_size)
    trace = Trace(pool, 64)
    each = blocks * 3 // 4 // sequences
    for uid in range(sequences):
        for _ in range(each):
            pool.take(uid + 70_000)
    uids = [uid + 70_000 for uid in range(sequences)]
    trace.add(StepRecord(0, 0.0, uids=uids, counts=[each * block_size - 3] * sequences, events=pool.take_events()), pool, {})
    for record in trace:
        record.starts.extend([0] * sequences)
    return trace, each


def test_a_pool_of_many_blocks_is_summarised_by_its_shares():
    trace, each = full_pool(40_000, sequences=100)
    cells = Cells(trace)
    cells.seek(0)
    state = cells.encode()
    group = state["group"]
    count = -(-40_000 // group)
    assert count <= 5000
    owners = np.frombuffer(state["data"][: 2 * count], np.uint16)
    shares = np.frombuffer(state["data"][2 * count :], np.uint8).reshape(5, count)
    held = np.zeros(count * group, bool)
    held[: each * 100] = True
    expected = held.reshape(count, group).sum(1)
    assert ((shares[0] == 255) == (expected == group)).all()
    assert ((shares[0] == 0) == (expected == 0)).all()
    for cell in range(0, count, 7):
        mine = {(70_000 + block // each) % SEVERAL for block in range(cell * group, (cell + 1) * group) if held[block]}
        assert int(owners[cell]) == (SEVERAL if len(mine) > 1 else next(iter(mine), 0))
    assert shares[4][: each * 100 // group].max() <= 255
    totals = cells.totals()
    assert totals["held"] == each * 100
    assert totals["slots"] == 100 * (each * 16 - 3)


@pytest.mark.parametrize("uid", [0, 65_534, 65_535, 65_536, 131_070])
def test_whoever_has_a_cell_alone_is_not_taken_for_several(uid):
    pool = BlockPool(20_000, 4)
    trace = Trace(pool, 64)
    blocks = [pool.take(uid) for _ in range(4)] + [pool.take(uid + 65_536) for _ in range(2)]
    trace.add(StepRecord(0, 0.0, uids=[uid], counts=[16], starts=array("i", [0]), events=pool.take_events()), pool, {})
    cells = Cells(trace)
    cells.seek(0)
    state = cells.encode()
    assert (blocks[3], state["group"]) == (3, 4)
    owners = np.frombuffer(state["data"][:4], np.uint16).tolist()
    assert owners == [uid % 65_535, (uid + 65_536) % 65_535]
    assert owners[0] != owners[1]


@given(st.integers(0, 10**6), st.integers(2, 5))
@settings(max_examples=40)
def test_cells_for_several_blocks_say_what_those_for_one_do(seed, most):
    holders = Holders(seed, 64)
    for _ in range(30):
        holders.act()
    cells = Cells(holders.trace)
    cells.seek(holders.trace.end - 1)
    size, single = cells.trace.block_size, seen(cells)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbengine.widgets.cells.MOST_CELLS", 1)
        patch.setattr("nbengine.widgets.cells.GROUPED_CELLS", most)
        state = cells.encode()
        group = cells.group
    count = -(-cells.num_blocks // group)
    owners = np.frombuffer(state["data"][: 2 * count], np.uint16)
    shares = np.frombuffer(state["data"][2 * count :], np.uint8).reshape(5, count)
    for cell in range(count):
        blocks = single[cell * group : (cell + 1) * group]
        mine = {owner for kind, owner, _ in blocks if kind & HELD}
        assert int(owners[cell]) == (SEVERAL if len(mine) > 1 else next(iter(mine), 0))
        parts = [sum(1 for kind, _, _ in blocks if kind & flag) / len(blocks) for flag in (HELD, SHARED, COPIED, CACHED)]
        parts.append(sum(slots for kind, _, slots in blocks if kind & HELD) / (len(blocks) * size))
        for share, part in zip(shares[:, cell].tolist(), parts, strict=True):
            assert abs(share - 255 * part) <= 1
            assert (share == 0, share == 255) == (part == 0, part == 1)


def test_ten_thousand_blocks_have_a_cell_each():
    trace, _ = full_pool(MOST_CELLS)
    cells = Cells(trace)
    cells.seek(0)
    assert cells.encode()["group"] == 1
    assert len(cells.encode()["data"]) == 30_000

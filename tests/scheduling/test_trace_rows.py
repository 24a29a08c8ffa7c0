"""Of each batch only what changes is gone through, and what is not gone through is a decode of somebody who ran before."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_model import Simulation
from test_trace_series import run, schedules

from nbengine.trace_columns import NAMES, Columns
from nbengine.trace_rows import KnownRows, Rows
from nbengine.widgets.lanes import Lanes


@settings(max_examples=60, deadline=None)
@given(schedules)
def test_rows_that_need_no_look_decode_again(schedule):
    trace = run(schedule).core.trace
    rows, before, decoded = Rows(trace), set(), set()
    for record in trace:
        places = rows.follow(record)
        before -= set(record.preempted)
        decoded -= set(record.preempted)
        if places is not None and record.uids:
            others = [i for i in range(len(record.uids)) if i not in places]
            assert all(record.counts[i] == 1 for i in others)
            assert {record.uids[i] for i in others} <= decoded
            assert before <= set(record.uids)  # nobody who ran before sits it out
        for uid, start, count in zip(record.uids, record.starts, record.counts, strict=True):
            if count == 1 and start >= trace.sequences[uid].prompt_len:
                decoded.add(uid)
        ended = {uid for uid, _ in record.finished}
        before = (set(record.uids) or before) - ended
        decoded -= ended


@settings(max_examples=40, deadline=None)
@given(schedules, st.integers(0, 10**6), st.sampled_from([16, 10_000]))
def test_several_who_follow_at_their_own_pace_find_the_same(schedule, seed, capacity):
    rng, own, numbers = random.Random(seed), {}, [0, 0]
    shared = first = None

    def read(trace):
        nonlocal shared, first
        if shared is None:
            shared, first = KnownRows(trace), Rows(trace)
        for i in rng.sample((0, 1), rng.randrange(3)):
            numbers[i] = max(numbers[i], trace.first)
            for record in trace.since(numbers[i])[: rng.randrange(40)]:
                places = shared.at(numbers[i], record)
                if numbers[i] in own:
                    assert places == own[numbers[i]]
                elif capacity > 16:
                    assert places == first.follow(record)
                own[numbers[i]] = places
                numbers[i] += 1

    run(schedule, capacity, read)


class AllRows(KnownRows):
    """Has every row gone through."""

    def follow(self, record):
        super().follow(record)
        return None if record.uids else ()


@settings(max_examples=60, deadline=None)
@given(schedules)
def test_going_through_all_rows_finds_the_same(schedule):
    trace = run(schedule).core.trace
    quick, lanes = Columns.of(trace), Lanes(trace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nbengine.trace_columns.KnownRows", AllRows)
        patch.setattr("nbengine.widgets.lanes.KnownRows", AllRows)
        slow, slow_lanes = Columns.of(trace), Lanes(trace)
    lanes.follow()
    slow_lanes.follow()
    assert lanes.lanes == slow_lanes.lanes
    for name in set(NAMES) - {"waited"}:
        assert quick[name].tolist() == slow[name].tolist(), name
    assert abs(quick["waited"] - slow["waited"]).max(initial=0) < 1e-9
    assert sorted(quick.first_tokens.T.tolist()) == sorted(slow.first_tokens.T.tolist())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_where_sequences_only_come_and_end_few_rows_are_gone_through(seed):
    rng = random.Random(seed)
    sim = Simulation(num_blocks=200, budget=200, max_num_seqs=20)
    looked, rows = 0, 0
    followed = Rows(sim.core.trace)
    for step in range(120):
        if step < 100 and rng.random() < 0.2:
            sim.add([rng.randrange(2) for _ in range(rng.randrange(1, 9))], rng.randrange(5, 40))
        sim.step()
    for number, record in enumerate(sim.core.trace):
        places = followed.follow(record)
        assert places is not None or number == 0
        looked += len(places or ())
        rows += len(record.uids)
    assert looked < rows / 3

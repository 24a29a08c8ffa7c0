"""The timeline's lanes tell of every record what the scheduler did, for random schedules, however often somebody looks."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from kv_model import Simulation

from nbengine.widgets.lanes import DECODE, HELD, PREEMPTED, PREFILL, QUEUED, Lanes


def schedule(seed, steps, trace_steps=4096):
    """A simulation that has run, its lanes looked at now and then on the way."""
    rng = random.Random(seed)
    sim = Simulation(
        num_blocks=rng.randrange(5, 12), budget=rng.randrange(3, 12), max_num_seqs=rng.randrange(1, 5), trace_steps=trace_steps
    )
    lanes = Lanes(sim.core.trace)
    for _ in range(steps):
        if rng.random() < 0.35 and len(sim.alive) < 6:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, min(18, sim.capacity - 1)))]
            sim.add(prompt, min(rng.randrange(1, 9), sim.capacity - len(prompt)), n=rng.choice([1, 1, 3]), seed=rng.randrange(99))
        if rng.random() < 0.05 and sim.alive:
            sim.cancel(rng.choice(sim.alive))
        sim.step()
        if rng.random() < 0.3:
            lanes.follow()
    lanes.follow()
    return sim, lanes


def at(lane, number, end):
    """What a lane says of one record."""
    return [run for run in lane.between(number, end) if run[1] <= number < run[2]]


@given(st.integers(0, 10**9), st.integers(1, 60))
@settings(max_examples=80)
def test_lanes_say_what_every_record_says(seed, steps):
    sim, lanes = schedule(seed, steps)
    trace = sim.core.trace
    assert lanes.number == trace.end
    preempted = set()
    for number in range(trace.end):
        record = trace.record(number)
        preempted |= set(record.preempted)
        for uid, start, count in zip(record.uids, record.starts, record.counts, strict=True):
            preempted.discard(uid)
            [run] = at(lanes.lanes[uid], number, trace.end)
            prefill = count > 1 or start + count < trace.sequences[uid].prompt_len
            assert run[0] == (PREFILL if prefill else DECODE)
            if prefill:
                assert run[1:] == [number, number + 1, count]
        preempted -= {uid for uid, _ in record.finished}
        if record.uids:
            for uid in preempted:
                [run] = at(lanes.lanes[uid], number, trace.end)
                assert run[0] == PREEMPTED
        for uid, reason in record.finished:
            assert (lanes.lanes[uid].ended, lanes.lanes[uid].reason) == (number, reason)
            assert not at(lanes.lanes[uid], number + 1, trace.end + 1)


@given(st.integers(0, 10**9), st.integers(1, 60))
@settings(max_examples=40)
def test_runs_follow_each_other_without_gap_until_the_lane_ends(seed, steps):
    sim, lanes = schedule(seed, steps)
    for lane in lanes.lanes.values():
        runs = lane.between(0, lanes.number)
        for before, after in itertools.pairwise(runs):  # but for records between two steps, in which nobody ran
            assert all(not sim.core.trace.record(number).uids for number in range(before[2], after[1])), runs
            assert before[2] <= after[1]
        assert {run[0] for run in runs} <= {QUEUED, PREFILL, DECODE, PREEMPTED, HELD}
        if lane.ended < 0 and runs:
            assert runs[-1][2] == lanes.number


@given(st.integers(0, 10**9))
@settings(max_examples=20)
def test_looking_often_or_once_shows_the_same(seed):
    sim, often = schedule(seed, 40)
    once = Lanes(sim.core.trace)
    once.follow()
    for uid, lane in once.lanes.items():
        decode = [run for run in lane.between(0, once.number) if run[0] in {PREFILL, DECODE}]
        assert decode == [run for run in often.lanes[uid].between(0, often.number) if run[0] in {PREFILL, DECODE}]


def test_lanes_that_the_ring_has_forgotten_go():
    sim, lanes = schedule(5, 1500, trace_steps=16)
    assert len(lanes.lanes) <= 2 * len(sim.core.trace.sequences) + 64


def test_a_step_in_which_nothing_changes_touches_no_lane():
    sim = Simulation(num_blocks=12, budget=30)
    sim.add([0] * 5, 20)
    lanes = Lanes(sim.core.trace)
    for _ in range(4):
        sim.step()
    lanes.follow()
    touched = []
    lanes._lane = touched.append
    for _ in range(5):
        sim.step()
    lanes.follow()
    assert not touched
    assert lanes.lanes[0].between(0, lanes.number)[-1] == [DECODE, 1, 9, 8]

import random
import sys

import pytest
from kv_model import Simulation

from nbengine.blocks import BlockPool
from nbengine.pool_state import PoolState
from nbengine.trace import SequenceInfo, StepRecord, Trace


def busy(trace_steps, operations, num_blocks=9, seed=0):
    """A core that has done many things, and the pool as it was after each record."""
    rng = random.Random(seed)
    sim = Simulation(num_blocks=num_blocks, trace_steps=trace_steps)
    then = []
    add = sim.core.trace.add

    def noting(record, pool, running):
        add(record, pool, running)
        then.append((record, PoolState.of(pool, running)))

    sim.core.trace.add = noting
    for _ in range(operations):
        if rng.random() < 0.4 and len(sim.alive) < 6:
            sim.add(
                [rng.randrange(2) for _ in range(rng.randrange(1, 18))],
                rng.randrange(1, 9),
                n=rng.choice([1, 1, 3]),
                seed=rng.randrange(99),
            )
        if rng.random() < 0.05 and sim.alive:
            sim.cancel(rng.choice(sim.alive))
        if rng.random() < 0.02:
            sim.forget()
        sim.step()
    return sim, then


def test_the_pool_rebuilt_at_any_record_is_the_pool_as_it_was_then():
    sim, then = busy(trace_steps=10_000, operations=300)
    assert sim.scheduler.preemptions
    assert {event[0] for record, _ in then for event in record.events} == {"take", "evict", "share", "copy", "seal", "free", "forget"}
    assert len(sim.core.trace) == len(then)
    for record, state in then:
        assert sim.core.trace.at(record) == state


def test_the_ring_is_bounded_and_still_rebuilds_what_is_in_it():
    sim, then = busy(trace_steps=64, operations=400)
    trace = sim.core.trace
    assert 64 <= len(trace) <= 64 + 64 // 8
    assert trace.records == [record for record, _ in then][-len(trace) :]
    for record, state in then[-len(trace) :]:
        assert trace.at(record) == state
    with pytest.raises(LookupError, match="trace_steps"):
        trace.at(then[0][0])


def test_keyframes_come_often_enough_that_little_is_ever_replayed():
    sim, _ = busy(trace_steps=64, operations=400)
    segments = sim.core.trace._segments
    assert len(segments) > 4
    assert all(len(segment.records) <= 8 for segment in segments)


def test_many_events_bring_a_keyframe_too():
    pool = BlockPool(16, 4)
    trace = Trace(pool, 10_000)
    for step in range(200):
        block = pool.take(0)
        pool.free(block, 0)
        for _ in range(50):
            pool.free(pool.take(0), 0)
        trace.add(StepRecord(step, 0.0, events=pool.take_events()), pool, {})
    assert max(segment.num_events for segment in trace._segments) <= 1024 + 102


def test_a_step_number_stands_for_the_last_record_of_that_step():
    sim = Simulation()
    (sequence,) = sim.add([0, 1], 8)
    sim.step()
    assert sim.core.trace.at(0).tables == {sequence.uid: [0]}
    sim.cancel(sequence)
    assert sim.core.trace.at(0).tables == {}
    assert [r.step for r in sim.core.trace] == [0, 0]


def test_a_record_says_who_ran_on_how_many_tokens_and_what_became_of_them():
    sim = Simulation(budget=6)
    first, second = sim.add([0] * 4, 2)[0], sim.add([1] * 5, 1)[0]
    for _ in range(2):
        sim.step()
    one, two = sim.core.trace
    assert (one.uids, list(one.starts), one.counts) == ([first.uid, second.uid], [0, 0], [4, 2])
    assert (one.sampled, one.admitted, one.finished) == ([first.uid], [first.uid, second.uid], [])
    assert (two.uids, list(two.starts), two.counts) == ([first.uid, second.uid], [4, 2], [1, 3])
    assert two.finished == [(first.uid, "length"), (second.uid, "length")]
    assert (one.num_running, one.num_waiting, one.blocks_used, two.blocks_used) == (2, 0, 2, 0)
    assert (one.num_tokens, two.num_tokens) == (6, 4)
    assert min(one.plan_s, one.launch_s, one.sample_s, one.commit_s) > 0
    assert one.duration >= one.plan_s + one.launch_s + one.sample_s + one.commit_s
    assert "2 sequences, 6 prefill + 0 decode tokens" in repr(one)


def test_a_preemption_is_recorded():
    sim = Simulation(num_blocks=5, budget=32)
    sim.add([0] * 6, 9)
    (young,) = sim.add([1] * 6, 9)
    sim.drain()
    assert [uid for record in sim.core.trace for uid in record.preempted] == [young.uid] * young.preemptions
    assert young.preemptions


def test_a_preemption_is_recorded_also_when_no_step_comes_of_it():
    sim = Simulation(num_blocks=6, block_size=4, budget=32, prefix_caching=False)
    for i in range(3):
        sim.add([i % 2] * 3, 18, seed=i)
    while sim.core.has_work():
        sim.overlapped()
    sim.add([0, 1], 4)
    sim.step()
    sim.core.suspend()
    recorded = [uid for record in sim.core.trace for uid in record.preempted]
    assert len(recorded) == sim.scheduler.preemptions
    assert recorded[-1] == 3


def test_a_reader_with_an_old_snapshot_is_not_disturbed():
    sim, _ = busy(trace_steps=32, operations=50)
    state = sim.core.trace.at(sim.core.trace.last)
    before = state.copy()
    for _ in range(20):
        sim.step()
    assert state == before


def test_names_are_kept_as_long_as_the_ring_speaks_of_them():
    sim, _ = busy(trace_steps=32, operations=600)
    sim.drain()
    names, spoken = sim.core.trace.sequences, {uid for record in sim.core.trace for uid in record.uids}
    assert spoken <= names.keys()
    assert len(names) < len(sim.sequences) / 2


def test_memory_stays_bounded_however_long_it_runs():
    sizes = []
    for operations in (300, 900):
        sim, _ = busy(trace_steps=32, operations=operations)
        trace = sim.core.trace
        sizes.append((len(trace._segments), len(trace), sum(len(r.events) for r in trace), len(trace.sequences)))
    assert all(late <= 2 * early for early, late in zip(*sizes, strict=True))


def test_a_trace_of_no_records_keeps_nothing_at_all():
    sim, then = busy(trace_steps=0, operations=50)
    sim.drain()
    assert not then
    assert sim.core.trace.last is None
    assert not sim.core.trace.sequences
    assert not sim.pool.events


def test_one_record_can_be_all_there_is():
    sim, then = busy(trace_steps=1, operations=50)
    assert 1 <= len(sim.core.trace) <= 2
    assert sim.core.trace.at(sim.core.trace.last) == then[-1][1]


def test_names_are_introduced_with_no_end():
    info = SequenceInfo("a", 0, 3, 0.0)
    assert info.last_step == sys.maxsize


def test_states_differ_when_any_part_does():
    pool = BlockPool(4, 2)
    block = pool.take(1)
    state = PoolState.of(pool, {})
    for change in (("free", block, 1), ("seal", block, b"name"), ("take", 1, 2)):
        other = state.copy()
        other.tables = {1: [block]}
        other.apply([change])
        assert other != state
    assert state != "a pool"

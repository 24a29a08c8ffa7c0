"""What the charts show, against values worked out anew from the records, for random schedules."""

from __future__ import annotations

import math
import random
from array import array
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kv_model import Simulation

from nbengine.blocks import BlockPool
from nbengine.policy import policies
from nbengine.trace import SequenceInfo, StepRecord, Trace
from nbengine.trace_columns import IDLE, Columns
from nbengine.trace_lanes import lanes
from nbengine.trace_series import SERIES, Groups, Series, summary, thinned, users_series

schedules = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "num_blocks": st.integers(7, 14),
        "policy": st.sampled_from(sorted(policies)),
        "operations": st.integers(1, 120),
        "chunked_prefill": st.booleans(),
    }
)


class Clock:
    """Times of records and arrivals in place of those of this machine: some steps are slow, some have a pause before them."""

    def __init__(self, sim, seed):
        self.random = random.Random(seed)
        self.now = 100.0
        add, introduce = sim.core.trace.add, sim.core.trace.introduce

        def adding(record, pool, running):
            record.time, parts = self.now, [self.random.random() * 0.004 for _ in range(4)]
            record.plan_s, record.launch_s, record.sample_s, record.commit_s = parts
            record.landed = 0.0
            self.now += sum(parts) + self.random.choice([0, 0, 0.001, 3 * IDLE])
            add(record, pool, running)

        def introducing(uid, info):
            info.arrival = self.now - self.random.random() * 0.01
            introduce(uid, info)

        sim.core.trace.add, sim.core.trace.introduce = adding, introducing


def run(schedule, trace_steps=10_000, read=lambda trace: None):
    """A simulation after a random schedule; `read` sees its trace again and again while it runs."""
    rng = random.Random(schedule["seed"])
    sim = Simulation(
        num_blocks=schedule["num_blocks"],
        policy=policies[schedule["policy"]](),
        chunked_prefill=schedule["chunked_prefill"],
        trace_steps=trace_steps,
    )
    Clock(sim, schedule["seed"])
    for _ in range(schedule["operations"]):
        if rng.random() < 0.4 and len(sim.alive) < 6:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 18))]
            sim.add(prompt, rng.randrange(1, 9), n=rng.choice([1, 1, 3]), seed=rng.randrange(99))
        if rng.random() < 0.05 and sim.alive:
            sim.cancel(rng.choice(sim.alive))
        sim.step()
        if rng.random() < 0.3:
            read(sim.core.trace)
    return sim


def end(record):
    return record.time + record.plan_s + record.launch_s + record.sample_s + record.commit_s


def rows_of(columns):
    """The rows that are records, not pauses."""
    pauses = np.zeros(len(columns), bool)
    pauses[:-1] = (
        (columns["time"][1:] == columns["end"][:-1]) & (columns["steps"][:-1] == 0) & (columns["end"] - columns["time"])[:-1].__gt__(IDLE)
    )
    return ~pauses


@settings(max_examples=40, deadline=None)
@given(schedules)
def test_every_column_is_what_its_record_says(schedule):
    sim = run(schedule)
    trace, columns = sim.core.trace, Columns.of(sim.core.trace)
    rows, records = rows_of(columns), trace.records
    assert rows.sum() == len(records)

    def column(name):
        return columns[name][rows].tolist()

    assert column("time") == [r.time for r in records]
    assert column("used") == [r.blocks_used for r in records]
    assert column("cached") == [r.blocks_cached for r in records]
    assert column("waiting") == [r.num_waiting for r in records]
    assert column("running") == [r.num_running for r in records]
    assert column("sampled") == [len(r.sampled) for r in records]
    assert column("preempted") == [len(r.preempted) for r in records]
    assert column("gpu") == [r.sample_s for r in records]
    prompt = {uid: info.prompt_len for uid, info in trace.sequences.items()}
    for record, prefill, decode in zip(records, column("prefill"), column("decode"), strict=True):
        decodes = [uid for uid, s, c in zip(record.uids, record.starts, record.counts, strict=True) if c == 1 and s >= prompt[uid]]
        assert (prefill, decode) == (sum(record.counts) - len(decodes), len(decodes))
    gone = [b.time - end(a) for a, b in pairwise(records)]
    assert len(columns) - len(records) == sum(1 for pause in gone if pause > IDLE)


@settings(max_examples=40, deadline=None)
@given(schedules)
@example({"seed": 495, "num_blocks": 7, "policy": "fcfs", "operations": 8, "chunked_prefill": True})  # more sequences than steps
def test_waits_for_tokens_are_those_between_the_ends_of_their_steps(schedule):
    trace = run(schedule).core.trace
    columns = Columns.of(trace)
    times = defaultdict(list)
    for record in trace:
        for uid in record.sampled:
            times[uid].append(end(record))
    firsts = sorted((t[0], t[0] - trace.sequences[uid].arrival, uid) for uid, t in times.items())
    assert np.array(sorted(columns.first_tokens.T.tolist())).ravel().tolist() == pytest.approx(np.array(firsts).ravel().tolist())
    gaps = [b - a for t in times.values() for a, b in pairwise(t)]
    assert columns["gaps"].sum() == len(gaps)
    assert columns["waited"].sum() == pytest.approx(sum(gaps))


@settings(max_examples=40, deadline=None)
@given(schedules)
def test_prefix_hits_add_up_to_what_the_scheduler_counted(schedule):
    sim = run(schedule)
    columns = Columns.of(sim.core.trace)
    assert columns["asked"].sum() == sim.scheduler.prefix_queries
    assert columns["found"].sum() == sim.scheduler.prefix_hits


@settings(max_examples=25, deadline=None)
@given(schedules, st.integers(1, 40))
def test_reading_bit_by_bit_gives_the_same_as_reading_at_once(schedule, limit):
    columns = None

    def read(trace):
        nonlocal columns
        columns = columns or Columns(trace.num_blocks, 20_000)
        columns.read(trace)

    trace = run(schedule, read=read).core.trace
    read(trace)
    whole = Columns.of(trace)
    for name in ("time", "used", "prefill", "decode", "gaps", "waited", "asked", "found"):
        assert columns[name].tolist() == whole[name].tolist()
    assert columns.first_tokens.tolist() == whole.first_tokens.tolist()
    assert columns.read(trace) == 0


@settings(max_examples=40, deadline=None)
@given(schedules, st.integers(1, 30))
def test_a_few_points_stand_for_all_of_them(schedule, limit):
    columns = Columns.of(run(schedule).core.trace)
    groups, every = Groups.of(columns, limit), Groups.of(columns, 10**6)
    assert len(groups.times) <= limit
    assert groups.spans.sum() == pytest.approx(every.spans.sum())
    assert (groups.spans >= 0).all()
    drawn = {name: series(groups) for name, series in SERIES.items()}
    blocks = drawn["occupancy"].lines
    assert (sum(blocks.values()) == columns.num_blocks).all()
    if len(columns):
        assert blocks["used"].max() == columns["used"].max()
        assert drawn["queue"].lines["waiting"].max() == columns["waiting"].max()
    tokens = drawn["throughput"].lines["generated"] * groups.spans
    assert tokens.sum() == pytest.approx(columns["sampled"].sum())
    found = drawn["prefix_hits"].lines
    assert sum(line.sum() for line in found.values()) == columns["asked"].sum()
    assert (drawn["queue"].lines["preempted"]).sum() == columns["preempted"].sum()


@settings(max_examples=30, deadline=None)
@given(schedules)
def test_lanes_have_no_holes_and_end_as_the_records_say(schedule):
    trace = run(schedule).core.trace
    reasons = {uid: reason for record in trace for uid, reason in record.finished}
    decoded = defaultdict(int)
    for record in trace:
        for uid, start, count in zip(record.uids, record.starts, record.counts, strict=True):
            decoded[uid] += count == 1 and start >= trace.sequences[uid].prompt_len
    for lane in lanes(trace):
        assert lane.reason == reasons.get(lane.uid)
        assert lane.spans[0].doing == "queued"
        for before, after in pairwise(lane.spans):
            assert before.end == after.begin
            assert before.doing != after.doing or before.doing == "preempted"
        assert all(span.end >= span.begin for span in lane.spans)
        assert any(span.doing == "decode" for span in lane.spans) == (decoded[lane.uid] > 0)


def test_numbers_of_a_stretch_are_of_that_stretch_only():
    pool = BlockPool(10, 4)
    trace = Trace(pool, 100)
    trace.introduce(0, SequenceInfo("r0", 0, 3, arrival=9.5))
    for i in range(10):
        first = i == 0
        trace.add(
            StepRecord(
                step=i, time=10 + i, uids=[0], starts=array("i", [0 if first else 2 + i]), counts=[3 if first else 1], sampled=[0],
                admitted=[0] if first else [], blocks_used=i, num_running=1, sample_s=0.5, plan_s=0.25, launch_s=0.25,
            ),
            pool, {},
        )  # fmt: skip
    columns = Columns.of(trace)
    assert columns.origin == 9.5
    whole = summary(columns)
    assert whole["tokens"] == 10
    assert whole["first_token_median"] == 1.5
    assert whole["token_gap"] == 1.0
    assert whole["kv_peak"] == 0.9
    part = summary(columns, (2.5, 4.4))  # the steps that began at 11.5 + 0.5 and later, up to the one at 13
    assert (part["begins"], part["seconds"], part["tokens"]) == (2.5, 2.0, 2.0)
    assert part["tokens_per_second"] == 1.0
    assert math.isnan(part["first_token_median"])
    assert math.isnan(part["prefix_hit_rate"])


@pytest.mark.parametrize("span", [(-2.0, -1.0), (1e3, 2e3)])
def test_a_stretch_without_any_record_has_no_numbers(span):
    sim = Simulation(num_blocks=9)
    sim.add([0, 1, 0, 1, 0], 6)
    while sim.core.has_work():
        sim.step()
    columns = Columns.of(sim.core.trace)
    groups = Groups.of(columns, 10, span)
    assert [len(series(groups).times) for series in SERIES.values()] == [0] * len(SERIES)
    numbers = summary(columns, span)
    assert (numbers["steps"], numbers["tokens"], numbers["seconds"]) == (0, 0, 0)
    assert math.isnan(numbers["tokens_per_second"])
    assert math.isnan(numbers["first_token_median"])


def test_a_pool_that_was_resized_is_as_large_as_it_was_at_each_step():
    pool = BlockPool(10, 4)
    trace = Trace(pool, 100)
    for i, events in enumerate([[], [("forget",), ("resize", 20)], []]):
        trace.add(StepRecord(step=i, time=1 + i, blocks_used=5, events=events, plan_s=1.0), pool, {})
    columns = Columns.of(trace)
    assert columns["blocks"].tolist() == [10, 20, 20]
    assert SERIES["occupancy"](Groups.of(columns, 10)).lines["free"].tolist() == [5, 15, 15]
    assert summary(columns)["kv_peak"] == 0.5


def test_an_empty_trace_gives_empty_series():
    trace = Trace(BlockPool(4, 4), 16)
    columns = Columns.of(trace)
    groups = Groups.of(columns, 10)
    for series in SERIES.values():
        assert all(len(values) == 0 for values in series(groups).lines.values())
    assert math.isnan(summary(columns)["tokens_per_second"])
    assert lanes(trace) == []


def test_a_ring_that_has_lost_its_beginning_counts_no_first_token_twice():
    sim = run({"seed": 3, "num_blocks": 9, "policy": "fcfs", "operations": 300, "chunked_prefill": True}, trace_steps=32)
    trace = sim.core.trace
    assert trace.first > 0
    columns = Columns.of(trace)
    assert columns.origin == trace.records[0].time
    begins = {uid for r in trace for uid, s, c in zip(r.uids, r.starts, r.counts, strict=True) if s + c == trace.sequences[uid].prompt_len}
    forked = {uid for r in trace for uid in r.sampled if uid not in r.uids}
    assert set(columns.first_tokens[2].tolist()) <= begins | forked


def test_columns_forget_as_the_ring_does():
    sim = run({"seed": 3, "num_blocks": 9, "policy": "fcfs", "operations": 60, "chunked_prefill": True})
    columns = Columns(sim.core.trace.num_blocks, 16)
    columns.read(sim.core.trace)
    assert len(columns) == 16
    assert columns["time"][-1] == sim.core.trace.last.time


def test_thinning_keeps_the_least_and_the_greatest():
    times = np.arange(10_000.0)
    values = np.sin(times)
    values[5000] = 99
    values[7000] = -99
    thin = thinned(Series("a", "", times, {"x": values}), 200)
    assert len(thin.times) <= 200
    assert (thin.lines["x"].max(), thin.lines["x"].min()) == (99, -99)


def test_a_panel_of_ones_own_answers_with_one_value_a_record_or_with_a_series():
    trace = run({"seed": 1, "num_blocks": 9, "policy": "fcfs", "operations": 40, "chunked_prefill": True}).core.trace
    columns = Columns.of(trace)
    mine = users_series("mine", lambda trace: {"batch": [len(record.uids) for record in trace]}, trace, columns)
    assert mine.lines["batch"].tolist() == [len(record.uids) for record in trace]
    assert mine.times.tolist() == [record.time - columns.origin for record in trace]
    series = Series("other", "s", np.array([1.0]), {"a": np.array([2.0])})
    assert users_series("other", lambda trace: series, trace, columns) is series
    with pytest.raises(ValueError, match=r"panel 'mine' gives 3 values as 'a' for \d+ records: give one for each"):
        users_series("mine", lambda trace: {"a": [1, 2, 3]}, trace, columns)
    with pytest.raises(TypeError, match="must return a Series, or a dict"):
        users_series("mine", lambda trace: 7, trace, columns)

"""Figures for papers: what `trace.figure` draws is what the records say."""

from __future__ import annotations

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from nbengine import Engine, SamplingParams
from nbengine.blocks import BlockPool
from nbengine.trace import StepRecord, Trace
from nbengine.trace_figures import KINDS


@pytest.fixture(scope="module")
def trace():
    """Of an engine whose pool is too small for what it was asked."""
    with Engine("tales", num_gpu_blocks_override=12, max_model_len=128, max_num_seqs=6) as engine:
        engine.generate(["Once upon a time there was a king who had"] * 5, SamplingParams(max_tokens=40, ignore_eos=True))
        return engine.trace


def lines(figure):
    return {one.name: np.asarray(one.y, float) for one in figure.data}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_figure_that_can_be_kept(trace, kind):
    figure = trace.figure(kind, width=640, template="plotly_white")
    assert isinstance(figure, go.Figure)
    assert figure.layout.width == 640
    assert len(figure.data) > 0
    assert json.loads(go.Figure(figure.to_dict()).to_json()) == json.loads(figure.to_json())


def test_occupancy_adds_up_to_the_pool_and_ends_where_the_last_step_does(trace):
    drawn = lines(trace.figure("occupancy"))
    assert (drawn["used"] + drawn["cached"] + drawn["free"] == trace.num_blocks).all()
    assert drawn["used"][:-1].tolist() == [record.blocks_used for record in trace]
    times = trace.figure("occupancy").data[0].x
    assert times[-1] - times[0] == pytest.approx(trace.last.time + trace.last.duration - trace.records[0].time)


def test_the_timeline_has_a_bar_for_each_thing_done_and_preemption_among_them(trace):
    figure = trace.figure("timeline")
    bars = {bar.name: bar for bar in figure.data}
    assert sum(len(record.preempted) for record in trace) > 0
    assert len(bars["preempted"].x) > 0
    assert len(bars["queued"].x) >= 5 - 1  # who was admitted in the first step waited a moment, too
    ends = np.add(bars["decode"].base, bars["decode"].x)
    assert ends.max() == pytest.approx(trace.last.time + trace.last.duration - min(s.arrival for s in trace.sequences.values()), abs=0.05)


def test_the_block_map_is_the_pool_at_that_step(trace):
    record = trace.records[len(trace) // 2]
    (cells,) = [one for one in trace.figure("blocks", at=record).data if one.type == "heatmap"]
    pool = trace.at(record)
    flat = np.asarray(cells.z).ravel()
    for block in range(trace.num_blocks):
        expected = {1} if block in pool.blank else {2} if block in pool.cached else {3} if pool.references[block] > 1 else set(range(4, 10))
        assert flat[block] in expected
    assert (flat[trace.num_blocks :] == 0).all()
    held = sum(map(bool, pool.references))
    title = trace.figure("blocks", at=record.step).layout.title.text
    assert title == f"KV blocks after step {record.step}: {held} of 12 held, {len(pool.cached)} cached"


def test_the_block_map_has_as_many_cells_as_the_pool_had_blocks_then():
    pool = BlockPool(24, 4)
    trace = Trace(pool, 64)
    for step, count in enumerate((24, 160, 20)):
        if step:
            pool.resize(count)
        held = [pool.take(step) for _ in range(18)]
        events = pool.take_events()
        for block in reversed(held):
            pool.free(block, step)
        trace.add(StepRecord(step, float(step), events=events), pool, {})
    trace.num_blocks = pool.num_blocks
    for step, count in enumerate((24, 160, 20)):
        figure = trace.figure("blocks", at=step)
        (cells,) = [one for one in figure.data if one.type == "heatmap"]
        assert np.count_nonzero(cells.z) == count
        assert figure.layout.title.text == f"KV blocks after step {step}: 18 of {count} held, 0 cached"


def test_a_function_of_the_trace_is_a_figure_too(trace):
    def batch(trace):
        return {"sequences": [len(record.uids) for record in trace]}

    figure = trace.figure(batch)
    assert figure.data[0].y.tolist() == [len(record.uids) for record in trace]
    assert "batch" in figure.layout.annotations[0].text


def test_a_saved_trace_draws_the_same(trace, tmp_path):
    loaded = Trace.load(trace.save(tmp_path / "run.trace"))
    for kind in ("occupancy", "batch", "first_token", "timeline"):
        for one, two in zip(trace.figure(kind).data, loaded.figure(kind).data, strict=True):
            assert np.asarray(one.x, float) == pytest.approx(np.asarray(two.x, float))


def test_wrong_kinds_and_options_are_refused(trace):
    with pytest.raises(ValueError, match="no figure 'ocupancy'; did you mean 'occupancy'"):
        trace.figure("ocupancy")
    with pytest.raises(TypeError, match="did you mean 'width'"):
        trace.figure("occupancy", widht=3)
    with pytest.raises(ValueError, match="at= chooses the step"):
        trace.figure("batch", at=3)
    with pytest.raises(LookupError, match="not in the trace any more"):
        trace.figure("blocks", at=10**6)


def test_an_empty_trace_has_empty_charts_and_says_why_it_has_no_block_map(trace):
    with Engine("tales", num_gpu_blocks_override=12, max_model_len=128) as engine:
        assert len(engine.trace.figure().data) > 0
        assert len(engine.trace.figure("timeline").data) > 0
        with pytest.raises(ValueError, match="no step in this trace yet"):
            engine.trace.figure("blocks")

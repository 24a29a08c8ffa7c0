"""Two traces on one clock."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import numpy as np
import pytest

from nbengine import Engine, SamplingParams
from nbengine.trace import Trace
from nbengine.widgets import compare

LENGTHS = [40, 6, 6, 6, 6, 6, 6, 6]


@pytest.fixture(scope="module")
def runs():
    """The same requests under static and continuous batching; the engines are gone."""
    traces = []
    for policy in ("static", "fcfs"):
        with Engine("tales", num_gpu_blocks_override=64, max_model_len=256, max_num_seqs=2, scheduling_policy=policy) as engine:
            params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in LENGTHS]
            engine.generate(["Once upon a time"] * len(LENGTHS), params)
            traces.append(engine.trace)
    return traces


def curve(side, name):
    return np.frombuffer(side["curves"][name], np.float32)


def test_both_clocks_begin_with_the_first_arrival_and_the_numbers_are_the_traces(runs):
    made = compare(*runs, labels=("static", "continuous"))
    for trace, (label, numbers), side in zip(runs, made.numbers.items(), made.sides, strict=True):
        arrival = min(info.arrival for info in trace.sequences.values())
        last = trace.records[-1]
        assert numbers["finished"] == pytest.approx(last.time + last.duration - arrival, abs=1e-6)
        assert numbers["tokens"] == sum(LENGTHS) == sum(len(record.sampled) for record in trace)
        assert numbers["tokens_per_second"] == pytest.approx(sum(LENGTHS) / numbers["finished"])
        assert numbers["steps"] == sum(1 for record in trace if record.uids)
        assert side["label"] == label
        assert min(spans[1] for _, spans in side["lanes"]) == 0
        assert max(spans[-1] for _, spans in side["lanes"]) <= side["end"] + 1e-4
        assert curve(side, "tokens")[-1] == sum(LENGTHS)
        assert curve(side, "used").max() == pytest.approx(max(record.blocks_used for record in trace) / 64)
    static, continuous = made.numbers.values()
    assert continuous["steps"] < static["steps"]  # a short one's place is taken by the next at once
    assert continuous["running"] > static["running"]
    made.close()


def test_lanes_of_static_batching_wait_for_the_longest_of_the_batch_before(runs):
    made = compare(*runs, labels=("static", "continuous"))
    begins = [[spans[2] for _, spans in side["lanes"]] for side in made.sides]  # when each was no longer queued
    ends = [[spans[-1] for _, spans in side["lanes"]] for side in made.sides]
    assert min(begins[0][2:]) >= ends[0][0] - 1e-4
    assert min(begins[1][2:]) < ends[1][0]
    made.close()


def test_its_table_picture_and_words_say_the_same(runs):
    made = compare(*runs, labels=("a <b>", "c"))
    rows = {row[0]: row[1:] for row in made.table}
    assert rows["tokens"] == ["82", "82", "1.00 times"]
    assert rows["finished after"][0] == f"{made.numbers['a <b>']['finished']:.2f} s"
    ET.fromstring(made.snapshot().data)
    assert "a &lt;b&gt;: KV cache" in made.snapshot().data
    assert "tokens/s" in repr(made)
    assert "image/svg+xml" in made._repr_mimebundle_()
    made.close()


def test_engines_and_loaded_traces_are_taken_too(runs, engine, tmp_path):
    engine.generate("Once", SamplingParams(max_tokens=3))
    made = compare(engine, Trace.load(runs[0].save(tmp_path / "run.trace")))
    assert list(made.numbers) == ["A", "B"]
    assert made.numbers["B"]["tokens"] == sum(LENGTHS)
    made.close()
    made.close()


def test_bad_input_is_refused(runs, fresh_engine):
    with pytest.raises(TypeError, match="two traces or engines, not int"):
        compare(runs[0], 7)
    with pytest.raises(ValueError, match="no step in the trace 'B' yet: run its requests first"):
        compare(runs[0], fresh_engine)
    fresh_engine.trace.capacity = 0
    with pytest.raises(ValueError, match="no step in the trace 'B' yet: its engine keeps no trace"):
        compare(runs[0], fresh_engine)
    with pytest.raises(ValueError, match="two different names"):
        compare(*runs, labels=("x", "x"))
    with pytest.raises(TypeError, match="did you mean 'labels'"):
        compare(*runs, label=("x", "y"))

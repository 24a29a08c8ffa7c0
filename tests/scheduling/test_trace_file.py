"""A trace that was saved is the same trace, and a file that is none says so."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import random
import subprocess
import sys
from dataclasses import fields

import pytest
from kv_model import Simulation, storm

from nbengine.blocks import BlockPool
from nbengine.errors import TraceFileError
from nbengine.trace import StepRecord, Trace
from nbengine.widgets.cells import Cells


def busy(seed=0, trace_steps=64):
    rng = random.Random(seed)
    sim = Simulation(num_blocks=9, trace_steps=trace_steps)
    for _ in range(120):
        if rng.random() < 0.4 and len(sim.alive) < 6:
            sim.add([rng.randrange(2) for _ in range(rng.randrange(1, 18))], rng.randrange(1, 9), n=rng.choice([1, 1, 3]))
        if rng.random() < 0.05 and sim.alive:
            sim.cancel(rng.choice(sim.alive))
        sim.step()
    sim.core.trace.token_text = lambda token: f"<{token}>"
    sim.core.trace.name = "a model"
    return sim.core.trace


@pytest.fixture
def saved(tmp_path):
    trace = busy()
    return trace, trace.save(tmp_path / "run.trace")


def test_every_record_and_every_moment_come_back(saved):
    trace, path = saved
    read = Trace.load(path)
    assert trace.first > 0  # the ring had dropped some
    assert (read.first, read.end, read.num_blocks, read.block_size, read.name) == (trace.first, trace.end, 9, 4, "a model")
    for number in range(trace.first, trace.end):
        ours, theirs = trace.record(number), read.record(number)
        for field in fields(StepRecord):
            assert getattr(theirs, field.name) == getattr(ours, field.name), field.name
        assert read.state(number) == trace.state(number)


@pytest.mark.parametrize("seed", range(5))
def test_storms_come_back_too(tmp_path, seed):
    trace = storm(seed, 40).core.trace
    read = Trace.load(trace.save(tmp_path / "storm"))
    assert [read.state(n) for n in range(trace.first, trace.end)] == [trace.state(n) for n in range(trace.first, trace.end)]


def test_sequences_bring_their_tokens_and_texts(saved):
    trace, path = saved
    read = Trace.load(path)
    assert read.sequences.keys() == trace.sequences.keys()
    for uid, info in trace.sequences.items():
        other = read.sequences[uid]
        assert list(other.tokens) == list(info.tokens)
        assert (other.request_id, other.index, other.prompt_len, other.last_step) == (
            info.request_id, info.index, info.prompt_len, info.last_step,
        )  # fmt: skip
    assert read.token_text(1) == "<1>"
    assert read.token_text(99) == "#99"  # it was never used


def test_a_pool_that_was_resized_comes_back(tmp_path):
    pool = BlockPool(6, 4)
    trace = Trace(pool, 64)
    for step, count in enumerate((6, 12, 3)):
        if count != pool.num_blocks:
            pool.resize(count)
        pool.free(pool.take(step), step)
        trace.add(StepRecord(step, float(step), events=pool.take_events()), pool, {})
    trace.num_blocks = pool.num_blocks
    read = Trace.load(trace.save(tmp_path / "resized"))
    assert [len(read.state(number).references) for number in range(3)] == [6, 12, 3]
    assert all(read.state(number) == trace.state(number) for number in range(3))
    cells = Cells(read)
    for number in (0, 1, 2, 1, 0, 2):
        cells.seek(number)
        assert cells.hashes == trace.state(number).hashes
        assert len(cells.kinds) == cells.totals()["blocks"] == [6, 12, 3][number]


def test_saving_leaves_nothing_but_the_file(saved):
    assert [path.name for path in saved[1].parent.iterdir()] == ["run.trace"]


def test_a_trace_can_be_saved_again_after_loading(saved, tmp_path):
    trace, path = saved
    again = Trace.load(Trace.load(path).save(tmp_path / "again"))
    assert [r.events for r in again] == [r.events for r in trace]


def test_what_is_no_trace_says_so(tmp_path):
    text, zipped = tmp_path / "text", tmp_path / "zipped"
    text.write_text("hello")
    with gzip.open(zipped, "wt") as file:
        file.write('{"a": 1}\n')
    for path in (text, zipped):
        with pytest.raises(TraceFileError, match=r"is no trace file: use one that trace.save\(path\) wrote"):
            Trace.load(path)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none")


def change(path, line, edit):
    with gzip.open(path, "rt") as file:
        lines = [json.loads(text) for text in file]
    edit(lines[line])
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(one) + "\n" for one in lines)


def test_another_version_is_refused(saved):
    change(saved[1], 0, lambda head: head.update(version=2))
    with pytest.raises(TraceFileError, match="is of version 2, and this nbengine reads version 1"):
        Trace.load(saved[1])


@pytest.mark.parametrize(
    ("line", "edit"),
    [
        (0, lambda head: head.update(num_blocks=1 << 40)),
        (0, lambda head: head.update(records=3)),
        (0, lambda head: head.pop("block_size")),
        (0, lambda head: head.update(block_size=1.5)),
        (0, lambda head: head.update(block_size=1 << 40)),
        (0, lambda head: head.update(capacity=10**12)),
        (0, lambda head: head.update(capacity=math.inf)),
        (1, lambda state: state.update(blank=[99])),
        (1, lambda state: state.pop("tables")),
        (2, lambda line: line["sequences"][0].pop()),
        (2, lambda line: line["sequences"][0].__setitem__(4, math.nan)),
        (-1, lambda record: record.update(events=[["take", -1, 0]])),
        (-1, lambda record: record.update(events=[["__init__", 1]])),
        (-1, lambda record: record.update(events=[["free", 0, 12345]])),
        (-1, lambda record: record.update(uids=[1, 2, 3], starts=[0])),
        (-1, lambda record: record.update(uids=[[1]], counts=[1], starts=[0])),
        (-1, lambda record: record.update(uids=[1], counts=["1"], starts=[0])),
        (-1, lambda record: record.update(events=[["forget"], ["resize", 3], ["take", 0, "x"]])),
        (-1, lambda record: record.update(blocks_used=1.5)),
        (-1, lambda record: record.update(time="x")),
        (-1, lambda record: record.update(time=math.inf)),
        (-1, lambda record: record.update(launch_s=[])),
        (-1, lambda record: record.update(gpu_s=math.nan)),
        (-1, lambda record: record.update(landed=-5)),
    ],
)
def test_a_damaged_file_is_refused(saved, line, edit):
    change(saved[1], line, edit)
    with pytest.raises(TraceFileError, match="damaged or cut short"):
        Trace.load(saved[1])


def test_a_file_in_which_a_bit_has_flipped_is_refused_or_read(saved):
    content, rng = saved[1].read_bytes(), random.Random(7)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        saved[1].write_bytes(flipped)
        with contextlib.suppress(TraceFileError):
            Trace.load(saved[1])


def test_signs_that_no_picture_may_hold_are_exchanged(saved):
    trace, path = saved
    change(path, 0, lambda head: head.update(name="a\0b \ud800"))
    change(path, 2, lambda line: line["sequences"][0].__setitem__(1, "r\x1b"))
    read = Trace.load(path)
    assert read.name == "a\ufffdb \ufffd"
    assert read.sequences[next(iter(trace.sequences))].request_id == "r\ufffd"


def test_a_file_cut_short_is_refused(saved):
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(TraceFileError, match="damaged or cut short"):
        Trace.load(saved[1])


def test_loading_and_drawing_need_neither_torch_nor_an_engine(saved):
    script = (
        "import sys\nfrom nbengine.trace import Trace\nfrom nbengine.widgets import BlockTableView, Timeline\n"
        f"trace = Trace.load({str(saved[1])!r})\n"
        "for view in (BlockTableView(trace), Timeline(trace)): print(len(view.picture()) > 500)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr

"""What the block table and the timeline send, know and leave behind."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from IPython.display import SVG

from nbengine import Engine, SamplingParams
from nbengine.blocks import BlockPool
from nbengine.trace import SequenceInfo, StepRecord, Trace
from nbengine.widgets import BlockTableView, Dashboard, Timeline
from nbengine.widgets.view import module, style

PROMPT = "Once upon a time there was an old fox who lived in a hollow tree at the edge of the wood"
VIEWS = [BlockTableView, Timeline]


def looked(view):
    view._eyes["here"] = True
    view.refresh()
    return view.frame


def size(view):
    return len(view.packed["json"]) + len(view.packed["data"])


def crowd(blocks, sequences, steps=1):
    """A trace in which this many sequences hold a pool together."""
    pool = BlockPool(blocks, 16)
    trace = Trace(pool, 4096)
    each = blocks * 9 // 10 // sequences
    uids = list(range(90_000, 90_000 + sequences))
    for uid in uids:
        trace.introduce(uid, SequenceInfo(f"r{uid}", 0, 10, 0.0))
        for _ in range(each):
            pool.take(uid)
    for step in range(steps):
        record = StepRecord(step, 0.02 * step, uids=uids, counts=[each * 16 - 7] * sequences, events=pool.take_events())
        record.starts.extend([0] * sequences)
        trace.add(record, pool, {})
    return trace


def test_a_sequence_that_is_not_there_is_refused_with_some_that_are():
    view = BlockTableView(crowd(100, 3))
    with pytest.raises(ValueError, match="no sequence is called 'r7' in this trace; the last ones are r90000, r90001, r90002"):
        view.choose("r7")
    view.close()


@pytest.mark.parametrize("sequences", [64, 256, 1024])
def test_ten_thousand_blocks_are_sent_in_less_than_fifty_kilobytes(sequences):
    trace = crowd(10_000, sequences)
    view = BlockTableView(trace)
    view.choose(90_003)
    view._asked = 5
    looked(view)
    assert view.frame["table"]["blocks"]
    assert size(view) < 50_000
    view.close()


def test_a_larger_pool_is_sent_in_less_than_fifty_kilobytes_too():
    for blocks in (10_001, 60_000, 300_000):
        view = BlockTableView(crowd(blocks, 256))
        looked(view)
        assert view.frame["group"] > 1
        assert size(view) < 50_000
        view.close()


@pytest.mark.parametrize("blocks", [10_000, 72_619])
def test_a_block_that_a_thousand_hold_names_the_first_of_them_and_counts_the_rest(blocks):
    pool = BlockPool(blocks, 16)
    trace = Trace(pool, 64)
    uids = list(range(90_000, 91_024))
    block = pool.take(uids[0])
    pool.seal(block, b"x" * 32)
    for uid in uids:
        trace.introduce(uid, SequenceInfo(f"r{uid}", 0, 40, 0.0))
        if uid != uids[0]:
            pool.share(block, uid)
        pool.take(uid)
    record = StepRecord(0, 0.0, uids=uids, counts=[17 + uid % 14 for uid in uids], events=pool.take_events())
    record.starts.extend([0] * len(uids))
    trace.add(record, pool, {})
    view = BlockTableView(trace)
    view.choose(90_003)
    view._asked = block // looked(view)["group"]
    facts = looked(view)["facts"]
    assert facts["owners"][0][:2] == [90_000, "r90000"]
    assert len(facts["owners"]) == 64
    assert facts["references" if blocks == 10_000 else "sequences"] == 1024
    assert size(view) < 50_000
    view.close()


def test_a_timeline_of_many_lanes_and_steps_stays_small():
    view = Timeline(crowd(10_000, 512, steps=300), steps=200)
    looked(view)
    assert len(view.frame["lanes"]) == 256
    assert view.frame["left_out"] == 256
    assert size(view) < 50_000
    view.close()


@pytest.mark.parametrize("steps", [20, 200, 500, 1000, 2000])
def test_a_timeline_of_any_length_stays_small_late_in_a_long_trace(steps):
    pool = BlockPool(10, 16)
    trace = Trace(pool, 4096)
    uids = list(range(1_000_000, 1_000_512))
    for uid in uids:
        trace.introduce(uid, SequenceInfo(f"r{uid}", 0, 10_000, 0.0))
    records = []
    for number in range(3_000_000, 3_002_000):  # each computes a piece of its prompt anew, now and then
        counts = [1 if (number + uid) % 300 else 64 for uid in uids]
        record = StepRecord(number, 0.2 * number, uids=uids, counts=counts)
        record.starts.extend([20_000] * len(uids))
        records.append(record)
    trace.restore(trace.start(), 3_000_000, records)
    view = Timeline(trace, steps=steps)
    lanes = looked(view)["lanes"]
    assert len(lanes) > 20
    assert len(lanes) + view.frame["left_out"] == 512
    assert size(view) < 50_000
    view.close()


@pytest.mark.parametrize("view", VIEWS)
def test_unknown_keywords_are_refused_by_name(engine, view):
    with pytest.raises(TypeError, match="has no parameter 'sourc'; did you mean 'source'"):
        view(engine, sourc=1)


def test_steps_must_make_sense(engine):
    with pytest.raises(ValueError, match="steps must be a whole number from 20 to 2000, not 3"):
        Timeline(engine, steps=3)
    view = Timeline(engine)
    with pytest.raises(ValueError, match="whole number"):
        view.steps = "many"
    view.close()


def test_a_block_tells_its_tokens_owners_hash_and_age(engine, until):
    engine.reset_prefix_cache()
    engine.pause()
    handles = engine.submit_all([PROMPT], SamplingParams(n=3, max_tokens=40, ignore_eos=True, seed=1))
    engine.step(30)
    view = BlockTableView(engine)
    frame = looked(view)
    tables = engine.trace.state(engine.trace.end - 1).tables
    assert frame["uids"] == sorted(tables)
    table = next(iter(tables.values()))
    view._asked = table[0]
    facts = looked(view)["facts"]
    prompt = handles[0].prompt_token_ids
    assert facts["references"] == 3
    assert [owner[0] for owner in facts["owners"]] == sorted(tables)
    assert [owner[2] for owner in facts["owners"]] == [0, 0, 0]
    assert [token for token, _ in facts["tokens"]] == prompt[:16]
    assert "".join(text for _, text in facts["tokens"]).strip() in PROMPT
    assert facts["hash"] == engine.trace.state(engine.trace.end - 1).hashes[table[0]].hex()[:16]
    assert facts["taken"][0] == 29
    assert facts["slots"] == 16
    copies = [block for block in range(engine.trace.num_blocks) if block in engine.trace.state(engine.trace.end - 1).copied]
    view._asked = copies[0]
    assert looked(view)["facts"]["copy_of"] == engine.trace.state(engine.trace.end - 1).copied[copies[0]]
    engine.resume()
    handles[0].result()
    view._asked = table[0]
    facts = looked(view)["facts"]
    assert (facts["references"], facts["owners"], facts["slots"]) == (0, [], 16)  # cached: its content is still known
    assert [token for token, _ in facts["tokens"]] == prompt[:16]
    assert facts["freed"][0] >= 0
    assert facts["taken"][0] > facts["freed"][0]
    view.close()


def test_choosing_shows_the_page_table_and_a_name_that_nobody_has_is_refused(engine):
    engine.pause()
    (handle,) = engine.submit_all([PROMPT], SamplingParams(max_tokens=40, ignore_eos=True))
    engine.step(20)
    view = BlockTableView(engine)
    view.choose(handle.id)
    table = looked(view)["table"]
    assert table["blocks"] == engine.trace.state(engine.trace.end - 1).tables[table["uid"]]
    assert table["length"] == len(handle.prompt_token_ids) + 19
    with pytest.raises(ValueError, match="no sequence is called 'nobody'"):
        view.choose("nobody")
    handle.cancel()
    engine.resume()
    view.close()


def test_choosing_goes_on_while_requests_come(monkeypatch):
    from nbengine.widgets import block_table

    trace = crowd(100, 3)

    def named(trace, uid):
        trace.introduce(uid + 1000, SequenceInfo("new", 0, 10, 0.0))
        return trace.sequences[uid].request_id

    view = BlockTableView(trace)
    monkeypatch.setattr(block_table, "sequence_name", named)
    view.choose("r90002")
    assert view._chosen == 90_002
    view.close()


def test_the_batch_in_cross_section_is_the_records(engine):
    engine.generate([PROMPT] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
    view = Timeline(engine)
    for number in range(max(engine.trace.first, engine.trace.end - 8), engine.trace.end):
        view.playhead.seek(number)
        batch = looked(view)["batch"]
        record = engine.trace.record(number)
        assert [[row[0], row[2], row[3]] for row in batch["rows"]] == [
            list(row) for row in zip(record.uids, record.starts, record.counts, strict=True)
        ]
        assert batch["tokens"] == record.num_tokens
    view.close()


@pytest.mark.parametrize("view", VIEWS)
def test_a_snapshot_is_a_picture_at_any_time_and_needs_nothing_else(engine, view):
    engine.generate([PROMPT], SamplingParams(max_tokens=20, ignore_eos=True))
    one = view(engine)
    for source in (one, view(engine.trace)):
        picture = source.snapshot()
        assert isinstance(picture, SVG)
        root = ET.fromstring(picture.data)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert "script" not in picture.data
        source.close()
    assert view(engine.trace).snapshot().data


def test_a_picture_of_a_large_pool_draws_cached_blocks_beside_held_ones():
    pool = BlockPool(4000, 4)
    trace = Trace(pool, 64)
    blocks = [pool.take(block % 2) for block in range(4000)]
    for block in blocks[1::2]:
        pool.seal(block, b"%d" % block)
    for block in reversed(blocks[1::2]):
        pool.free(block, 1)
    record = StepRecord(0, 0.0, uids=[0], counts=[8000], events=pool.take_events())
    record.starts.append(0)
    trace.add(record, pool, {})
    view = BlockTableView(trace)
    cells = ET.fromstring(view.snapshot().data).find("{*}g").findall("{*}rect")
    hatched = [cell for cell in cells if cell.get("fill") == "url(#cached)"]
    assert len(hatched) == 2000
    assert {float(cell.get("height")) for cell in hatched} == {3.5}  # half of a cell
    assert {float(cell.get("width")) for cell in hatched} == {2}
    assert len([cell for cell in cells if cell.get("fill-opacity") == ".25"]) == 2000
    view.close()


@pytest.mark.parametrize("view", VIEWS)
def test_a_bundle_holds_the_live_view_the_picture_and_words(engine, view):
    one = view(engine)
    bundle = one._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/svg+xml", "text/plain"} <= bundle.keys()
    assert one.still in bundle["image/svg+xml"]
    assert repr(one).startswith(f"<{view.__name__}: ")
    assert len(repr(one)) < 300
    one.close()


def test_without_a_kernel_a_view_is_a_line_of_text(engine, capsys):
    view = BlockTableView(engine)
    view._ipython_display_()
    assert capsys.readouterr().out.startswith("<BlockTableView: ")
    view.close()


@pytest.mark.parametrize("name", ["block_table", "timeline"])
def test_a_script_and_what_it_imports_are_joined_into_one_module(name, tmp_path):
    text = module(f"{name}.js")
    assert "import {" not in text
    script = tmp_path / "view.mjs"
    script.write_text(text + "\nconsole.log(typeof render, typeof buildFrame);")
    done = subprocess.run(["node", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "function function\n", done.stderr
    assert "http:" not in text.replace("http://www.w3.org", "")
    assert "https:" not in text + style(f"{name}.css")


@pytest.mark.parametrize("view", [*VIEWS, Dashboard])
def test_a_view_of_an_engine_that_keeps_no_trace_says_so(view):
    with Engine("tales", num_gpu_blocks_override=64, max_model_len=256, trace_steps=0) as engine:
        one = view(engine)
        engine.generate("Once", SamplingParams(max_tokens=5))
        frame = looked(one)
        assert "keeps no trace (trace_steps=0)" in frame["note"]
        assert frame["moment"]["traced"] is False
        assert "keeps no trace" in repr(one)
        assert "keeps no trace" in ET.fromstring(one.snapshot().data).find("{http://www.w3.org/2000/svg}title").text
        one.close()


def test_views_hold_no_tensors_and_no_engine(engine):
    view = BlockTableView(engine)
    looked(view)
    seen, left = set(), [view.__dict__, view.playhead.__dict__, view.playhead.trace.__dict__, view.playhead._models]
    while left:
        held = left.pop()
        if id(held) in seen or len(seen) > 20_000:
            continue
        seen.add(id(held))
        assert not isinstance(held, torch.Tensor)
        assert not isinstance(held, Engine)
        left += list(held.values()) if isinstance(held, dict) else list(held) if isinstance(held, list | tuple | set) else []
    view.close()


def test_a_view_that_is_not_drawn_any_more_is_given_up_when_the_kernel_could_have_heard(engine, monkeypatch):
    from nbengine.widgets import view as module_of_views

    view = BlockTableView(engine)
    looked(view)
    assert view.looked_at
    monkeypatch.setattr(module_of_views, "PATIENCE", -1.0)
    assert not view.looked_at  # nobody has said for too long that it was drawn
    view._cells.running = True
    assert view.looked_at  # but a cell runs, and the kernel may not hear
    view._cells.running = False
    view._hear(view, {"place": "here", "drawn": True}, [])
    assert view._unseen_since is None
    view.close()


def test_python_and_scripts_have_the_same_colours():
    from nbengine.widgets.palette import PALETTE

    assert all(colour in module("block_table.js") for colour in PALETTE)
    listed = module("block_table.js").split("PALETTE = [")[1].split("]")[0]
    assert [part.strip(' "') for part in listed.split(",")] == list(PALETTE)


def test_importing_the_views_needs_no_torch():
    code = "import sys, nbengine.widgets as w; w.BlockTableView, w.Timeline; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "False\n", done.stderr

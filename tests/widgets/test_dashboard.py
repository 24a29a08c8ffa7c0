"""The dashboard on a real engine: what it sends, what its buttons do, panels of one's own, and that it lets everything go."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from nbengine import Engine, SamplingParams
from nbengine.burst import burst
from nbengine.policy import Policy, StaticBatching
from nbengine.trace import Trace
from nbengine.trace_series import Series
from nbengine.widgets import BlockTableView, Dashboard

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=600, ignore_eos=True)


def seen(board, seen=True):
    board._hear(board, {"place": "a", "seen": seen}, [])


def press(board, name, value=None):
    board._hear(board, {"place": "a", "press": name, "value": value}, [])


def size(value) -> int:
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + size(one) for key, one in value.items())
    return sum(map(size, value)) if isinstance(value, list) else len(json.dumps(value))


def chart(board, name):
    return next(one for one in board.frame["charts"] if one["name"] == name)


def line(board, name, label):
    """A line of a chart, out of the bytes that were sent beside it."""
    one = chart(board, name)
    numbers = np.frombuffer(board.frame["data"], np.float32, one["count"] * (len(one["labels"]) + 1), one["at"])
    return numbers.reshape(-1, one["count"])[1 + one["labels"].index(label)]


@pytest.fixture
def board(engine):
    engine.generate(["Once upon a time", "The fox"], SHORT)
    board = Dashboard(engine)
    seen(board)
    yield board
    board.close()


def test_it_shows_what_the_records_say_and_follows_the_engine(engine, board, until):
    until(lambda: board.frame.get("charts"))
    for _ in range(2):
        until(lambda: line(board, "occupancy", "used")[-1] == engine.trace.last.blocks_used)
        assert line(board, "queue", "running").max() == max(record.num_running for record in engine.trace)
        engine.generate(["Once", "A king", "A bird", "The sea"], SHORT)
        until(lambda: board.frame["moment"]["last"] == engine.trace.end - 1)
    assert {one["name"] for one in board.frame["charts"]} >= {"occupancy", "batch", "throughput", "first_token", "prefix_hits", "step_time"}


def test_the_whole_state_stays_small_however_many_steps_there_were(engine, until):
    for _ in range(2):
        engine.generate(["Once"] * 2, SamplingParams(max_tokens=250, ignore_eos=True))
    board = Dashboard(engine, panels={"mine": lambda trace: {"a": [r.step for r in trace], "b": [r.time for r in trace]}})
    seen(board)
    until(lambda: board.frame.get("charts"))
    assert engine.trace.end > 400
    assert size(board.frame) < 50_000
    assert board.frame["trouble"] == ""


def test_nothing_is_sent_when_nothing_changed_or_nobody_looks(engine, board, until):
    until(lambda: board.updates)
    time.sleep(0.3)
    updates = board.updates
    time.sleep(0.5)
    assert board.updates == updates
    seen(board, False)
    engine.generate("Once", SHORT)
    time.sleep(0.3)
    assert board.updates == updates


def test_a_stretch_of_time_is_drawn_more_finely_and_its_numbers_are_shown(engine, board, until):
    engine.generate(["Once"] * 3, SamplingParams(max_tokens=250, ignore_eos=True))
    columns = board._columns()
    begin, end = (float(columns["time"][-80] - columns.origin), float(columns["time"][-20] - columns.origin))
    press(board, "brush", [begin, end])
    until(lambda: board.frame["span"] == (begin, end))
    assert 55 <= len(line(board, "batch", "decode")) <= 65
    assert board.frame["numbers"][0][1] == f"{begin:.2f} to {end:.2f} s"
    press(board, "brush", None)
    until(lambda: board.frame["span"] is None)
    for wrong in ((3, 2), (5, math.inf), (-math.inf, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="two times in seconds, finite and the first the smaller"):
            board.select(*wrong)
    assert board.selected is None


@pytest.mark.parametrize("span", [(1e6, 2e6), (-3, -2)])
def test_a_stretch_of_time_without_any_step_has_no_numbers_and_is_drawn_empty(engine, board, until, span):
    board.select(*span)
    until(lambda: board.frame.get("span") == span)
    assert dict(board.frame["numbers"])["tokens/s"] == "none"
    assert {one["count"] for one in board.frame["charts"]} == {0}
    ET.fromstring(board.snapshot().data)


def test_it_follows_the_moment_that_all_views_share(engine, board, until):
    target = engine.trace.end - 5
    press(board, "seek", target)
    until(lambda: board.frame.get("cursor") is not None)
    record = engine.trace.record(target)
    assert board.frame["cursor"] == record.time - board._columns().origin
    press(board, "seek_time", board.frame["cursor"] - 1e-6)
    until(lambda: board.frame["moment"]["at"] == target - 1)
    press(board, "live")
    until(lambda: board.frame["cursor"] is None)


def test_the_header_tells_the_time_at_which_the_cursor_stands(fresh_engine):
    fresh_engine.pause()
    request = fresh_engine.submit("Once upon a time", LONG)
    time.sleep(0.2)  # it waits: time is counted from its arrival
    fresh_engine.step(20)
    board = Dashboard(fresh_engine)
    press(board, "seek", 10)
    board.refresh()
    arrival = next(iter(fresh_engine.trace.sequences.values())).arrival
    assert board.frame["cursor"] == fresh_engine.trace.record(10).time - arrival > 0.2
    assert board.frame["moment"]["seconds"] == round(board.frame["cursor"], 4)
    request.cancel()


def test_views_that_are_opened_late_count_from_where_the_first_one_did():
    with Engine("tales", num_gpu_blocks_override=64, max_model_len=256, trace_steps=32) as engine:
        engine.generate("Once", SHORT)
        blocks = BlockTableView(engine)
        blocks.refresh()
        engine.generate("Once", SamplingParams(max_tokens=100, ignore_eos=True))
        assert engine.trace.first > 12
        board = Dashboard(engine)
        press(board, "seek", engine.trace.first + 3)
        board.refresh()
        blocks.refresh()
        assert round(board.frame["cursor"], 4) == board.frame["moment"]["seconds"] == blocks.frame["moment"]["seconds"] > 0


def test_its_controls_change_the_running_engine(engine, board, until):
    until(lambda: board.frame.get("controls"))
    most = engine.info.max_num_seqs
    assert board.frame["controls"]["most_seqs"] == board.frame["controls"]["max_num_seqs"] == most
    try:
        press(board, "limits", {"max_num_seqs": 2})
        press(board, "limits", {"max_num_batched_tokens": 40})
        press(board, "policy", "static")
        until(lambda: board.frame["controls"]["policy"] == "static")
        assert (engine.stats()["max_num_seqs"], engine.stats()["max_num_batched_tokens"]) == (2, 40)
        assert type(engine._scheduler.policy) is StaticBatching
        before = engine.trace.end
        press(board, "burst", {"shape": "fixed", "count": 5, "prompt": 30, "output": 10})
        until(lambda: "5 requests of shape fixed: 150 tokens in, 50 out" in board.frame["note"])
        until(lambda: engine.status == "idle" and engine.trace.end > before)
        records = engine.trace.since(before)
        assert max(record.num_running for record in records) == 2
        assert max(record.num_tokens for record in records) <= 40
        press(board, "limits", {"max_num_seqs": most + 1})
        until(lambda: f"max_num_seqs must be between 1 and {most}" in board.frame["trouble"])
    finally:
        engine.set_limits(max_num_seqs=most, max_num_batched_tokens=engine.info.max_num_batched_tokens)
        engine.use(policy="fcfs")


def test_a_request_is_cancelled_by_its_name(engine, board, until):
    one, two = engine.submit_all(["Once upon a time", "The fox"], LONG)
    until(lambda: {one.id, two.id} <= set((board.frame.get("controls") or {"requests": []})["requests"]))
    press(board, "cancel", one.id)
    assert one.result(timeout=20).outputs[0].finish_reason == "abort"
    until(lambda: one.id not in (board.frame.get("controls") or {"requests": []})["requests"])
    assert two.id in board.frame["controls"]["requests"]
    press(board, "cancel_all")
    assert two.result(timeout=20).outputs[0].finish_reason == "abort"
    press(board, "cancel", "r99999")
    until(lambda: "no request 'r99999' is waiting or running" in board.frame["trouble"])


def test_a_panel_of_ones_own_belongs_to_one_dashboard_and_its_error_is_shown(engine, board, until):
    other = Dashboard(engine)
    seen(other)
    board.add_panel("batch size", lambda trace: {"sequences": [len(record.uids) for record in trace]})
    until(lambda: board.frame.get("charts") and len(board.frame["charts"]) == 9)
    mine = chart(board, "panel batch size")
    assert mine["title"] == "batch size"
    assert line(board, "panel batch size", "sequences").max() == max(len(record.uids) for record in engine.trace)
    until(lambda: other.frame.get("charts"))
    assert len(other.frame["charts"]) == 8

    board.add_panel("broken", lambda trace: 1 / 0)
    until(lambda: "the panel 'broken': ZeroDivisionError" in board.frame["trouble"])
    assert "line" in board.frame["trouble"]
    assert len(board.frame["charts"]) == 9  # the others are drawn all the same
    board.remove_panel("broken")
    until(lambda: board.frame["trouble"] == "")
    board.add_panel("points", lambda trace: Series("my points", "s", np.array([0.0, 1.0]), {"x": np.array([1.0, 2.0])}, "points"))
    until(lambda: any(one["title"] == "my points" and one["style"] == "points" for one in board.frame["charts"]))
    with pytest.raises(ValueError, match="no panel 'batch sizes'; did you mean 'batch size'"):
        board.remove_panel("batch sizes")
    with pytest.raises(TypeError, match="a function of a trace"):
        board.add_panel("x", 7)
    other.close()


def test_unknown_options_are_refused(engine):
    with pytest.raises(TypeError, match="did you mean 'charts'"):
        Dashboard(engine, chart="pictures")
    with pytest.raises(ValueError, match="charts must be"):
        Dashboard(engine, charts="svg")
    with pytest.raises(ValueError, match="no control is called 'explode'"):
        Dashboard(engine).act("explode", None)


def test_its_picture_is_an_svg_with_every_chart_and_needs_no_script(engine, board):
    board.add_panel("a < b", lambda trace: {"<x>": [record.step for record in trace]})
    picture = board.snapshot().data
    ET.fromstring(picture)
    assert "<script" not in picture
    for title in ("KV cache", "Batch", "Sequences", "Throughput", "Between tokens", "Time to first token", "Prefix cache", "Step time"):
        assert title in picture
    assert "a &lt; b" in picture
    assert len(picture) < 100_000


def test_where_plotly_does_not_load_pictures_are_sent(engine, board, until):
    press(board, "pictures")
    until(lambda: board.frame.get("picture", "").startswith("<svg"))
    assert "charts" not in board.frame


def test_plotly_is_sent_once_it_is_asked_for(engine, board, monkeypatch):
    import gzip

    sent = []
    monkeypatch.setattr(board, "send", lambda message, buffers=None: sent.append((message, buffers)))
    press(board, "plotly")
    (message, (zipped,)) = sent[0]
    assert message == {"plotly": True}
    assert b"Plotly" in gzip.decompress(zipped)
    assert len(zipped) < 2_000_000


def test_http_traffic_is_shown_once_the_engine_has_served(engine, board, until, monkeypatch):
    stats = {"servers": [], "active_streams": 0, "requests": {}, "bytes_sent": 0}
    monkeypatch.setattr(type(engine), "http_stats", lambda self: dict(stats), raising=False)
    until(lambda: board.frame.get("charts"))
    assert board.frame["http"] is None
    stats.update(servers=[{"url": "http://127.0.0.1:1", "socket": None}], requests={"200": 3}, bytes_sent=77)
    until(lambda: board.frame["http"] is not None)
    assert board.frame["http"]["servers"] == "http://127.0.0.1:1"
    assert board.frame["http"]["requests"] == {"200": 3}


def test_a_trace_without_an_engine_has_charts_and_no_controls(engine, until, tmp_path):
    engine.generate("Once", SHORT)
    board = Dashboard(Trace.load(engine.trace.save(tmp_path / "run.trace")))
    seen(board)
    until(lambda: board.frame.get("charts"))
    assert board.frame["controls"] is None
    press(board, "cancel_all")
    assert "there is no engine to control" in board.frame["trouble"]


def test_closing_it_stops_its_updates(engine, board, until):
    until(lambda: board.updates)
    board.close()
    updates = board.updates
    engine.generate("Once", SHORT)
    time.sleep(0.3)
    assert board.updates == updates


def test_an_open_dashboard_keeps_no_engine_alive_and_shows_its_last_state(until):
    engine = Engine("tales", num_gpu_blocks_override=64, max_model_len=256)
    board, gone = Dashboard(engine), weakref.ref(engine)
    seen(board)
    engine.generate("Once", SHORT)
    until(lambda: board.frame.get("charts"))
    steps = engine.trace.end
    del engine
    gc.collect()
    assert gone() is None
    assert board.frame["moment"]["status"] == "closed"
    assert board.frame["moment"]["last"] == steps - 1
    assert board.frame["controls"] is None
    press(board, "cancel_all")
    assert "was closed" in board.frame["trouble"]
    board.close()


def test_watching_brings_the_picture_up_to_date_without_widgets(engine, board, until):
    class Picture:
        updates = 0

        def update(self, bundle, raw):
            assert bundle["image/svg+xml"].startswith("<svg")
            self.updates += 1

    board._picture = Picture()
    request = engine.submit("Once upon a time", LONG)
    until(lambda: engine.status == "running")
    board.watch(1.5)
    assert board._picture.updates >= 2
    request.cancel()


# ── load ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_burst_runs_to_its_full_lengths_and_the_same_seed_gives_the_same(engine):
    one = burst(engine, "fixed", count=3, prompt=20, output=7, seed=5)
    two = burst(engine, "fixed", count=3, prompt=20, output=7, seed=5)
    outputs = [request.result(timeout=60) for request in one.requests + two.requests]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [7] * 6
    prompts = [output.prompt_token_ids for output in outputs]
    assert prompts[:3] == prompts[3:]
    assert prompts[0] != burst(engine, "fixed", count=1, prompt=20, output=1).requests[0].prompt_token_ids


@pytest.mark.parametrize("shape", ["sharegpt", "nano"])
def test_lengths_that_do_not_fit_are_shortened_and_said_so(fresh_engine, shape):
    made = burst(fresh_engine, shape, count=20, seed=1)
    assert "shortened to fit into max_model_len=256" in made.told
    for request in made.requests:
        assert 1 <= len(request.prompt_token_ids) < 256
    made.cancel()


def test_a_wrong_burst_is_refused(engine):
    with pytest.raises(ValueError, match="did you mean 'sharegpt'"):
        burst(engine, "sharegtp")
    with pytest.raises(ValueError, match="count must be a whole number"):
        burst(engine, "fixed", count=0)
    with pytest.raises(ValueError, match="at most 10,000"):
        burst(engine, "fixed", count=10**6)


def test_limits_are_checked_and_told(fresh_engine):
    with pytest.raises(TypeError, match="must be a whole number"):
        fresh_engine.set_limits(max_num_seqs="4")
    with pytest.raises(ValueError, match="between 1 and"):
        fresh_engine.set_limits(max_num_batched_tokens=0)
    with pytest.raises(TypeError, match="did you mean 'max_num_seqs'"):
        fresh_engine.set_limits(max_num_seq=4)
    fresh_engine.set_limits(max_num_seqs=1)
    assert fresh_engine.stats()["max_num_seqs"] == 1
    fresh_engine.generate(["Once", "The fox", "A king"], SHORT)
    assert max(record.num_running for record in fresh_engine.trace) == 1


def test_a_policy_of_ones_own_is_named(engine, board, until):
    class Mine(Policy):
        pass

    engine.use(policy=Mine)
    try:
        until(lambda: board.frame.get("controls") and board.frame["controls"]["policy"].endswith("Mine"))
    finally:
        engine.use(policy="fcfs")

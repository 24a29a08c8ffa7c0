"""The moment that views share: live or past, paused, stepped, slowed, and what a view costs when nobody looks."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from itertools import chain, repeat

import pytest

from nbengine import Engine, SamplingParams
from nbengine.widgets.playhead import SHARE, Playhead
from nbengine.widgets.view import CHEAP, View

LONG = SamplingParams(max_tokens=600, ignore_eos=True, temperature=0)


class Counting(View):
    """Shows how many steps there were."""

    title = "Steps"
    _esm = "export default { render() {} }"
    fails = False

    def state(self):
        if self.fails:
            raise ZeroDivisionError("on purpose")
        return {"steps": self.playhead.trace.end}

    def picture(self):
        return f'<svg xmlns="http://www.w3.org/2000/svg"><text>{self.playhead.number}</text></svg>'

    def summary(self):
        return f"{self.playhead.number} steps"


class Nobody:
    looked_at = False


class Picture:
    """The display of a picture: what it was brought up to date with."""

    def __init__(self):
        self.shown = []

    def update(self, bundle, raw):
        assert raw
        self.shown.append(bundle["image/svg+xml"].split("<text>")[1].split("<")[0])


def seen(view, seen=True, place="a"):
    view._hear(view, {"place": place, "seen": seen}, [])


def press(view, name, value=None):
    view._hear(view, {"place": "a", "press": name, "value": value}, [])


def test_an_engine_its_llm_and_its_trace_have_one_playhead(engine):
    assert Playhead.of(engine) is Playhead.of(engine.trace)
    assert Playhead.of(type("LLM", (), {"engine": engine})()) is Playhead.of(engine)
    with pytest.raises(TypeError, match="an Engine or a Trace, not int"):
        Playhead.of(7)


def test_a_view_moves_while_the_engine_runs_and_at_most_ten_times_a_second(engine, until):
    view = Counting(engine)
    seen(view)
    request = engine.submit("Once upon a time", LONG)
    until(lambda: view.frame.get("steps", 0) > 20)
    updates, began = view.updates, time.monotonic()
    time.sleep(0.7)
    assert 0 < view.updates - updates <= (time.monotonic() - began) * 10 + 2
    request.cancel()
    until(lambda: engine.status == "idle")
    until(lambda: view.frame["steps"] == engine.trace.end)


class Costly(Counting):
    """Keeps the processor busy in each update, or in one."""

    def __init__(self, source, costs):
        self.costs = costs
        super().__init__(source)

    def state(self):
        until = time.thread_time() + next(self.costs)
        while time.thread_time() < until:
            pass
        return super().state()


@pytest.mark.parametrize(("costs", "seldom"), [([0, 0.05], False), ([0.01] * 100, True)])
def test_an_update_that_is_costly_once_holds_nothing_up_but_costly_ones_come_seldom(fresh_engine, until, costs, seldom):
    view = Costly(fresh_engine, chain(costs, repeat(0)))
    seen(view)
    fresh_engine.submit("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
    until(lambda: view.updates >= 3)
    until(lambda: (view.playhead._ticker.seconds >= SHARE * 0.01) == seldom)


def test_nothing_is_sent_when_nobody_looks_or_nothing_changes(engine, until):
    view = Counting(engine)
    assert view.frame == {}
    seen(view)
    until(lambda: view.updates == 1)
    time.sleep(0.4)
    assert view.updates == 1
    seen(view, False)
    engine.generate("Once", SamplingParams(max_tokens=5))
    time.sleep(0.3)
    assert view.updates == 1
    assert view.playhead._ticker.stopped
    seen(view)
    until(lambda: view.frame["steps"] == engine.trace.end)


def test_a_closed_view_gets_nothing_more(engine):
    view = Counting(engine)
    seen(view)
    view.close()
    updates = view.updates
    engine.generate("Once", SamplingParams(max_tokens=5))
    time.sleep(0.3)
    assert view.updates == updates
    assert view not in view.playhead._views


def test_pause_step_and_resume_move_the_engine(engine, until):
    view = Counting(engine)
    seen(view)
    request = engine.submit("Once upon a time", LONG)
    press(view, "pause")
    until(lambda: engine.status == "paused")
    until(lambda: view.frame["moment"]["status"] == "paused")
    steps = engine.stats()["steps"]
    press(view, "step")
    until(lambda: engine.stats()["steps"] == steps + 1)
    time.sleep(0.1)
    assert engine.stats()["steps"] == steps + 1
    press(view, "resume")
    until(lambda: engine.stats()["steps"] > steps + 5)
    request.cancel()


def test_a_slowed_engine_runs_at_the_chosen_speed_and_is_let_go_by_its_last_view(engine, until):
    view = Counting(engine)
    seen(view)
    request = engine.submit("Once upon a time", LONG)
    press(view, "speed", 10)
    until(lambda: view.playhead.status == "running slowly")
    steps = engine.stats()["steps"]
    time.sleep(1)
    assert 4 <= engine.stats()["steps"] - steps <= 14
    view.close()
    until(lambda: engine.stats()["steps"] > steps + 60)
    request.cancel()


def test_all_views_show_the_same_past_moment_and_return_to_live(engine, until):
    one, two = Counting(engine), Counting(engine)
    seen(one)
    seen(two)
    engine.generate("Once upon a time", SamplingParams(max_tokens=12, ignore_eos=True))
    target = engine.trace.end - 6
    press(one, "seek", target)
    until(lambda: one.frame["moment"]["at"] == two.frame["moment"]["at"] == target)
    assert one.frame["moment"]["step"] == engine.trace.record(target).step
    press(two, "back")
    until(lambda: one.frame["moment"]["at"] == target - 1)
    press(one, "live")
    until(lambda: two.frame["moment"]["live"] and two.frame["moment"]["at"] == engine.trace.end - 1)


def test_an_exception_appears_under_the_view_and_goes_with_the_next_press(engine, until):
    view = Counting(engine)
    seen(view)
    press(view, "explode")
    assert view.frame["trouble"].startswith("ValueError: no control is called 'explode'")
    press(view, "live")
    until(lambda: view.frame["trouble"] == "")
    view.fails = True
    engine.generate("Once", SamplingParams(max_tokens=3))
    until(lambda: view.frame["trouble"] == "ZeroDivisionError: on purpose")


def test_a_number_that_no_page_could_read_is_not_sent_but_said_under_the_view(engine, until):
    view = Counting(engine)
    seen(view)
    until(lambda: view.frame)
    steps = view.frame["steps"]
    view.state = lambda: {"steps": math.inf}
    engine.generate("Once", SamplingParams(max_tokens=3))
    until(lambda: "Out of range float" in view.frame["trouble"])
    assert json.loads(view.packed["json"])["steps"] == steps
    del view.state
    engine.generate("Once", SamplingParams(max_tokens=3))
    press(view, "live")
    until(lambda: view.frame["steps"] == engine.trace.end and view.frame["trouble"] == "")


def test_a_view_keeps_no_engine_alive_and_says_that_it_is_closed():
    engine = Engine("tales", num_gpu_blocks_override=64, max_model_len=256)
    view, gone = Counting(engine), weakref.ref(engine)
    seen(view)
    engine.generate("Once", SamplingParams(max_tokens=3))
    del engine
    gc.collect()
    assert gone() is None
    assert view.playhead.status == "closed"
    press(view, "back")
    assert view.frame["moment"]["live"] is False
    press(view, "live")
    press(view, "step")
    view.close()


def test_closing_the_engine_brings_a_last_update(fresh_engine):
    view = Counting(fresh_engine)
    seen(view)
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    fresh_engine.close()
    assert view.frame["moment"]["status"] == "closed"
    assert view.frame["steps"] == fresh_engine.trace.end
    view.close()


def test_an_engine_ends_soon_though_its_views_are_held(fresh_engine):
    view = Counting(fresh_engine)
    with view.playhead.lock:  # as by a view that is looking when an engine is found to be garbage
        began = time.monotonic()
        fresh_engine.close()
        assert time.monotonic() - began < 4.0
    view.close()


def test_what_plays_through_the_record_stands_when_the_engine_is_closed_and_can_be_played_on(fresh_engine, until):
    view = Counting(fresh_engine)
    seen(view)
    fresh_engine.generate("Once", SamplingParams(max_tokens=30, ignore_eos=True))
    press(view, "seek", 3)
    press(view, "speed", 5)
    press(view, "resume")
    until(lambda: view.frame["moment"]["playing"])
    fresh_engine.close()
    assert not view.playhead.playing
    assert view.frame["moment"]["playing"] is False
    at = view.playhead.number
    press(view, "resume")
    until(lambda: view.frame["moment"]["at"] > at)
    view.close()


def test_a_picture_is_of_the_end_of_each_cell_that_changed_something_though_nobody_looks(fresh_engine):
    view = Counting(fresh_engine)
    view._picture = picture = Picture()
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    view._cells._end()
    assert picture.shown == [str(fresh_engine.trace.end - 1)]
    view._cells._end()
    assert len(picture.shown) == 1
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    view._cells._end()
    assert picture.shown[1:] == [str(fresh_engine.trace.end - 1)]
    assert view.updates == 0
    seen(view)
    view._hear(view, {"place": "a", "gone": True}, [])  # its output was cleared
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    view._cells._end()
    assert len(picture.shown) == 2
    seen(view, False)  # it is drawn again, out of sight
    view._cells._end()
    assert picture.shown[2:] == [str(fresh_engine.trace.end - 1)]
    view.close()


def test_costly_pictures_get_no_more_than_their_share_of_the_time(fresh_engine):
    view = Counting(fresh_engine)
    view._picture = picture = Picture()
    view._took.extend([0.0, 10 * CHEAP, 0.0])  # one that is costly once holds nothing up
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    view._cells._end()
    assert len(picture.shown) == 1
    view._took.extend([10 * CHEAP] * 3)
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    view._cells._end()
    assert len(picture.shown) == 1
    view._picture_time -= 10 * CHEAP * SHARE
    view._cells._end()
    assert picture.shown[1:] == [str(fresh_engine.trace.end - 1)]
    view.close()


def test_closing_the_engine_brings_a_last_picture_though_nobody_looks(fresh_engine, until):
    view = Counting(fresh_engine)
    view._picture = picture = Picture()
    seen(view)
    until(lambda: view.updates == 1)
    seen(view, False)
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    fresh_engine.close()
    assert picture.shown[-1] == str(fresh_engine.trace.end - 1)
    view._cells._end()
    assert len(picture.shown) == 1
    view.close()


def test_an_error_in_a_picture_is_shown_under_its_view_and_not_under_the_cell(fresh_engine):
    view = Counting(fresh_engine)
    view._picture = Picture()
    view.picture = lambda: 1 / 0
    fresh_engine.generate("Once", SamplingParams(max_tokens=3))
    view._cells._end()
    assert view.frame["trouble"].startswith("ZeroDivisionError")
    del view.picture
    view.close()


def test_a_cell_that_ends_keeps_no_view_alive(fresh_engine):
    view = Counting(fresh_engine)
    cells, gone = view._cells, weakref.ref(view)
    view.close()
    del view
    gc.collect()
    assert gone() is None
    cells._end()


def test_a_recorded_trace_plays_by_itself_to_its_end_and_leaves_no_thread(engine, until):
    engine.generate("Once", SamplingParams(max_tokens=30, ignore_eos=True))
    playhead = Playhead(engine.trace, None)
    playhead.seek(engine.trace.end - 10)
    playhead.set_speed(50)
    playhead.resume()
    until(lambda: playhead.number == engine.trace.end - 1)
    playhead.remove(Nobody())

"""The dashboard and the comparison as a person sees them in JupyterLab: they appear, move while a cell runs, are brushed, and hear their buttons."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

LOAD = "from nbengine.burst import burst\nb = burst(e, 'fixed', count={count}, prompt=40, output={output}, seed={seed})"
CHARTS = 8
RUN = """\
from nbengine import Engine, SamplingParams
from nbengine.widgets import compare
def run(policy):
    with Engine('tales', num_gpu_blocks_override=64, max_model_len=256, max_num_seqs=4, scheduling_policy=policy) as engine:
        params = [SamplingParams(max_tokens=4 + 36 * (i % 4 == 0), ignore_eos=True) for i in range(12)]
        engine.generate(['Once', 'The fox', 'A king'] * 4, params)
        return engine.trace
static, continuous = run('static'), run('fcfs')"""


@pytest.fixture(scope="module")
def board(notebook):
    """The cell of an open dashboard whose charts have been drawn, over an engine that has done something."""
    notebook.run("%load_ext nbengine")
    notebook.run("%engine load tales --num-gpu-blocks-override 256 --max-model-len 512 --max-num-seqs 8 --out e")
    notebook.run(LOAD.format(count=12, output=30, seed=1) + "\nfor request in b.requests: request.result()")
    cell = notebook.run("board = %dashboard\nboard")
    cell.box.locator(".nbengine-charts[data-drawn]").wait_for()
    return cell


def drawn(cell) -> int:
    """How often plotly has drawn."""
    return int(cell.box.locator(".nbengine-charts").get_attribute("data-drawn"))


def until_charts(cell, become: str) -> None:
    """Wait until this is true of the `plot`: plotly draws when it has rested."""
    charts = cell.box.locator(".nbengine-charts")
    cell.box.page.wait_for_function(f"plot => {{ {become} }}", arg=charts.element_handle())


def until_drawn_again(cell, before: int) -> None:
    until_charts(cell, f"return Number(plot.dataset.drawn) > {before}")


def drag(page, box, begin: float, end: float) -> None:
    """Across a part of the page, from one share of its width to another."""
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + begin * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + (begin + end) / 2 * box["width"], y, steps=4)
    page.mouse.move(box["x"] + end * box["width"], y, steps=4)
    page.mouse.up()


def test_it_appears_with_its_charts_and_says_what_each_control_is(notebook, board):
    expect(board.box.locator(".nbengine-charts .cartesianlayer .subplot")).to_have_count(CHARTS)
    for title in ("KV cache", "Batch", "Sequences", "Throughput", "Between tokens", "Time to first token", "Prefix cache", "Step time"):
        expect(board.box.locator(".nbengine-charts .annotation-text", has_text=title)).to_have_count(1)
    for label in ("max_num_seqs", "max_num_batched_tokens", "Scheduling policy", "Shape of the load", "From: time of the charts"):
        expect(board.box.get_by_label(label, exact=True)).to_have_count(1)
    board.box.scroll_into_view_if_needed()
    notebook.shoot("dashboard-light", board)


def test_it_moves_while_a_cell_runs(notebook, board):
    cell = notebook.start("%%generate -m 400 --ignore-eos --no-chat --seed 1\nOnce upon a time")
    board.box.locator(".nbengine-charts").scroll_into_view_if_needed()
    for _ in range(3):
        until_drawn_again(board, drawn(board))
    assert cell.running
    expect(board.box.locator(".nbengine-status").first).to_contain_text("engine running")
    cell.button("Cancel").click()
    cell.ended()
    expect(board.box.locator(".nbengine-status").first).to_contain_text("engine idle")


def test_it_moves_while_a_cell_blocks_the_kernel(notebook, board):
    cell = notebook.start(LOAD.format(count=4, output=200, seed=2) + "\nfor request in b.requests: request.result()")
    board.box.locator(".nbengine-charts").scroll_into_view_if_needed()
    for _ in range(3):
        until_drawn_again(board, drawn(board))
    assert cell.running
    cell.ended()


def test_dragging_over_a_chart_chooses_a_stretch_of_time_for_all_of_them(notebook, board):
    pane = board.box.locator(".nbengine-pane")
    expect(pane).to_be_hidden()
    chart = board.box.locator(".nbengine-charts .draglayer .nsewdrag").first
    chart.scroll_into_view_if_needed()
    drag(notebook.page, chart.bounding_box(), 0.2, 0.6)
    expect(pane).to_be_visible()
    chosen = board.box.locator(".nbengine-ends output")
    expect(chosen).to_have_text(re.compile(r"^[\d.]+ s to [\d.]+ s$"))
    begin, end = map(float, re.findall(r"[\d.]+", chosen.inner_text()))
    expect(board.box.locator(".nbengine-numbers").first).to_contain_text(f"{begin:.2f} to {end:.2f} s")  # the kernel's numbers are of it
    for axis in ("xaxis", "xaxis2", "xaxis8"):
        until_charts(
            board, f"const [from, to] = plot._fullLayout.{axis}.range; return Math.abs(from - {begin}) + Math.abs(to - {end}) < 0.02"
        )
    assert eval(notebook.run("print(board.selected)").body.inner_text()) == pytest.approx((begin, end), abs=0.01)
    notebook.shoot("dashboard-brushed", board)


def test_the_strip_below_moves_the_stretch_and_lets_go_of_it(notebook, board):
    strip, pane = board.box.locator(".nbengine-strip"), board.box.locator(".nbengine-pane")
    strip.scroll_into_view_if_needed()
    board.box.get_by_role("button", name="All", exact=True).click()
    expect(pane).to_be_hidden()
    drag(notebook.page, strip.bounding_box(), 0.1, 0.3)
    expect(pane).to_be_visible()
    before = pane.bounding_box()
    drag(notebook.page, strip.bounding_box(), 0.2, 0.5)  # it is held where it is
    after = pane.bounding_box()
    assert after["width"] == pytest.approx(before["width"], abs=3)
    assert after["x"] - before["x"] == pytest.approx(0.3 * strip.bounding_box()["width"], abs=4)
    end = board.box.get_by_label("To: time of the charts")
    end.focus()
    notebook.page.keyboard.press("End")
    right = strip.bounding_box()
    notebook.page.wait_for_timeout(100)
    assert pane.bounding_box()["x"] + pane.bounding_box()["width"] == pytest.approx(right["x"] + right["width"], abs=4)
    strip.dblclick(position={"x": 3, "y": 10})
    expect(pane).to_be_hidden()


def test_a_past_moment_is_marked_in_every_chart_until_it_is_live_again(notebook, board):
    lines = board.box.locator(".nbengine-charts .shapelayer path")
    board.box.get_by_role("button", name="Back").click()
    expect(lines).to_have_count(CHARTS)
    expect(board.box.locator(".nbengine-status").first).to_contain_text("looking back")
    board.box.get_by_role("button", name="Live", exact=True).click()
    expect(lines).to_have_count(0)


def test_load_limits_and_policy_are_set_while_it_runs(notebook, board):
    note = board.box.locator(".nbengine-note")
    board.box.get_by_label("Shape of the load").select_option("fixed")
    for label, value in (("Requests in a burst", "6"), ("Tokens in", "30"), ("Tokens out", "450")):
        board.box.get_by_label(label, exact=True).fill(value)
    board.box.get_by_label("max_num_seqs").fill("2")
    notebook.page.keyboard.press("Tab")
    board.box.get_by_label("Scheduling policy").select_option("static")
    board.box.get_by_role("button", name="Submit").click()
    expect(note).to_contain_text("6 requests of shape fixed: 180 tokens in, 2,700 out")
    expect(board.box.get_by_label("Request to cancel").locator("option")).not_to_have_count(0)
    board.box.get_by_role("button", name="Cancel", exact=True).click()
    expect(note).to_contain_text(re.compile(r"r\d+ was cancelled"))
    board.box.get_by_role("button", name="Cancel all").click()
    expect(note).to_contain_text(re.compile(r"\d requests were cancelled"))
    said = notebook.run("print(e.stats()['max_num_seqs'], type(e.policy).__name__)")
    assert said.body.inner_text().split() == ["2", "StaticBatching"]
    board.box.get_by_label("max_num_seqs").fill("99")
    notebook.page.keyboard.press("Tab")
    expect(board.box.locator(".nbengine-trouble")).to_contain_text("max_num_seqs must be between 1 and 8")
    board.box.get_by_label("max_num_seqs").fill("8")
    notebook.page.keyboard.press("Tab")
    board.box.get_by_label("Scheduling policy").select_option("fcfs")
    expect(board.box.locator(".nbengine-trouble")).to_be_empty()


def test_a_panel_of_ones_own_is_drawn_and_its_error_is_shown_under_the_widget(notebook, board):
    notebook.run("board.add_panel('my panel', lambda trace: {'sequences': [len(r.uids) for r in trace]})")
    board.box.locator(".nbengine-charts").scroll_into_view_if_needed()
    expect(board.box.locator(".nbengine-charts .annotation-text", has_text="my panel")).to_have_count(1)
    notebook.run("board.add_panel('broken', lambda trace: {'x': 1 / 0})")
    board.box.locator(".nbengine-charts").scroll_into_view_if_needed()
    expect(board.box.locator(".nbengine-trouble")).to_contain_text("the panel 'broken': ZeroDivisionError")
    notebook.run("board.remove_panel('broken'); board.remove_panel('my panel')")
    board.box.locator(".nbengine-charts").scroll_into_view_if_needed()
    expect(board.box.locator(".nbengine-trouble")).to_be_empty()


def test_two_traces_are_compared_under_one_scrubber(notebook, board):
    notebook.run(RUN)
    cell = notebook.run("compare(static, continuous, labels=('static', 'continuous'))")
    expect(cell.box.locator("canvas")).to_have_count(2)
    expect(cell.box.locator("tbody tr")).to_have_count(12)
    expect(cell.box.locator(".nbengine-side").first).to_contain_text("finished")
    scrub = cell.box.get_by_label("Time on both clocks")
    scrub.focus()
    notebook.page.keyboard.press("Home")
    for side in cell.box.locator(".nbengine-side").all():
        expect(side).to_contain_text(re.compile(r"\b0 tokens"))
    cell.box.get_by_role("button", name="Play").click()
    expect(cell.box.locator(".nbengine-side").first).to_contain_text(re.compile(r"[1-9] running"))
    expect(cell.box.locator(".nbengine-side").last).to_contain_text("finished")
    expect(cell.box.get_by_role("button", name="Play")).to_be_visible()
    cell.box.scroll_into_view_if_needed()
    scrub.fill("400")
    notebook.shoot("compare-light", cell)


def test_the_saved_notebook_has_pictures_and_no_script(notebook, board):
    notebook.run("board.close()")
    saved = notebook.save()
    outputs = [output for cell in saved["cells"] for output in cell.get("outputs", [])]
    pictures = ["".join(output["data"]["image/svg+xml"]) for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert any("KV cache" in picture and "Step time" in picture for picture in pictures)
    assert any("static: KV cache" in picture for picture in pictures)
    assert all("<script" not in picture for picture in pictures)
    assert notebook.path.stat().st_size < 400_000


def test_it_is_drawn_anew_for_a_dark_theme_and_for_a_narrow_place(notebook, board):
    cell = notebook.run("%dashboard")
    cell.box.locator(".nbengine-charts[data-drawn]").wait_for()
    before = drawn(cell)
    notebook.theme("JupyterLab Dark")
    until_drawn_again(cell, before)
    ink = "getComputedStyle(plot.querySelector('.annotation-text')).fill.match(/[0-9.]+/g)"
    until_charts(cell, f"return Math.min(...{ink}.slice(0, 3)) > 150")  # light on dark
    cell.box.scroll_into_view_if_needed()
    notebook.page.wait_for_timeout(300)
    notebook.shoot("dashboard-dark", cell)
    before = drawn(cell)
    cell.box.locator(".nbengine-dashboard").evaluate("view => { view.style.width = '360px'; }")
    until_drawn_again(cell, before)
    until_charts(cell, "return plot._fullLayout.width <= 360 && plot.scrollWidth <= plot.clientWidth + 1")
    cell.box.locator(".nbengine-dashboard").screenshot(path=notebook._shots / "dashboard-narrow.png")


def test_where_plotly_does_not_load_the_charts_are_pictures_that_move(notebook, board):
    notebook.page.evaluate(
        """() => {
            const key = Symbol.for('nbengine.plotly');
            window.plotlyBefore = globalThis[key];
            globalThis[key] = Promise.reject(new Error('not in this page'));
            globalThis[key].catch(() => {});
        }"""
    )
    cell = notebook.run("pictures = %dashboard\npictures")
    picture = cell.box.locator(".nbengine-charts > svg")
    expect(picture).to_contain_text("KV cache")
    notebook.page.evaluate("() => { globalThis[Symbol.for('nbengine.plotly')] = window.plotlyBefore; }")
    said = picture.locator("title").text_content()
    notebook.run(LOAD.format(count=2, output=20, seed=3) + "\nfor request in b.requests: request.result()")
    cell.box.scroll_into_view_if_needed()
    expect(picture.locator("title")).not_to_have_text(said)
    notebook.run("pictures.close()")


def test_the_page_has_nothing_to_complain_of(board, console):
    assert console == []

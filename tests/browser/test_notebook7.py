"""The live views in Jupyter Notebook 7: they appear, move while a cell runs, hear their buttons, and fit a narrow window in both themes."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

RUN = "%%generate -m 300 --ignore-eos --no-chat --seed 1\nOnce upon a time"
# By how many pixels a view's parts reach out of it, at most.
OVERHANG = """view => {
    const right = view.getBoundingClientRect().right;
    return Math.max(...[...view.querySelectorAll('button, input, select, canvas, .nbengine-charts svg, label')]
        .filter(part => part.checkVisibility() && part.getClientRects().length)
        .map(part => part.getBoundingClientRect().right - right));
}"""


@pytest.fixture(scope="module")
def front_end():
    return "notebooks"


@pytest.fixture(scope="module")
def views(notebook, console):
    """By their names, in one output each, over an engine that has done something."""
    console.clear()  # Notebook 7.6 complains once of its own settings
    notebook.run("%load_ext nbengine")
    notebook.run("%engine load tales --num-gpu-blocks-override 256 --max-model-len 512 --out e")
    notebook.run(RUN)
    cells = {magic: notebook.run(f"{magic} = %{magic}\n{magic}") for magic in ("blocks", "timeline", "dashboard")}
    return {magic: cell.box.get_by_role("region").and_(cell.box.locator(".nbengine-view")) for magic, cell in cells.items()}


def test_they_appear(notebook, views):
    for magic, view in views.items():
        expect(view.locator("canvas, .nbengine-charts[data-drawn] .subplot").first).to_be_visible()
        expect(view.locator(".nbengine-status").first).to_contain_text(re.compile(r"engine idle · step \d+"))
        assert notebook.page.locator("svg[class*=nbengine-still], img[src*=nbengine-still]").filter(visible=True).count() == 0, magic


@pytest.mark.parametrize("magic", ["blocks", "timeline", "dashboard"])
def test_they_move_while_a_cell_runs(notebook, views, magic):
    view = views[magic]
    cell = notebook.start(RUN.replace("-m 300", "-m 490 -n 6"))  # seconds long
    view.scroll_into_view_if_needed()
    expect(cell.prompt).to_have_text("[*]:")
    places = set()
    while cell.running:
        places.add(view.locator(".nbengine-scrub").input_value())
        notebook.page.wait_for_timeout(30)
    assert len(places) >= 3
    expect(view.locator(".nbengine-status").first).to_contain_text("engine idle")


def test_looking_back_in_one_is_seen_in_all(views):
    blocks, timeline = views["blocks"], views["timeline"]
    timeline.scroll_into_view_if_needed()
    timeline.get_by_role("button", name="◂ Back", exact=True).click()
    expect(timeline.locator(".nbengine-status").first).to_contain_text("looking back")
    number = timeline.locator(".nbengine-scrub").input_value()
    blocks.scroll_into_view_if_needed()
    expect(blocks.locator(".nbengine-scrub")).to_have_value(number)
    expect(blocks.locator(".nbengine-status").first).to_contain_text("looking back")
    blocks.get_by_role("button", name="Live", exact=True).click()
    expect(blocks.locator(".nbengine-scrub")).to_have_value(str(int(number) + 1))


def test_shown_once_more_it_draws_what_it_has(notebook, views):
    cell = notebook.run("blocks")
    expect(cell.box.locator("canvas.nbengine-cells[data-frames]")).to_be_visible()
    expect(cell.box.locator(".nbengine-legend")).to_have_text(views["blocks"].locator(".nbengine-legend").text_content())


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_they_fit_a_wide_and_a_narrow_window_in_both_themes(notebook, views, theme):
    page = notebook.page
    notebook.theme(f"JupyterLab {theme}")
    for width in (1200, 360):
        page.set_viewport_size({"width": width, "height": 2000})  # the longest whole
        for magic, view in views.items():
            view.scroll_into_view_if_needed()
            page.wait_for_timeout(400)  # plotly draws anew
            view.screenshot(path=notebook._shots / f"notebook7-{magic}-{theme.lower()}-{width}.png")
            assert view.evaluate(OVERHANG) <= 1, (magic, width)
    page.set_viewport_size({"width": 1200, "height": 900})


def test_the_page_has_nothing_to_complain_of(views, console):
    assert console == []

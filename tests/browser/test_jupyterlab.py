"""What a person sees and presses in JupyterLab: text that streams, a stop button and Cancel that stop, and what a saved file holds."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from playwright.sync_api import Locator, expect

LONG = "%%generate -m 1500 --ignore-eos --no-chat --seed 1 --out g\nOnce upon a time"
SHORT = "-m 60 --ignore-eos --no-chat"
QUICK = 0.5  # seconds from click to idle
READABLE = 4.5  # what WCAG asks of text's contrast
LINE = re.compile(r"\d tokens? · first after .* · (?:[\d,]+ tokens/s · )?(\w+)")  # no speed where it stood still


@pytest.fixture(scope="module")
def ready(notebook):
    """The notebook with the extension and tales loaded."""
    notebook.run("%load_ext nbengine")
    assert "loaded in" in notebook.run("%engine load tales --num-gpu-blocks-override 512 --out e").text
    return notebook


def test_text_streams_and_ends_as_a_static_output_with_a_quiet_line(ready):
    cell = ready.start("%%generate -m 250 --ignore-eos --seed 1\nTell me a tale of a fox")
    cell.watch()
    cell.ended()
    assert len(cell.lengths()) >= 3
    assert ending(cell) == "length"
    expect(cell.output).to_contain_text("tokens/s")
    expect(cell.widget).to_have_count(0)
    expect(cell.button("Cancel")).to_have_count(0)


def test_the_stop_button_ends_the_cell_and_keeps_its_text(ready):
    cell = ready.start(LONG)
    for _ in range(3):
        cell.grows()
    before = opening(cell.body.inner_text())
    assert cell.seconds_to_end(ready.stop) < QUICK
    expect(ready.idle).to_be_visible()
    expect(cell.error).to_contain_text("stopped by the user")
    assert ending(cell) == "abort"
    assert before in flat(cell.text)
    expect(cell.widget).to_have_count(0)
    ready.shoot("after-stop", cell)
    assert_it_goes_on(ready)


@pytest.mark.parametrize("press", ["click", "Enter", "Space"])
def test_the_cancel_button_ends_the_cell_without_an_error(ready, press):
    cell = ready.start(LONG)
    button = cell.button("Cancel")
    button.wait_for()
    cell.grows()
    before = opening(cell.body.inner_text())
    if press == "click":
        ready.shoot("streaming", cell)
        ready.shoot("streaming-window")
        seconds = cell.seconds_to_end(button.click)
    else:
        tab_to(ready, cell, button)
        ready.shoot("button-focused", cell)
        seconds = cell.seconds_to_end(lambda: ready.page.keyboard.press(press))
    assert seconds < QUICK
    expect(button).to_have_count(0)
    expect(cell.error).to_have_count(0)
    assert ending(cell) == "abort"
    assert before in flat(cell.text)
    ready.shoot("after-cancel", cell)
    assert_it_goes_on(ready)


def test_a_cell_that_waits_on_a_paused_engine_says_so_and_offers_to_resume(ready):
    ready.run("%engine pause")
    cell = ready.start("%%generate -m 20 --ignore-eos --no-chat\nOnce upon a time")
    cell.button("Resume").wait_for()
    expect(cell.button("Cancel")).to_be_visible()
    expect(cell.output).to_contain_text("waiting: the engine is paused")
    assert cell.running
    ready.shoot("paused", cell)
    cell.button("Resume").click()
    assert ending(cell.ended()) == "length"
    expect(cell.widget).to_have_count(0)
    assert_it_goes_on(ready)


def test_two_cells_in_the_background_stream_into_their_own_outputs(ready):
    one = ready.run("%%generate --bg -m 1500 --ignore-eos --no-chat --seed 1 --out one\nThe king said")
    two = ready.run("%%generate --bg -m 1500 --ignore-eos --no-chat --seed 2 --out two\nThe fox ran")
    for cell in (one, two, one, two):
        cell.grows()
    ready.shoot("background")
    ready.run("one.cancel(); two.cancel(); one.settle(); two.settle();")
    for cell, name, other in ((one, "one", "two"), (two, "two", "one")):
        expect(cell.output).to_contain_text("abort")
        assert opening(printed(ready, f"{name}.text")) in flat(cell.text)
        assert opening(printed(ready, f"{other}.text")) not in flat(cell.text)
    assert_it_goes_on(ready)


def test_a_table_grows_under_a_progress_bar(ready):
    ready.run("animals = ['fox', 'raven', 'old wolf']")
    table = ready.start(f"%%generate --each animals {SHORT}\nOnce there was a {{item}} who")
    table.box.locator("progress").wait_for()
    ready.shoot("each-streaming", table)
    expect(table.ended().box.locator("tbody tr")).to_have_count(3)
    expect(table.box.locator("progress")).to_have_count(0)
    ready.shoot("each", table)


def test_tokens_and_controls_are_readable_in_both_themes(ready):
    for theme, light in (("JupyterLab Dark", "false"), ("JupyterLab Light", "true")):
        ready.theme(theme)
        expect(ready.page.locator("body")).to_have_attribute("data-jp-theme-light", light)
        cell = ready.start(LONG)
        button, line = cell.button("Cancel"), cell.widget.get_by_role("status")
        button.wait_for()
        assert min(contrast(button), contrast(line)) > READABLE
        ready.shoot(f"{theme.split()[1].lower()}-streaming", cell)
        ready.shoot(f"{theme.split()[1].lower()}-window")
        button.click()
        assert min(map(contrast, cell.ended().output.locator(".jp-RenderedHTML > div").all())) > READABLE
        tokens = ready.run(f"%%generate --logprobs --seed 3 {SHORT}\nOnce there was a fox who")
        spans = tokens.box.locator("span[title]").all()
        assert len(spans) > 30
        ready.shoot(f"{theme.split()[1].lower()}-logprobs", tokens)
        assert min(map(contrast, spans)) > READABLE


def test_a_saved_notebook_holds_static_outputs_that_other_tools_show(ready, tmp_path):
    ready.start(LONG).button("Cancel").click()
    ready.run(f"%%generate --out g {SHORT}\nThen the")
    text = printed(ready, "g.text")
    saved = ready.save()
    outputs = [output.get("data", {}) for cell in saved["cells"] for output in cell.get("outputs", [])]
    assert {kind for data in outputs for kind in data} == {"text/html", "text/plain"}
    assert "widgets" not in saved["metadata"]
    assert any(opening(text) in flat("".join(data.get("text/plain", []))) for data in outputs)
    if find_spec("nbconvert") is not None:
        command = [sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir", str(tmp_path), str(ready.path)]
        subprocess.run(command, check=True, capture_output=True, timeout=100)
        page = (tmp_path / f"{ready.path.stem}.html").read_text()
        assert opening(text) in flat(html.unescape(re.sub(r"<[^>]+>", " ", page)))


def test_the_page_has_nothing_to_complain_of(ready, console):
    cell = ready.start(LONG)
    cell.button("Cancel").click()
    cell.ended()
    expect(cell.widget).to_have_count(0)
    assert console == []


# ── looking ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ending(cell) -> str:
    """The last word of the quiet line."""
    expect(cell.output).to_contain_text(LINE)
    return LINE.search(cell.text)[1]


def printed(notebook, expression: str) -> str:
    """What an expression is in the kernel, through a cell of its own."""
    return notebook.run(f"print({expression})").body.inner_text().strip()


def assert_it_goes_on(notebook) -> None:
    """The next cell runs, and nothing was left behind."""
    assert ending(notebook.run("%%generate -m 3 --ignore-eos --no-chat\nThen")) == "length"
    assert printed(notebook, "e.stats()['num_running'], e.stats()['blocks_used']") == "0 0"


def tab_to(notebook, cell, part: Locator) -> None:
    """Select the cell and press Tab until this has the focus."""
    cell.prompt.click()
    for _ in range(10):
        notebook.page.keyboard.press("Tab")
        if part.evaluate("part => part === document.activeElement"):
            return
    pytest.fail("Tab does not lead to it")


def flat(text: str) -> str:
    return " ".join(text.split())


def opening(text: str) -> str:
    """Enough of a text's beginning to know it again."""
    return flat(text)[:40]


CONTRAST = """element => {
    const bytes = colour => {
        const context = new OffscreenCanvas(1, 1).getContext('2d');
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(getComputedStyle(at));
    let paper = [255, 255, 255, 1], opacity = 1;
    for (const style of chain) { paper = over(bytes(style.backgroundColor), paper); opacity *= style.opacity; }
    const ink = bytes(getComputedStyle(element).color);
    const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
        const c = colour[i] / 255;
        return sum + weight * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    }, 0.05);
    const pair = [light(over([...ink.slice(0, 3), ink[3] * opacity], paper)), light(paper)];
    return Math.max(...pair) / Math.min(...pair);
}"""


def contrast(part: Locator) -> float:
    """Between an element's text and what lies behind it."""
    return part.evaluate(CONTRAST)

"""The live views in a real JupyterLab: they appear, move, hear, and draw exactly what the pool is."""

from __future__ import annotations

import ast
import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import BlockingKernelClient
from playwright.sync_api import Locator, expect

PROMPT = "Once upon a time there was an old fox who lived in a hollow tree at the edge of the wood, and every night he said to the moon"
# Of each cell: the colour of its lower left corner, how high that goes, its middle and its upper right corner.
READ_CELLS = """canvas => {
    const { columns, side, gap, scale } = Object.fromEntries(Object.entries(canvas.dataset).map(([k, v]) => [k, Number(v)]));
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    const at = (x, y) => [...pixels.data.slice(4 * (y * scale * pixels.width + x * scale), 4 * (y * scale * pixels.width + x * scale) + 4)];
    const inner = side - gap, cells = [];
    for (let i = 0; i < COUNT; i++) {
        const [x, y] = [(i % columns) * side, Math.floor(i / columns) * side];
        const corner = at(x, y + inner - 1);
        let height = 0;
        while (height < inner && String(at(x, y + inner - 1 - height)) === String(corner)) height++;
        cells.push({ corner, height, middle: at(x + Math.floor(inner / 2), y + Math.floor(inner / 2)), right: at(x + inner - 1, y) });
    }
    return { inner, cells };
}"""
TRUTH = '''
import json
from nbengine import SamplingParams
from nbengine.widgets.palette import colour_of


def load(engine):
    """Prompts of which some share blocks, and copy them to write on."""
    texts = ["PROMPT", "The king"]
    params = [SamplingParams(n=3, max_tokens=90 + 40 * i, ignore_eos=True, seed=i) for i in range(5)]
    return [handle for one in params for handle in engine.submit_all(texts, one)]


def run(engine):
    for handle in load(engine):
        handle.result()


def truth(engine, view, number):
    """What must be drawn of each block."""
    state, cells = engine.trace.state(number), view._cells_now()
    assert cells.number == number
    holders = {}
    for uid, table in state.tables.items():
        for block in table:
            holders.setdefault(block, []).append(uid)
    return json.dumps([
        ["held", colour_of(holders[block][0]), cells.slots(block) / engine.trace.block_size, state.references[block] > 1, block in state.copied]
        if state.references[block] else ["cached" if block in state.cached else "free", "", 0, False, False]
        for block in range(engine.trace.num_blocks)
    ])


def shared(engine):
    """A block that several hold now, and who."""
    state = engine.trace.state(engine.trace.end - 1)
    block = next(block for block, count in enumerate(state.references) if count > 1)
    return [block, [uid for uid, table in state.tables.items() if block in table]]
'''


class Inside:
    """The notebook's kernel as another client of it: what it runs does not scroll the page away from the views."""

    def __init__(self, file: Path) -> None:
        self.client = BlockingKernelClient(connection_file=str(file))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str) -> None:
        self.value("None", code)

    def value(self, expression: str, code: str = "") -> Any:
        message = self.client.execute(code, user_expressions={"value": f"repr(({expression}))"}, allow_stdin=False)
        reply = self.client.get_shell_msg(timeout=120)
        while reply["parent_header"].get("msg_id") != message:
            reply = self.client.get_shell_msg(timeout=120)
        content = reply["content"]
        assert content["status"] == "ok", content
        return ast.literal_eval(ast.literal_eval(content["user_expressions"]["value"]["data"]["text/plain"]))


@pytest.fixture(scope="module")
def ready(notebook):
    """The notebook with tales loaded and a load that can be started."""
    (notebook.path.parent / "helpers.py").write_text(TRUTH.replace("PROMPT", PROMPT))
    notebook.run("%load_ext nbengine")
    assert "loaded in" in notebook.run("%engine load tales --num-gpu-blocks-override 300 --out e").text
    return notebook


@pytest.fixture(scope="module")
def inside(ready, lab) -> Iterator[Inside]:
    [file] = (lab.root.parent / "runtime").glob("kernel-*.json")
    inside = Inside(file)
    inside.run("from helpers import *")
    yield inside
    inside.client.stop_channels()


@pytest.fixture(scope="module")
def both(ready, inside):
    """A block table and a timeline in one output."""
    ready.page.set_viewport_size({"width": 1200, "height": 1500})
    cell = ready.run("from nbengine.widgets import BlockTableView, Timeline\nb, t = BlockTableView(e), Timeline(e)\ndisplay(b, t)")
    for canvas in ("cells", "lanes"):
        expect(cell.box.locator(f"canvas.nbengine-{canvas}")).to_be_visible()
    for told in cell.box.locator(".nbengine-status").all():
        expect(told).to_contain_text("engine idle")
    return cell


class Shown:
    """One view in an output."""

    def __init__(self, cell, name: str) -> None:
        self.cell = cell
        self.box = cell.box.get_by_role("region", name=name)

    def button(self, name: str) -> Locator:
        return self.box.get_by_role("button", name=name, exact=True)


@pytest.fixture
def blocks(both):
    return Shown(both, "KV blocks")


@pytest.fixture
def timeline(both):
    return Shown(both, "Timeline")


@pytest.fixture(autouse=True)
def calm(inside):
    """Each test begins with an idle engine, looked at live and at full speed."""
    yield
    inside.run("e.cancel_all(); e.trace.playhead.set_speed(None); e.trace.playhead.go_live(); e.resume()")


def status(cell) -> Locator:
    return cell.box.locator(".nbengine-status")


def shown(cell) -> int:
    """The record that a view shows."""
    return int(cell.box.locator(".nbengine-scrub").input_value())


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def assert_drawn(inside, cell, number: int) -> dict[str, int]:
    """Every block's pixels say what the pool was; how many blocks of each kind there were."""
    expected = json.loads(inside.value(f"truth(e, b, {number})"))
    canvas = cell.box.locator("canvas.nbengine-cells")
    drawn = canvas.evaluate(READ_CELLS.replace("COUNT", str(len(expected))))
    inner, seen = drawn["inner"], {"held": 0, "cached": 0, "free": 0, "shared": 0, "copied": 0, "partial": 0}
    for block, ((kind, colour, share, shared, copied), pixels) in enumerate(zip(expected, drawn["cells"], strict=True)):
        seen[kind] += 1
        seen["shared"] += shared
        seen["copied"] += copied
        seen["partial"] += 0 < share < 1
        if kind != "held":
            assert pixels["corner"][3] == pytest.approx({"cached": 199, "free": 36}[kind], abs=12), (block, kind, pixels)
            continue
        if share > 0:
            assert pixels["corner"] == [*rgb(colour), 255], (block, colour, pixels)
            high = inner if share == 1 else min(inner - 1, max(1, int(inner * share + 0.5)))
            assert pixels["height"] == high, (block, share, pixels)
        assert (pixels["middle"] == [255, 255, 255, 255]) == shared, (block, shared, pixels)
        assert (pixels["right"] == [34, 34, 34, 255]) == copied, (block, copied, pixels)
    return seen


def settled(ready, cell, number: int) -> None:
    """Wait until a view has drawn this record."""
    expect(cell.box.locator(".nbengine-scrub")).to_have_value(str(number))
    frames = cell.box.locator("canvas").first.get_attribute("data-frames")
    ready.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 60))))")
    assert frames is not None


def test_views_move_while_a_cell_runs(ready, inside, blocks, timeline):
    cell = ready.start("run(e)")
    places = set()
    for _ in range(200):
        if not cell.running:
            break
        places.add((shown(blocks), shown(timeline)))
        ready.page.wait_for_timeout(50)
    cell.ended()
    assert len({block for block, _ in places}) >= 3
    assert len({lane for _, lane in places}) >= 3
    expect(status(blocks)).to_contain_text("engine idle")
    expect(blocks.box.locator(".nbengine-scrub")).to_have_value(str(inside.value("e.trace.end - 1")))


def test_every_block_is_drawn_as_the_pool_was_at_any_moment(ready, inside, blocks):
    inside.run("e.reset_prefix_cache(); first = e.trace.end; run(e)")
    first, end = inside.value("first, e.trace.end")
    seen = []
    for part in (0.02, 0.3, 0.55, 0.8, 1):
        number = first + int(part * (end - 1 - first))
        inside.run(f"b.playhead.seek({number})")
        settled(ready, blocks, number)
        seen.append(assert_drawn(inside, blocks, number))
    for kind in ("held", "cached", "free", "shared", "copied", "partial"):
        assert any(one[kind] for one in seen), f"nothing {kind} was drawn: {seen}"


def test_pause_step_and_resume_are_heard_and_all_views_show_it(ready, inside, blocks, timeline):
    inside.run("load(e);")
    blocks.button("Pause").click()
    for cell in (blocks, timeline):
        expect(status(cell)).to_contain_text("engine paused")
        expect(cell.button("Resume")).to_be_visible()
    before = shown(blocks)
    timeline.button("Step ▸").click()
    for cell in (blocks, timeline):
        settled(ready, cell, before + 1)
    assert_drawn(inside, blocks, before + 1)
    blocks.button("◂ Back").click()
    for cell in (blocks, timeline):
        settled(ready, cell, before)
        expect(status(cell)).to_contain_text("looking back")
    assert_drawn(inside, blocks, before)
    ready.shoot("views-looking-back")
    timeline.button("Live").click()
    expect(status(blocks)).to_have_text(re.compile(r"^engine paused · step \d+ at [\d.]+ s$"))
    blocks.button("Resume").click()
    expect(status(timeline)).to_contain_text("engine idle")


def test_dragging_back_moves_all_views_to_the_same_moment(ready, inside, blocks, timeline):
    inside.run("run(e)")
    canvas = timeline.box.locator("canvas.nbengine-lanes")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    ready.page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 8)
    ready.page.mouse.down()
    for part in (0.8, 0.6, 0.5):
        ready.page.mouse.move(box["x"] + 64 + part * (box["width"] - 64), box["y"] + 8)
        ready.page.wait_for_timeout(120)
    ready.page.mouse.up()
    expect(status(blocks)).to_contain_text("looking back")
    number = shown(timeline)
    settled(ready, blocks, number)
    assert_drawn(inside, blocks, number)
    scrub = blocks.box.locator(".nbengine-scrub")
    scrub.focus()
    for _ in range(3):
        ready.page.keyboard.press("ArrowLeft")
    for cell in (blocks, timeline):
        expect(cell.box.locator(".nbengine-scrub")).to_have_value(str(number - 3))
    assert inside.value("[r[0] for r in t.frame['batch']['rows']]") == inside.value(f"e.trace.record({number - 3}).uids")
    drawn = timeline.box.locator(".nbengine-batch li").evaluate_all(
        "all => all.map(one => [Number(one.dataset.uid), Number(one.dataset.count)])"
    )
    assert drawn == inside.value(
        f"[[uid, count] for uid, count in zip(e.trace.record({number - 3}).uids, e.trace.record({number - 3}).counts)]"
    )
    blocks.button("Live").click()
    expect(status(timeline)).not_to_contain_text("looking back")


def test_a_block_that_is_pointed_at_tells_what_is_in_it(ready, inside, blocks):
    inside.run("load(e); e.pause()")
    inside.run("e.step(30);")
    block, owners = inside.value("shared(e)")
    canvas = blocks.box.locator("canvas.nbengine-cells")
    canvas.scroll_into_view_if_needed()
    data = canvas.evaluate("canvas => ({ ...canvas.dataset })")
    columns, side = int(data["columns"]), int(data["side"])
    place = {"x": block % columns * side + side / 2, "y": block // columns * side + side / 2}
    canvas.hover(position=place)
    facts = blocks.box.locator(".nbengine-facts")
    expect(facts).to_contain_text(f"block {block}: held by")
    expect(facts).to_contain_text(f"{len(owners)} references, 16 of 16 slots used")
    expect(facts).to_contain_text("steps")
    tokens = facts.locator(".nbengine-tokens code")
    expect(tokens).to_have_count(16)
    assert "".join(tokens.all_inner_texts()).replace("␣", " ").strip() in PROMPT
    canvas.click(position=place)
    pages = blocks.box.locator(".nbengine-pages li")
    expect(pages.first).to_be_visible()
    drawn = pages.evaluate_all("all => all.map(one => [Number(one.dataset.logical), Number(one.dataset.block)])")
    assert drawn == list(map(list, enumerate(inside.value("e.trace.state(e.trace.end - 1).tables[b._chosen]"))))
    ready.shoot("blocks-chosen-light", blocks)
    canvas.focus()
    ready.page.keyboard.press("Home")
    expect(facts).to_contain_text("block 0:")
    ready.page.keyboard.press("ArrowRight")
    expect(facts).to_contain_text("block 1:")
    ready.page.keyboard.press("Escape")
    expect(pages).to_have_count(0)


def test_slow_running_is_chosen_with_the_slider(ready, inside, blocks):
    inside.run("load(e);")
    slider = blocks.box.get_by_role("slider", name="Speed")
    slider.focus()
    ready.page.keyboard.press("Home")
    for _ in range(60):
        ready.page.keyboard.press("ArrowRight")
    expect(status(blocks)).to_contain_text("running slowly")
    expect(blocks.box.get_by_text(re.compile(r"^\d+(\.\d)? steps/s$"))).to_be_visible()
    ready.page.keyboard.press("End")
    expect(status(blocks)).to_contain_text("engine idle")


def test_a_kernel_that_cannot_hear_is_told_of(ready, inside, blocks):
    inside.run("e.generate('Once')")  # there is a step to look back at
    # of ipykernel 7 some threads may hear while a cell runs: this one keeps the interpreter to itself
    cell = ready.start("import ctypes, time; time.sleep(1); ctypes.PyDLL(None).sleep(8)")
    ready.page.wait_for_timeout(2000)
    blocks.button("◂ Back").click()
    notice = blocks.box.get_by_text("does not hear this button yet")
    expect(notice).to_be_visible()
    ready.shoot("blocks-deaf", blocks)
    cell.ended()
    expect(notice).to_be_hidden()
    expect(status(blocks)).to_contain_text("looking back")


def test_an_error_in_a_callback_appears_under_the_view(ready, inside, blocks):
    inside.run("b._hear(b, {'place': 'x', 'press': 'speed', 'value': 1e9}, [])")
    expect(blocks.box.locator(".nbengine-trouble")).to_contain_text("ValueError: speed must be between 0.2 and 60 steps a second")
    blocks.button("◂ Back").click()
    expect(blocks.box.locator(".nbengine-trouble")).to_be_empty()


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_views_are_drawn_in_both_themes(ready, inside, blocks, timeline, theme):
    before = ready.page.locator("body").get_attribute("data-jp-theme-name")
    if before != theme:
        ready.theme(theme)
    inside.run("load(e); e.pause()")
    inside.run("e.step(40); b.choose(next(uid for uid, table in e.trace.state(e.trace.end - 1).tables.items() if table))")
    expect(blocks.box.locator(".nbengine-pages li").first).to_be_visible()
    for name, cell in (("blocks", blocks), ("timeline", timeline)):
        cell.box.scroll_into_view_if_needed()
        ready.page.wait_for_timeout(300)
        ready.shoot(f"{name}-{theme.split()[1].lower()}", cell)
    inside.run("b.choose(None)")


def test_a_narrow_page_is_readable(ready, inside, blocks, timeline):
    ready.page.set_viewport_size({"width": 476, "height": 900})  # leaves an output 360 pixels
    ready.page.keyboard.press("Control+b")
    try:
        ready.page.wait_for_timeout(400)
        for name, cell in (("blocks", blocks), ("timeline", timeline)):
            cell.box.scroll_into_view_if_needed()
            ready.page.wait_for_timeout(300)
            view = cell.box
            assert 330 <= view.evaluate("view => view.clientWidth") <= 365
            assert view.evaluate("view => view.scrollWidth <= view.clientWidth + 1")
            ready.shoot(f"{name}-narrow", cell)
            for button in view.get_by_role("button").all():
                box, outer = button.bounding_box(), view.bounding_box()
                assert box is None or box["x"] + box["width"] <= outer["x"] + outer["width"] + 1
    finally:
        ready.page.keyboard.press("Control+b")
        ready.page.set_viewport_size({"width": 1200, "height": 900})
        ready.page.wait_for_timeout(300)


def test_a_saved_notebook_shows_the_last_state_as_a_picture(ready, inside, blocks, tmp_path):
    expect(blocks.box.locator("img, svg")).to_be_hidden()  # the picture hides where the view lives
    inside.run("e.generate('Once', SamplingParams(max_tokens=5)); import time; time.sleep(1.6)")
    ready.page.wait_for_timeout(1500)
    saved = ready.save()
    pictures = [
        "".join(o["data"]["image/svg+xml"]) for c in saved["cells"] for o in c.get("outputs", []) if "image/svg+xml" in o.get("data", {})
    ]
    assert any(f"after record {inside.value('e.trace.end - 1')} " in picture for picture in pictures)
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir", str(tmp_path), str(ready.path)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    page = (tmp_path / f"{ready.path.stem}.html").read_text()
    drawn = [base64.b64decode(found).decode() for found in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]
    assert any("nbengine-still" in picture for picture in [page, *drawn])


def test_a_saved_notebook_shows_the_last_state_of_a_view_that_was_scrolled_away(ready, inside, until):
    ready.run("away = %blocks\naway")
    ready.run("print(50 * 'line\\n')")
    ready.run("e.generate('Once', SamplingParams(max_tokens=5)); None")
    until(lambda: inside.value("not away.looked_at"))  # the page's word takes another way than this client's
    name, last = inside.value("away.still, e.trace.end - 1")
    pictures = ["".join(o["data"].get("image/svg+xml", "")) for c in ready.save()["cells"] for o in c.get("outputs", []) if "data" in o]
    assert f"after record {last} " in next(picture for picture in pictures if name in picture)
    inside.run("away.close()")


def test_a_closed_view_leaves_its_picture_and_a_cleared_output_stops_the_updates(ready, inside, until):
    cell = ready.run("v = %blocks\nv")
    expect(cell.box.locator("canvas.nbengine-cells")).to_be_visible()
    inside.run("v.close()")
    expect(cell.box.locator("canvas")).to_have_count(0)
    expect(cell.box.locator("img, svg").first).to_be_visible()
    ready.shoot("blocks-closed", cell)
    other = ready.run("w = %timeline\nw")
    expect(other.box.locator("canvas")).to_be_visible()
    until(lambda: inside.value("w.looked_at"))
    other.box.click()
    ready.page.keyboard.press("Escape")
    ready.page.locator(".lm-MenuBar-itemLabel, .lm-Menu-itemLabel").get_by_text("Edit", exact=True).click()
    ready.page.locator(".lm-Menu-itemLabel").get_by_text("Clear Cell Output", exact=True).click()
    expect(other.box.locator("canvas")).to_have_count(0)
    until(lambda: inside.value("not w.looked_at"))
    updates = inside.value("w.updates")
    inside.run("e.generate('Once', SamplingParams(max_tokens=5)); None")
    assert inside.value("w.updates") == updates


def test_a_trace_from_a_file_is_looked_at_without_an_engine(ready, inside):
    cell = ready.run(
        "from nbengine.trace import Trace\nfrom nbengine.widgets import BlockTableView\nloaded = BlockTableView(Trace.load(e.trace.save('run.trace')))\nloaded"
    )
    expect(status(cell)).to_contain_text("recorded trace")
    end = shown(cell)
    cell.button("◂ Back").click()
    settled(ready, cell, end - 1)
    expect(cell.button("Live")).to_be_hidden()
    cell.button("Play").click()
    settled(ready, cell, end)
    inside.run("loaded.close()")


def test_the_page_has_nothing_to_complain_of(console):
    assert console == []


def test_ten_thousand_blocks_are_drawn_thirty_times_a_second(browser):
    from nbengine.widgets.view import module

    page = browser.new_page(viewport={"width": 900, "height": 700})
    try:
        times = page.evaluate(
            """async text => {
            const { Cells, drawCells, layoutFor } = await import(URL.createObjectURL(new Blob([text], { type: 'text/javascript' })));
            const count = 10000, data = new DataView(new ArrayBuffer(3 * count)), partial = [];
            for (let i = 0; i < count; i++) {
                data.setUint16(2 * i, (i * 7919) % 256, true);
                data.setUint8(2 * count + i, [1, 1, 1, 5, 9, 2, 0][(i * 31) % 7]);
                if (i % 40 === 0) partial.push(i, 7);
            }
            const uids = [...Array(256).keys()];
            const canvas = document.body.appendChild(document.createElement('canvas'));
            const layout = layoutFor(800, count), times = [];
            [canvas.width, canvas.height] = [layout.columns * layout.side, layout.rows * layout.side];
            const brush = canvas.getContext('2d', { willReadFrequently: true });
            for (let i = 0; i < 15; i++) {
                const began = performance.now();
                const cells = new Cells({ size: 16, blocks: count, group: 1, uids, names: [], partial, data });
                drawCells(brush, cells, layout, { ink: '#222', paper: '#fff' }, null);
                brush.getImageData(0, 0, 1, 1);
                times.push(performance.now() - began);
                await new Promise(requestAnimationFrame);
            }
            return times.sort((a, b) => a - b);
        }""",
            module("block_table.js"),
        )
    finally:
        page.close()
    assert times[len(times) // 2] < 1000 / 30, times

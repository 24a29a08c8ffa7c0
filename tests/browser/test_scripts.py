"""The views' scripts in a page of their own: what they draw and send, with a model of this test's in place of a kernel's."""

from __future__ import annotations

import base64

import pytest
from playwright.sync_api import expect

from nbengine.blocks import BlockPool
from nbengine.trace import SequenceInfo, StepRecord, Trace
from nbengine.widgets import BlockTableView, Timeline
from nbengine.widgets.view import View, module, style

DRAW = """async ([text, css, still]) => {
    document.head.appendChild(document.createElement('style')).textContent = css;
    const { default: view } = await import(URL.createObjectURL(new Blob([text], { type: 'text/javascript' })));
    const calls = [];
    window.sent = [];
    window.packed = null;
    const model = {
        get: name => ({ packed: window.packed, still })[name],
        send: message => window.sent.push(message),
        on: (name, call) => name === 'change:packed' && calls.push(call),
        off: () => {},
    };
    window.take = (json, data) => {
        window.packed = { json, data: new DataView(Uint8Array.from(atob(data), one => one.charCodeAt(0)).buffer) };
        calls.forEach(call => call());
    };
    view.render({ model, el: document.body.appendChild(document.createElement('div')) });
}"""


class Drawn:
    """A view as a page draws it."""

    def __init__(self, page, view: View, script: str) -> None:
        self.page, self.view, self.heard = page, view, 0
        self.view._eyes["here"] = True
        page.evaluate(DRAW, [module(f"{script}.js"), style(f"{script}.css"), self.view.still])
        self.answer()

    def press(self) -> None:
        """Wait until something is pressed, which the kernel then answers."""
        self.page.wait_for_function("heard => window.sent.slice(heard).some(message => message.press)", arg=self.heard)
        self.answer()

    def sent(self) -> int:
        """How many messages the page has sent."""
        return len(self.page.evaluate("window.sent"))

    def answer(self, end: int | None = None) -> None:
        """What the kernel does: hear what was sent (the first so many), and send what there is to show."""
        sent = self.page.evaluate("window.sent")[:end]
        for message in sent[self.heard :]:
            self.view._hear(self.view, message, [])
        self.heard = len(sent)
        self.view.refresh()
        packed = self.view.packed
        self.page.evaluate("([json, data]) => window.take(json, data)", [packed["json"], base64.b64encode(packed["data"]).decode()])


@pytest.fixture
def draw(browser):
    """Draw a trace's blocks, or another view of it."""
    page, complaints, views = browser.new_page(viewport={"width": 900, "height": 1200}), [], []
    page.on("pageerror", lambda error: complaints.append(error.message))

    def draw(trace, view=BlockTableView, script="block_table"):
        drawn = Drawn(page, view(trace), script)
        views.append(drawn.view)
        return drawn

    yield draw
    page.close()
    for view in views:
        view.close()
    assert complaints == []


def held(blocks, sequences, each=20):
    """A trace of one step in which each sequence holds so many blocks."""
    pool = BlockPool(blocks, 16)
    trace = Trace(pool, 64)
    uids = list(range(sequences))
    for uid in uids:
        trace.introduce(uid, SequenceInfo(f"r{uid}", 0, 10, 0.0, tokens=list(range(16 * each))))
        for _ in range(each):
            pool.take(uid)
    go_on(trace, pool, uids, each * 16)
    return trace, pool


def go_on(trace, pool, uids, count=1):
    record = StepRecord(trace.end, 0.01 * trace.end, uids=uids, counts=[count] * len(uids), events=pool.take_events())
    record.starts.extend([0] * len(uids))
    trace.add(record, pool, {})


def stepped(count):
    """A trace of two sequences that hold four blocks each, and so many steps on."""
    trace, pool = held(64, 2, each=4)
    for _ in range(count):
        go_on(trace, pool, [0, 1])
    return trace, pool


def test_a_press_on_the_sliders_thumb_that_moves_nothing_does_not_hold_it(draw):
    trace, pool = stepped(50)
    blocks = draw(trace)
    scrub = blocks.page.get_by_role("slider", name="Recorded step")
    expect(scrub).to_have_value("50")
    box = scrub.bounding_box()
    blocks.page.mouse.click(box["x"] + box["width"] - 7, box["y"] + box["height"] / 2)
    expect(scrub).to_have_value("50")
    for _ in range(49):
        go_on(trace, pool, [0, 1])
    blocks.answer()
    expect(scrub).to_have_value("99")


def back_three_records(draw, control, *drawing):
    """Press the left key three times, of which the kernel hears the first before it has the others."""
    trace, _ = stepped(50)
    drawn = draw(trace, *drawing)
    scrub = drawn.page.get_by_role("slider", name="Recorded step")
    drawn.page.locator(control).focus()
    drawn.page.keyboard.press("ArrowLeft")
    first = drawn.sent()
    drawn.page.keyboard.press("ArrowLeft")
    drawn.answer(first)
    assert drawn.view.frame["moment"]["at"] == 49
    expect(scrub).to_have_value("48")
    drawn.page.keyboard.press("ArrowLeft")
    drawn.page.wait_for_function("window.sent.some(message => message.press === 'seek' && message.value === 47)")
    drawn.answer()
    assert drawn.view.playhead.number == 47
    expect(scrub).to_have_value("47")
    drawn.view.playhead.seek(20)  # from elsewhere
    drawn.answer()
    expect(scrub).to_have_value("20")
    drawn.page.keyboard.press("ArrowRight")
    drawn.page.wait_for_function("window.sent.at(-1).value === 21")


def test_no_press_of_a_key_on_the_slider_is_lost_to_what_the_kernel_shows_meanwhile(draw):
    back_three_records(draw, ".nbengine-scrub")


def test_no_press_of_a_key_on_the_lanes_is_lost_to_what_the_kernel_shows_meanwhile(draw):
    back_three_records(draw, ".nbengine-lanes", Timeline, "timeline")


def test_what_is_pressed_after_a_key_is_heard_after_it(draw):
    trace, _ = stepped(50)
    lanes = draw(trace, Timeline, "timeline")
    lanes.page.locator(".nbengine-lanes").focus()
    before = lanes.sent()
    for key in ("ArrowLeft", "ArrowLeft", "Escape"):
        lanes.page.keyboard.press(key)
    lanes.page.wait_for_timeout(200)
    lanes.answer()
    pressed = [message for message in lanes.page.evaluate("window.sent")[before:] if "press" in message]
    assert [(message["press"], message.get("value")) for message in pressed] == [("seek", 49), ("seek", 48), ("live", None)]
    expect(lanes.page.get_by_role("slider", name="Recorded step")).to_have_value("50")


def test_a_slider_goes_back_when_its_press_was_heard_and_moved_nothing(draw, monkeypatch):
    trace, _ = stepped(1)
    blocks = draw(trace)
    monkeypatch.setattr(blocks.view.playhead, "seek", lambda number: None)  # as if that record were gone
    scrub = blocks.page.get_by_role("slider", name="Recorded step")
    scrub.focus()
    blocks.page.keyboard.press("ArrowLeft")
    expect(scrub).to_have_value("0")
    blocks.press()
    expect(scrub).to_have_value("1")


def test_an_entry_of_a_page_table_tells_of_its_own_block_in_a_pool_whose_cells_stand_for_several(draw):
    trace, _ = held(72_619, 200)
    blocks = draw(trace)
    blocks.view.choose(15)
    blocks.answer()
    assert (blocks.view.frame["group"], blocks.view.frame["table"]["blocks"]) == (15, list(range(300, 320)))
    facts = blocks.page.locator(".nbengine-facts")
    blocks.page.get_by_role("button", name="is physical block 300").hover()
    expect(facts).to_contain_text("blocks 300 to 314: 100 % held by r15")  # what is known without the kernel
    blocks.press()
    expect(facts).to_contain_text("block 300: held by r15 (its block 0), 1 reference, 16 of 16 slots used")
    expect(facts.locator(".nbengine-tokens code")).to_have_count(16)
    blocks.page.get_by_role("button", name="is physical block 319").focus()
    blocks.press()
    expect(facts).to_contain_text("block 319: held by r15 (its block 19)")
    blocks.page.locator("canvas.nbengine-cells").focus()  # the cell of that block, and all that is in it
    blocks.press()
    expect(facts).to_contain_text("blocks 315 to 329: 15 held by r15, r16, 0 cached and free")


def test_a_view_of_an_engine_that_keeps_no_trace_says_so_and_counts_no_steps(draw):
    blocks = draw(Trace(BlockPool(64, 16), 0))
    expect(blocks.page.locator(".nbengine-note")).to_contain_text("keeps no trace (trace_steps=0)")
    expect(blocks.page.locator(".nbengine-status").first).not_to_contain_text("no step yet")

"""The magics of the live views in a real kernel, and what a view says over the wire."""

from __future__ import annotations

import time

import pytest
from kernel_client import Kernel, send

SHOWN = "application/vnd.jupyter.widget-view+json"


def open_view(kernel: Kernel, cell: str):
    """Run a cell that makes a view; what it ran, and the view's comm."""
    comms = []

    def opened(msg, _ran):
        if msg["msg_type"] == "comm_open" and "packed" in msg["content"]["data"].get("state", {}):
            comms.append(msg["content"]["comm_id"])
        return False

    ran = kernel.finish(kernel.start(cell), opened)
    assert ran.status == "ok", ran.evalue
    return ran, comms[0]


def updates(kernel: Kernel, comm: str, cell: str, **look) -> list[dict]:
    """What a view is sent while a cell runs."""
    sent = []

    def note(msg, _ran):
        if msg["msg_type"] == "comm_msg" and msg["content"]["comm_id"] == comm:
            sent.append(msg["content"]["data"])
        return False

    kernel.finish(kernel.start(cell), note)
    return sent


@pytest.mark.parametrize(("magic", "name"), [("%blocks", "BlockTableView"), ("%timeline --steps 50", "Timeline")])
def test_a_magic_shows_a_view_and_a_picture_beside_it(kernel, magic, name):
    ran, _ = open_view(kernel, magic)
    live, still = ran.shown
    assert SHOWN in live
    assert live["text/plain"].startswith(f"<{name}: ")
    assert "image/svg+xml" not in live  # the picture is a display of its own, which can change while the view stays
    assert still["image/svg+xml"].startswith('<svg class="nbengine-still-')


def test_a_variable_with_an_engine_or_a_trace_can_be_named(kernel):
    kernel.run("mine = get_ipython().find_line_magic('engine').__self__.session.engines['tales']; record = mine.trace")
    for name in ("tales", "mine", "record"):
        ran, _ = open_view(kernel, f"%blocks {name}")
        assert SHOWN in ran.shown[0]


def test_what_is_no_engine_is_refused_in_one_line(kernel):
    ran = kernel.run("%timeline nobody", check=False)
    assert (ran.ename, "no engine is called 'nobody'" in ran.evalue) == ("UsageError", True)
    ran = kernel.run("%timeline --step 50", check=False)
    assert "--steps" in ran.evalue
    ran = kernel.run("%timeline --steps 5", check=False)
    assert "from 20 to 2000" in ran.evalue
    assert "%blocks" in kernel.inspect("%blocks")


def test_a_view_is_sent_only_while_somebody_looks(kernel):
    _, comm = open_view(kernel, "%blocks")
    run = "%generate -m 40 --ignore-eos --no-chat Once upon a time"
    assert not updates(kernel, comm, run)
    send(kernel, comm, {"place": "here", "seen": True})
    sent = updates(kernel, comm, f"{run}\nimport time; time.sleep(0.5)")
    states = [data["state"]["packed"] for data in sent if data["method"] == "update"]
    assert states
    assert all(set(state) == {"json"} for state in states)  # whole, its bytes in a buffer
    send(kernel, comm, {"place": "here", "seen": False})
    kernel.run("")
    assert not updates(kernel, comm, run)


def test_pictures_are_of_the_last_state_though_nobody_looks_and_alike_wherever_the_view_is_shown(kernel):
    first, _ = open_view(kernel, "shown = %blocks\nshown")
    again = kernel.run("shown")
    assert first.display_ids == again.display_ids
    [name] = first.display_ids
    kernel.run("%generate -m 20 --ignore-eos --no-chat Once upon a time")
    last = kernel.value("shown.playhead.trace.end - 1")
    assert f"after record {last} " in kernel.displays[name]["image/svg+xml"]
    assert not kernel.run("1").updates


@pytest.mark.parametrize("made", ["%blocks", "compare(engine, engine)"])
def test_what_was_closed_is_shown_as_its_picture(kernel, made):
    kernel.run(
        "from nbengine.widgets import compare; engine = get_ipython().find_line_magic('engine').__self__.session.engines['tales']\n"
        "engine.generate('Once');"
    )
    kernel.run(f"closed = {made}\nclosed.close()")
    for cell in ("closed", "display(closed)"):
        ran = kernel.run(cell)
        assert (ran.err, ran.result) == ("", None)
        [still] = ran.shown
        assert still["image/svg+xml"].startswith('<svg class="nbengine-still-')
        assert still["text/plain"].startswith("<")
        assert SHOWN not in still


def test_a_press_is_answered_and_obeyed(kernel):
    _, comm = open_view(kernel, "%blocks")
    kernel.run("engine = get_ipython().find_line_magic('engine').__self__.session.engines['tales']")
    send(kernel, comm, {"place": "here", "seen": True})
    send(kernel, comm, {"place": "here", "press": "pause", "number": 7})
    sent = updates(kernel, comm, "import time; time.sleep(0.3)")
    deadline = time.monotonic() + 20
    while kernel.value("engine.status") != "paused":
        assert time.monotonic() < deadline
    assert {"method": "custom", "content": {"heard": 7, "place": "here"}} in sent or kernel.value("engine.status") == "paused"
    send(kernel, comm, {"place": "here", "press": "resume", "number": 8})
    while kernel.value("engine.status") == "paused":
        assert time.monotonic() < deadline


def test_views_can_be_completed(kernel):
    reply = kernel.client.complete("%timeline --", 12, reply=True, timeout=30)["content"]
    assert "--steps" in reply["matches"]

"""Nothing gets stuck: the stop button, cancel() and the Cancel button end one cell's requests and no others."""

from __future__ import annotations

import time

import pytest
from kernel_client import LONG, QUICK, STATE, STOPPED, controls_opened, heard, idle_after, send, stopped, streaming


@pytest.fixture(scope="module")
def running(kernel):
    kernel.run("import nbengine, time\ne = get_ipython().find_line_magic('engine').__self__.session.engines.find()")
    return kernel


def settled(kernel) -> None:
    kernel.run("while e.status == 'running': time.sleep(0.01)")


@pytest.mark.parametrize(
    "cell", [f"%%generate {LONG}\nOnce", f"%%chat {LONG.replace('--no-chat ', '')}\nOnce", f"if True:\n    %generate {LONG} Once"]
)
def test_the_stop_button_ends_a_cell_and_keeps_its_text(running, cell):
    message = running.start(cell)
    running.finish(message, streaming)
    began = time.monotonic()
    running.interrupt()
    ran = running.finish(message)
    assert time.monotonic() - began < QUICK
    assert (ran.status, ran.ename) == ("error", "Interrupted")  # an error, so that 'Run all' stops
    assert "stopped by the user" in ran.evalue
    settled(running)
    assert running.value(STATE) == STOPPED
    assert running.run("%%generate -m 2\nnext").status == "ok"


def test_stopping_a_hundred_times_leaves_the_pool_empty_each_time(running):
    for _ in range(50):
        message = running.start(f"%%generate {LONG}\nOnce")
        running.finish(message, streaming)
        running.interrupt()
        assert running.finish(message).ename == "Interrupted"
        settled(running)
        assert running.value(STATE) == STOPPED
    for turn in range(50):  # at any moment, also before anything has come
        message = running.start(f"%%generate {LONG}\nOnce")
        time.sleep(0.002 * turn)
        running.interrupt()
        running.finish(message, idle_after(message))
        settled(running)
        assert running.value("(e.stats()['blocks_used'], e.stats()['num_running'], e.stats()['num_waiting'])") == (0, 0, 0)


def test_cancelling_a_hundred_times_leaves_the_pool_empty_each_time(running):
    for turn in range(100):
        running.run(f"%generate --bg {LONG} Once")
        if turn % 3 == 0:
            running.run("g.cancel()")
        elif turn % 3 == 1:
            running.run("%engine cancel {}".format(running.value("g.handles[0].id")))
        else:
            running.run("%engine cancel")
        settled(running)
        assert running.value("(g.finish_reason, g.done, e.stats()['blocks_used'], e.stats()['num_running'])") == ("abort", True, 0, 0)


def test_only_the_requests_of_that_cell_are_ended(running):
    running.run("other = e.submit('Once', nbengine.SamplingParams(max_tokens=1500, ignore_eos=True))")
    message = running.start(f"%%generate {LONG}\nTwice")
    running.finish(message, streaming)
    running.interrupt()
    running.finish(message)
    assert running.value("(g.finish_reason, other.status, other.finished)") == ("abort", "running", False)
    running.run("other.cancel()")
    settled(running)


def test_a_cell_in_a_python_loop_is_stopped_with_its_request(running):
    loop = "for piece in e.stream('Once', nbengine.SamplingParams(max_tokens=1500, ignore_eos=True)): pass"
    ran, _ = stopped(running, f"print('on', flush=True)\n{loop}")
    assert ran.ename == "KeyboardInterrupt"
    settled(running)
    assert running.value("e.stats()['blocks_used']") == 0


@pytest.mark.parametrize(
    "cell",
    [
        "await e.agenerate('Once', nbengine.SamplingParams(max_tokens=1500, ignore_eos=True))",
        "async for piece in e.astream('Once', nbengine.SamplingParams(max_tokens=1500, ignore_eos=True)): pass",
    ],
)
def test_an_awaited_python_call_is_stopped_with_its_request(running, cell):
    ran, seconds = stopped(running, f"print('on', flush=True)\n{cell}")
    assert ran.status == "error"
    assert seconds < QUICK
    settled(running)
    assert running.value("e.stats()['blocks_used']") == 0


# ── the buttons, as a front end presses them ────────────────────────────────────────────────────────────────────────────


def open_controls(kernel, message) -> str:
    comms: list[str] = []
    kernel.finish(message, lambda msg, ran: controls_opened(msg, ran) and not comms.append(msg["content"]["comm_id"]))
    return comms[0]


def test_the_cancel_button_appears_when_it_is_heard_and_ends_the_cell(running):
    message = running.start(f"%%generate {LONG}\nOnce")
    comm = open_controls(running, message)
    send(running, comm, {"hello": True})
    assert running.finish(message, heard).status == ""  # the cell still runs
    began = time.monotonic()
    send(running, comm, {"press": "cancel"})
    ran = running.finish(message)
    assert time.monotonic() - began < QUICK
    assert ran.status == "ok"  # one cell was given up, not the run
    assert running.value(STATE) == STOPPED


def test_no_button_is_shown_where_the_kernel_does_not_hear(running):
    message = running.start(
        f"for _ in '1':\n    %generate {LONG.replace('1500', '150')} Once"
    )  # not awaited: this kernel is deaf meanwhile
    comm = open_controls(running, message)
    send(running, comm, {"hello": True})
    ran = running.finish(message, heard)
    assert ran.status == "ok"  # it ran to its end, and nothing had said that it hears


@pytest.mark.parametrize(("before", "state", "hint"), [("%engine pause", "paused", "resume it"), ("%engine sleep", "asleep", "resume it")])
def test_a_cell_that_waits_on_a_stalled_engine_says_so_and_offers_resume(running, before, state, hint):
    running.run(before)
    message = running.start("%%generate -m 5 --ignore-eos --out g\nOnce")
    comm = open_controls(running, message)
    send(running, comm, {"hello": True})
    seen = []
    running.finish(message, lambda msg, ran: seen.append(msg) or heard(msg, ran))
    assert running.displays
    assert any(state in str(shown.get("text/plain")) and hint in str(shown.get("text/plain")) for shown in running.displays.values())
    send(running, comm, {"press": "resume"})
    ran = running.finish(message)
    assert ran.status == "ok"
    assert running.value("(g.finish_reason, len(g.token_ids))") == ("length", 5)


def test_a_stalled_cell_can_be_cancelled(running):
    running.run("%engine pause")
    message = running.start("%%generate -m 5 --out g\nOnce")
    comm = open_controls(running, message)
    send(running, comm, {"press": "cancel"})
    assert running.finish(message).status == "ok"
    running.run("%engine resume")
    assert running.value("g.finish_reason") == "abort"


def test_an_error_in_a_button_appears_under_the_line(running):
    running.run("from nbengine.widgets.cell_controls import CellControls\nc = CellControls({'cancel': lambda: 1 / 0})")
    comm = running.value("c.comm.comm_id")
    send(running, comm, {"press": "cancel"})
    running.run("c.close()")
    assert running.value("c.trouble") == "ZeroDivisionError: division by zero"

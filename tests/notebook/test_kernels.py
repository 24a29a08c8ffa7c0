"""The interface on the ipykernels that it claims: 6.31, 7.3 and 7.4. The newest runs always, the others with the long sweeps."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import ipykernel
import pytest
from kernel_client import LONG, QUICK, STATE, STOPPED, Kernel, controls_opened, heard, send, streaming

NEWEST = "7.4.0"
OLDER = ("6.31.0", "7.3.0")


@pytest.fixture(scope="module", params=[NEWEST, *(pytest.param(version, marks=pytest.mark.slow) for version in OLDER)])
def versioned(request, tmp_path_factory):
    version, env = request.param, {}
    if version != ipykernel.__version__:
        overlay = _overlay(version, tmp_path_factory.mktemp("ipykernel"))
        env = {"PYTHONPATH": str(overlay)}
    kernel = Kernel(env)
    try:
        kernel.run("%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 256 --out e")
        assert kernel.value("__import__('ipykernel').__version__") == version
        kernel.version = version
        yield kernel
    finally:
        kernel.close()


def _overlay(version: str, folder: Path) -> Path:
    """This version of ipykernel alone, to lie before the one that is installed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"ipykernel=={version}"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def press(kernel, cell: str, header: dict | None = None) -> tuple[bool, float]:
    """Press Cancel in a running cell; whether the kernel heard it before the end, and seconds from there to idle."""
    comms: list[str] = []
    message = kernel.start(cell)
    kernel.finish(message, lambda msg, ran: controls_opened(msg, ran) and not comms.append(msg["content"]["comm_id"]))
    send(kernel, comms[0], {"hello": True}, header)
    if kernel.finish(message, heard).status:
        return False, 0.0
    began = time.monotonic()
    send(kernel, comms[0], {"press": "cancel"}, header)
    kernel.finish(message)
    return True, time.monotonic() - began


def test_a_cell_streams_and_gives_its_result(versioned):
    ran = versioned.run("%%generate -m 40 --ignore-eos --out g\nOnce")
    assert versioned.value("(len(g.token_ids), g.finish_reason)") == (40, "length")
    assert ran.shown[0]["text/plain"] == versioned.value("g.text")
    assert ran.result is None


@pytest.mark.parametrize("cell", [f"%%generate {LONG}\nOnce", f"if True:\n    %generate {LONG} Once"])
def test_the_stop_button_works(versioned, cell):
    for _ in range(5):
        message = versioned.start(cell)
        versioned.finish(message, streaming)
        began = time.monotonic()
        versioned.interrupt()
        assert versioned.finish(message).ename == "Interrupted"
        assert time.monotonic() - began < QUICK
        versioned.run("while e.status == 'running': __import__('time').sleep(0.01)")
        assert versioned.value(STATE) == STOPPED


def test_the_cancel_button_shows_and_works_just_where_the_kernel_hears_it(versioned):
    was_heard, seconds = press(versioned, f"%%generate {LONG.replace('1500', '200')}\nOnce")
    assert was_heard == (versioned.version == NEWEST)  # the older ones hear a message on the main shell after the cell
    if was_heard:
        assert seconds < QUICK
        assert versioned.value(STATE) == STOPPED


@pytest.mark.parametrize("versioned", [pytest.param("7.3.0", marks=pytest.mark.slow)], indirect=True)  # 7.1 to 7.3 route widgets so
def test_the_cancel_button_works_where_a_front_end_uses_subshells(versioned):
    client = versioned.client
    client.control_channel.send(client.session.msg("create_subshell_request", {}))
    subshell = client.get_control_msg(timeout=20)["content"]["subshell_id"]
    was_heard, seconds = press(versioned, f"%%generate {LONG}\nOnce", {"subshell_id": subshell})
    assert was_heard
    assert seconds < QUICK
    assert versioned.value(STATE) == STOPPED


def test_two_background_cells_keep_to_their_outputs(versioned):
    first = versioned.run("%%generate --bg -m 30 --ignore-eos --seed 1 --out a\nThe fox")
    second = versioned.run("%%generate --bg -m 30 --ignore-eos --seed 2 --out b\nThe king")
    versioned.run("import time; a.wait(60); b.wait(60); time.sleep(0.3)")
    versioned.run("time.sleep(0.1)")
    assert first.shown[0]["text/plain"] == versioned.value("a.text")
    assert second.shown[0]["text/plain"] == versioned.value("b.text")


def test_a_mistake_raises_so_that_run_all_stops(versioned):
    ran = versioned.run("%%generate --bogus\nHi", check=False)
    assert (ran.status, ran.ename) == ("error", "UsageError")

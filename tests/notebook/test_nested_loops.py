"""`allow_nested_loops` in a real kernel: for the cell's loop, and for no other."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from jupyter_client.manager import start_new_kernel

from nbengine import nested_loops
from nbengine.nested_loops import allow_nested_loops

SETUP = """
import asyncio, gc, threading
from nbengine import Engine, SamplingParams
from nbengine.nested_loops import allow_nested_loops
params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

async def answer():
    await asyncio.sleep(0)
    return 42

def patched():
    loops = [o for o in gc.get_objects() if issubclass(type(o), asyncio.BaseEventLoop) and not o.is_closed()]
    engines = {t.ident for t in threading.enumerate() if t.name.startswith("nbengine")}
    assert engines and engines <= {loop._thread_id for loop in loops}
    return sorted({hasattr(loop, "_nest_patched") for loop in loops if loop is not asyncio.get_running_loop()})
"""


@pytest.fixture(scope="module")
def cell() -> Iterator[Callable[[str], str]]:
    """Run a cell in a kernel; what it printed, or the error's name."""
    manager, client = start_new_kernel(kernel_name="python3")
    try:

        def run(code: str) -> str:
            printed: list[str] = []

            def keep(message: dict) -> None:
                if message["msg_type"] == "stream":
                    printed.append(message["content"]["text"])

            reply = client.execute_interactive(code, output_hook=keep, timeout=60, store_history=False)["content"]
            return "".join(printed).strip() if reply["status"] == "ok" else reply["ename"]

        yield run
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_asyncio_run_works_in_a_cell_and_every_engine_goes_on(cell):
    assert cell(SETUP) == ""
    assert cell("before = Engine('tales')\nexpected = before.generate('Once', params)[0].outputs[0].token_ids\nprint(len(expected))") == "8"
    assert cell("coroutine = answer()\nasyncio.run(coroutine)") == "RuntimeError"
    cell("coroutine.close(); running = before.submit('Once', SamplingParams(max_tokens=400, ignore_eos=True))")
    assert cell("print(allow_nested_loops(), allow_nested_loops())") == "None None"
    assert cell("print(asyncio.run(answer()), asyncio.run(answer()))") == "42 42"
    assert cell("print(asyncio.get_event_loop().run_until_complete(answer()))") == "42"
    assert cell("print(len(running.result(60).outputs[0].token_ids))") == "400"  # begun before, ended after
    assert cell("after = Engine('tales')") == ""
    assert cell("print([e.generate('Once', params)[0].outputs[0].token_ids == expected for e in (before, after)])") == "[True, True]"
    assert (
        cell("print([(await e.agenerate('Once', params))[0].outputs[0].token_ids == expected for e in (before, after)])") == "[True, True]"
    )

    nested = "async def inner():\n    return [(await e.agenerate('Once', params))[0].outputs[0].token_ids == expected for e in (before, after)]\n"
    assert cell(nested + "print(asyncio.run(inner()))") == "[True, True]"
    assert cell("print(patched())") == "[False]"  # the engines' loops, whose class is that of the kernel's
    in_thread = (
        "found = []\nt = threading.Thread(target=lambda: found.append(asyncio.run(answer())))\nt.start(); t.join(); print(found, patched())"
    )
    assert cell(in_thread) == "[42] [False]"
    assert cell("before.close(); after.close(); print(before.status, after.status)") == "closed closed"
    assert cell("print(asyncio.run(answer()))") == "42"


def test_nothing_changes_where_no_loop_runs():
    before = asyncio.run, asyncio.Task, asyncio.get_event_loop
    assert allow_nested_loops() is None
    assert (asyncio.run, asyncio.Task, asyncio.get_event_loop) == before


def test_importing_it_changes_nothing():
    code = "import asyncio; r, t = asyncio.run, asyncio.Task; import nbengine.nested_loops, sys\n"
    code += "assert (r, t) == (asyncio.run, asyncio.Task) and not {'nest_asyncio2', 'nest_asyncio'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nested_loops, "LIBRARIES", ("no_such_library",))

    async def call() -> None:
        allow_nested_loops()

    with pytest.raises(ImportError, match="pip install nest-asyncio2"):
        asyncio.run(call())


def test_nest_asyncio_serves_where_only_that_is_installed(monkeypatch):
    tried = []

    def find(name: str):
        tried.append(name)
        if name == "nest_asyncio2":
            raise ModuleNotFoundError(name)
        return sys

    monkeypatch.setattr(nested_loops, "import_module", find)
    assert nested_loops._library() is sys
    assert tried == ["nest_asyncio2", "nest_asyncio"]

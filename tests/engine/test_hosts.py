"""The same snippet in a script, in IPython, in a kernel, and beside a running loop."""

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

SETUP = """
import sys, json
from nbengine import Engine, SamplingParams
engine = Engine({folder!r}, max_model_len=512, num_gpu_blocks_override=128)
greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
found = {{}}
"""
SYNC = """
found["generate"] = engine.generate("Once", greedy)[0].outputs[0].token_ids
found["iterate"] = "".join(engine.submit("Once", greedy))
found["stream"] = "".join(engine.stream("Once", greedy))
found["result"] = engine.submit("Once", greedy).result(60).outputs[0].token_ids
engine.pause()
request = engine.submit("Once", greedy)
found["steps"] = len(engine.step(100))
engine.resume()
"""
ASYNC = """
found["await"] = (await engine.submit("Once", greedy)).outputs[0].token_ids
found["aiter"] = "".join([text async for text in engine.submit("Once", greedy)])
found["astream"] = "".join([text async for text in engine.astream("Once", greedy)])
found["agenerate"] = (await engine.agenerate(["Once", "Once"], greedy))[1].outputs[0].token_ids
"""
END = """
print("FOUND" + json.dumps(found))
engine.close()
"""


def found_in(text):
    return json.loads(next(line for line in text.splitlines() if line.startswith("FOUND"))[5:])


def indent(text):
    return text.replace("\n", "\n    ")


@pytest.fixture(scope="module")
def expected(tiny):
    from nbengine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny.folder)
    ids = tiny.greedy(tokenizer.encode("Once"), 6)
    text = tokenizer.decode(ids)
    sync = {"generate": ids, "iterate": text, "stream": text, "result": ids, "steps": 6}
    return sync, {"await": ids, "aiter": text, "astream": text, "agenerate": ids}


def test_a_script(script, tiny, expected):
    text = (
        SETUP.format(folder=str(tiny.folder))
        + SYNC
        + "import asyncio\nasync def main():\n    pass"
        + indent(ASYNC)
        + "\nasyncio.run(main())"
        + END
    )
    code, out, err = script(text).end()
    assert code == 0, err
    assert found_in(out) == expected[0] | expected[1]


def test_blocking_calls_inside_a_running_loop(script, tiny, expected):
    """A script whose loop runs: blocking calls block it, and work."""
    text = (
        SETUP.format(folder=str(tiny.folder))
        + "import asyncio\nasync def main():\n    pass"
        + indent(SYNC + ASYNC)
        + "\nasyncio.run(main())"
        + END
    )
    code, out, err = script(text).end()
    assert code == 0, err
    assert found_in(out) == expected[0] | expected[1]


def test_a_thread_beside_a_running_loop(tiny, make_engine, expected):
    """The loop runs in this thread, and the engine is made and used from workers of it."""
    from nbengine import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    async def main():
        engine = await asyncio.to_thread(make_engine)
        blocking = asyncio.to_thread(engine.generate, "Once", greedy)
        (other,), own = await asyncio.gather(blocking, engine.submit("Once", greedy))
        return other.outputs[0].token_ids, own.outputs[0].token_ids

    ids = expected[0]["generate"]
    assert asyncio.run(main()) == (ids, ids)


def test_ipython(script, tiny, expected):
    pytest.importorskip("IPython")
    text = SETUP.format(folder=str(tiny.folder)) + SYNC + ASYNC + END  # IPython awaits at top level
    run = script(
        f"get_ipython().run_cell({text!r}, silent=False).raise_error()", command=(sys.executable, "-m", "IPython", "--colors=NoColor")
    )
    code, out, err = run.end()
    assert code == 0, out + err
    assert found_in(out) == expected[0] | expected[1]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """A real kernel, and a way to run a cell in it: what it printed, and its error."""
    pytest.importorskip("ipykernel")
    from jupyter_client import KernelManager

    manager = KernelManager()
    root = str(Path(__file__).parents[2])
    manager.start_kernel(
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))}
    )
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=120)
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


class Kernel:
    def __init__(self, manager, client):
        self.manager, self.client = manager, client

    def run(self, text, on_output=None, timeout=120):
        request = self.client.execute(text)
        printed, error, deadline = "", None, time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
                if on_output is not None:
                    on_output(printed)
            elif kind == "error":
                error = content["ename"]
            elif kind == "status" and content["execution_state"] == "idle":
                return printed, error
        raise AssertionError(f"the cell did not end; it printed {printed!r}")


def test_a_kernel(kernel, tiny, expected):
    printed, error = kernel.run(SETUP.format(folder=str(tiny.folder)) + SYNC + ASYNC + END)
    assert error is None, printed
    assert found_in(printed) == expected[0] | expected[1]


@pytest.mark.parametrize(
    "waiting",
    [
        "await request",
        "async for _ in request: pass",
        "async for _ in request.aoutputs(): pass",
        "await asyncio.gather(request, engine.submit('b', long))",
        "await engine.agenerate(['b'], long)",
        "request.result()",
        "for _ in request: pass",
        "engine.generate(['b'], long)",
        "engine.generate(['b'], long, use_tqdm=True)",
    ],
)
def test_a_cell_that_waits_can_be_interrupted(kernel, tiny, waiting):
    """Also while the engine is paused, when nothing else wakes the kernel's loop."""
    for paused in (False, True):
        setup = SETUP.format(folder=str(tiny.folder)) + "\nimport asyncio, warnings\nwarnings.simplefilter('ignore')\n"
        setup += "long = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)\n"
        setup += "engine.pause()\n" if paused else ""
        _, error = kernel.run(setup + "request = engine.submit('a', long)\n")
        assert error is None
        once = []

        def interrupt(_, once=once):
            if not once:
                once.append(threading.Timer(0.05, kernel.manager.interrupt_kernel))
                once[0].start()

        _, error = kernel.run(f"print('now', flush=True)\n{waiting}", on_output=interrupt)
        if paused:
            assert error in {"KeyboardInterrupt", "CancelledError"}
        printed, error = kernel.run("engine.close(); print(engine.status)")
        assert (printed.strip(), error) == ("closed", None)


def test_a_cell_after_an_interrupted_one_goes_on(kernel, tiny):
    kernel.run(SETUP.format(folder=str(tiny.folder)))
    printed, error = kernel.run("print(len(engine.generate('a', greedy)[0].outputs[0].token_ids)); engine.close()")
    assert (printed.strip(), error) == ("6", None)

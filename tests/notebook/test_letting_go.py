"""After %engine unload nothing a notebook keeps holds memory: not Out, not _, not the last traceback, not a result."""

from __future__ import annotations

import pytest
from kernel_client import streaming

# The engine's tensors, seen from outside: whatever tensor of more than a megabyte is alive in the process.
ALIVE = """
def _alive():
    import gc, torch
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.untyped_storage().nbytes() > 1e6}.values())
"""


@pytest.fixture
def loaded(fresh_kernel):
    fresh_kernel.run("%load_ext nbengine\nimport torch, nbengine\n%engine load tales --num-gpu-blocks-override 512 --out e")
    fresh_kernel.run(ALIVE)
    assert fresh_kernel.value("_alive()") > 50e6
    return fresh_kernel


def unloaded(kernel) -> int:
    kernel.run("%engine unload")
    return kernel.value("_alive()")


def test_results_and_outputs_hold_nothing(loaded):
    loaded.run("%%generate -m 3 --out r --logprobs\nHello")
    loaded.run("r")
    loaded.run("r.requests")
    loaded.run("e")
    loaded.run("%engine")
    loaded.run("e.submit('x', nbengine.SamplingParams(max_tokens=1))")
    assert loaded.value("len(Out)") >= 5
    assert unloaded(loaded) == 0
    assert "Hello" not in loaded.value("r.text")
    assert loaded.value("len(r.token_ids)") == 3


BROKEN = "lambda ids, logits: 1 / 0"
KEEPS_A_ROW = """
def broken(ids, logits):
    keep = logits
    raise RuntimeError("no")
e.generate("Hello", nbengine.SamplingParams(max_tokens=3, logits_processors=[broken]))
"""


@pytest.mark.parametrize(
    "cell",
    [
        "%%generate -t -1\nHello",
        "%engine load tales --name x --kv-cache-memory-bytes 900000000000000",
        f"e.generate('Hello', nbengine.SamplingParams(max_tokens=3, logits_processors=[{BROKEN}]))",
        KEEPS_A_ROW,
        f"await e.agenerate('Hello', nbengine.SamplingParams(max_tokens=3, logits_processors=[{BROKEN}]))",
        "e.use(ops={'gated': lambda gate_up, activation: 1 / 0})",
        "e.update_weights({'no.such': torch.zeros(1)})",
    ],
)
def test_the_last_traceback_holds_nothing_of_the_engine(loaded, cell):
    ran = loaded.run(cell, check=False)
    assert ran.status == "error"
    assert "nbengine/loop.py" not in str(loaded.value("__import__('traceback').format_tb(__import__('sys').last_value.__traceback__)"))
    assert unloaded(loaded) == 0


def test_an_interrupted_cell_holds_nothing(loaded):
    message = loaded.start("%%generate -m 1500 --ignore-eos\nOnce")
    loaded.finish(message, streaming)
    loaded.interrupt()
    loaded.finish(message)
    assert unloaded(loaded) == 0


def test_an_engine_error_is_told_without_the_engines_frames(loaded):
    ran = loaded.run(
        "e.generate('Hello', nbengine.SamplingParams(max_tokens=3, logits_processors=[lambda ids, logits: 1 / 0]))", check=False
    )
    assert ran.ename == "RequestError"
    assert "ZeroDivisionError" in ran.evalue


def test_rounds_of_load_and_unload_leave_memory_and_threads_flat(loaded):
    loaded.run("%engine unload")
    loaded.run("import ctypes")  # what the allocator keeps for later is given back first: it differs by the round
    rss = "(ctypes.CDLL(None).malloc_trim(0), int(open('/proc/self/statm').read().split()[1]) * 4096)[1]"
    sizes = []
    for _ in range(12):
        loaded.run("%engine load tales --num-gpu-blocks-override 512")
        loaded.run("%%generate -m 4\nHello")
        loaded.run("%engine unload")
        sizes.append(loaded.value(rss))
    assert sizes[-1] - sizes[3] < 30e6
    assert loaded.value("[t.name for t in __import__('threading').enumerate() if t.name.startswith('nbengine')]") == []

"""Three cells from a real Jupyter kernel, text prompts in and streamed text out, beside a script's figures in the same run."""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nbengine.bench.measure import Settings, engine_options, opened
from nbengine.bench.mixed import at_once
from nbengine.bench.results import Results, say, table
from nbengine.bench.texts import folder_with_tokenizer, text_prompts

if TYPE_CHECKING:
    from jupyter_client.blocking.client import BlockingKernelClient

NEEDED = ("jupyter_client", "ipykernel", "IPython", "ipywidgets", "anywidget", "nest_asyncio2")
TARGET = 0.95  # of the script's figure
WAIT = 600.0  # seconds for one cell

LOAD = """
%load_ext nbengine
import json, time
from nbengine import Engine, SamplingParams
from nbengine.notebook.generation import Generation
from nbengine.notebook.live import view_of
from nbengine.notebook.pump import Pump
from nbengine.notebook.watch import wait_here
e = Engine({folder!r}, **json.loads({options!r}))
"""
# What %%generate does: submit, show what is new fifteen times a second, wait. It gives every prompt the same length; this one need not.
STREAM = """
jobs = json.loads(open({file!r}).read())
began = time.perf_counter()
params = [SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True) for _, new in jobs]
g = Generation(e.submit_all([text for text, _ in jobs], params), e)
wait_here(g, view_of(g), Pump())
took = time.perf_counter() - began
"""
# Seconds of the cell, and from the first request's arrival to the last one's end, which the showing of the end is no part of.
TIMES = (
    "(sum(len(r.outputs[0].token_ids) for r in g.requests), took, "
    "max(r.metrics.finished_time for r in g.requests) - min(r.metrics.arrival_time for r in g.requests))"
)
MAGIC = """
began = time.perf_counter()
get_ipython().run_cell_magic("generate", "--engine e --no-chat -t 1 -m {new} --ignore-eos --each prompts --out g", "{{item}}")
took = time.perf_counter() - began
"""


def check_installed() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"this measures in a real Jupyter kernel and needs {', '.join(missing)}: pip install ipykernel ipywidgets anywidget nest-asyncio2, "
            "or, without a network, `benchmarks/carry_wheels.sh` elsewhere and then `pip install --no-index --find-links wheels ...` here"
        )


def measure(models: list[str], workloads: list[str], settings: Settings, results: Results) -> list[dict[str, Any]]:
    check_installed()
    rows = []
    for model in models:
        if not settings.allows(f"a kernel with {model}"):
            continue
        folder = folder_with_tokenizer(model, settings.folder)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a process of its own, as the kernel is
            script = pool.submit(_in_script, model, folder, workloads, settings).result()
        in_kernel = _in_kernel(model, folder, workloads, settings)
        for name in workloads:
            cell, engine = in_kernel[name]
            row = {"model": model, "workload": name, "script_tok_s": script[name], "kernel_tok_s": cell, "of_script": cell / script[name]}
            row |= {"kernel_engine_tok_s": engine, "engine_of_script": engine / script[name], "target": TARGET}
            rows.append(results.add("kernel", row))
    shown = [
        (f"{row['model']} {row['workload']}", row["script_tok_s"], row["kernel_tok_s"], row["of_script"], row["engine_of_script"], TARGET)
        for row in rows
    ]
    table(
        "text in, streamed text out, from a Jupyter kernel",
        ("cell", "script tok/s", "kernel tok/s", "ratio", "without showing the end", "target"),
        shown,
    )
    return rows


def _in_script(model: str, folder: Path, workloads: list[str], settings: Settings) -> dict[str, float]:
    def rate(name: str, turn: int) -> float:
        return at_once(llm, text_prompts(name, folder, fresh=f"script {turn}", quick=settings.quick)).rate

    with opened(model, settings, folder, skip_tokenizer_init=False) as (llm, _):
        return {name: max(rate(name, turn) for turn in range(settings.repeats_of(name))) for name in workloads}


def _in_kernel(model: str, folder: Path, workloads: list[str], settings: Settings) -> dict[str, tuple[float, float]]:
    rates = {}
    options = engine_options(model, settings, skip_tokenizer_init=False)
    with started() as client, TemporaryDirectory() as files:
        run(client, LOAD.format(folder=str(folder), options=json.dumps(options)))
        _rate(client, "single", Path(files), text_prompts("single", folder, fresh="kernel warm-up", quick=True))
        for name in workloads:
            found = [
                _rate(client, name, Path(files), text_prompts(name, folder, fresh=f"kernel {turn}", quick=settings.quick))
                for turn in range(settings.repeats_of(name))
            ]
            rates[name] = max(found)
            say(f"{model} {name} in a kernel: {rates[name][0]:,.0f} tok/s")
        run(client, "e.close()")
    return rates


def _rate(client: BlockingKernelClient, name: str, files: Path, jobs: list[tuple[str, int]]) -> tuple[float, float]:
    """Tokens a second of the whole cell, and of the engine alone."""
    file = files / "jobs.json"
    file.write_text(json.dumps(jobs), "utf-8")
    if len({new for _, new in jobs}) == 1:
        run(client, f"prompts = [text for text, _ in json.loads(open({str(file)!r}).read())]")
        run(client, MAGIC.format(new=jobs[0][1]))
    else:
        run(client, STREAM.format(file=str(file)))
    tokens, took, engine = value(client, TIMES)
    assert tokens == sum(new for _, new in jobs), f"{name}: an output is shorter or longer than what was asked for"
    return tokens / took, tokens / engine


@contextmanager
def started() -> Iterator[BlockingKernelClient]:
    """A kernel of this interpreter, talked to through sockets in a folder of its own."""
    from jupyter_client.manager import KernelManager

    with TemporaryDirectory(prefix="nbengine-") as folder:
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        path = os.pathsep.join(part for part in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if part)
        manager.start_kernel(env={**os.environ, "PYTHONPATH": path}, extra_arguments=["--log-level=CRITICAL"])
        assert manager.kernel_spec is not None
        if manager.kernel_spec.argv[0] not in {sys.executable, "python"}:
            say(f"the kernel runs {manager.kernel_spec.argv[0]}, not {sys.executable}")
        client = manager.client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=WAIT)
            yield client
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


def run(client: BlockingKernelClient, code: str) -> None:
    """Run a cell to its end, reading all that it shows, as a front end does; a cell that fails ends the measurement."""
    reply = client.execute_interactive(code, timeout=WAIT, output_hook=lambda message: None, allow_stdin=False)["content"]  # noqa: ARG005
    if reply["status"] != "ok":
        raise RuntimeError(
            f"a cell failed in the kernel: {reply.get('ename')}: {reply.get('evalue')}\n" + "\n".join(reply.get("traceback", []))
        )


def value(client: BlockingKernelClient, expression: str) -> Any:
    reply = client.execute("", silent=True, user_expressions={"value": f"repr({expression})"}, reply=True, timeout=WAIT)
    return ast.literal_eval(ast.literal_eval(reply["content"]["user_expressions"]["value"]["data"]["text/plain"]))

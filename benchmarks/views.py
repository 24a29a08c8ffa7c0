"""What live views cost: throughput with views open and without, in turn, and the front thread's own processor time.

`python benchmarks/views.py` runs a load of ShareGPT's shape in a real kernel whose front end (this process) looks at the views, or looks away.
On a GPU host: `python benchmarks/views.py --model Qwen/Qwen3-0.6B --count 1000 --rounds 4`.
With `--trace` it is the trace that is kept or not, in turn, and no view is open.
`python benchmarks/views.py --synthetic --count 1000` says what an update of each view costs beside a real scheduler whose runner computes nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VIEWS = ("widgets.BlockTableView(engine)", "widgets.Timeline(engine)", "widgets.Dashboard(engine)")
SETUP = """
import sys, time
sys.path.insert(0, {here!r})
from nbengine import Engine, SamplingParams, widgets
from nbengine.bench.workloads import workload
from nbengine.widgets import playhead

playhead.SHARE = {share}
engine = Engine({model!r}, **{config!r})
room = engine.info.max_model_len // 2
jobs = [(prompt[:room], min(output, room)) for prompt, output in workload("sharegpt", {count}, vocab_size=engine.info.vocab_size)]
views = [{views}]
engine.front.call(int).result()

def spent(thread):
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))

def sent():
    return sum(view.updates for view in views)

def run():
    front, loop = engine.front._thread, engine._mailbox.thread
    engine.reset_prefix_cache()
    began, cost, work, updates, steps = time.perf_counter(), spent(front), spent(loop), sent(), engine.stats()["steps"]
    params = [SamplingParams(max_tokens=output, ignore_eos=True, temperature=0) for _, output in jobs]
    results = engine.generate([prompt for prompt, _ in jobs], params)
    seconds = time.perf_counter() - began
    return {{
        "seconds": seconds,
        "tokens_per_s": sum(len(result.outputs[0].token_ids) for result in results) / seconds,
        "front_s": spent(front) - cost,
        "engine_thread_s": spent(loop) - work,
        "updates": sent() - updates,
        "steps": engine.stats()["steps"] - steps,
    }}
"""
SYNTHETIC = """
import sys
from datetime import UTC, datetime
sys.path.insert(0, {here!r})
from synthetic_views import Load

found = Load({count}, {blocks}).measure({every})
"""
SIZES = "[len(view.packed['json']) + len(view.packed['data']) for view in views]"


class FrontEnd:
    """A kernel, and what a front end tells it of the views that it draws."""

    def __init__(self) -> None:
        from jupyter_client.manager import KernelManager

        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(extra_arguments=["--log-level=CRITICAL"])
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        self.views: list[str] = []  # their comms

    def run(self, code: str, expression: str = "None") -> Any:
        """Run a cell; what an expression is afterwards."""
        message = self.client.execute(code, user_expressions={"value": f"repr({expression})"}, allow_stdin=False)
        while True:
            heard = self.client.get_iopub_msg(timeout=3600)
            if heard["msg_type"] == "comm_open" and "packed" in heard["content"]["data"].get("state", {}):
                self.views.append(heard["content"]["comm_id"])
            if heard["parent_header"].get("msg_id") != message:
                continue
            if heard["msg_type"] == "error":
                sys.exit("\n".join(heard["content"]["traceback"]))
            if heard["msg_type"] == "status" and heard["content"]["execution_state"] == "idle":
                break
        reply = self.client.get_shell_msg(timeout=60)
        while reply["parent_header"].get("msg_id") != message:
            reply = self.client.get_shell_msg(timeout=60)
        return ast.literal_eval(ast.literal_eval(reply["content"]["user_expressions"]["value"]["data"]["text/plain"]))

    def look(self, seen: bool) -> None:
        """Draw all views in sight, or none."""
        for comm in self.views:
            data = {"method": "custom", "content": {"place": "here", "seen": seen}}
            self.client.shell_channel.send(self.client.session.msg("comm_msg", {"comm_id": comm, "data": data}))
        self.run("")

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def measure(model: str, count: int, rounds: int, share: int, config: dict[str, Any]) -> dict[str, Any]:
    """Rounds of the same load, with nobody looking and with everybody looking in turn."""
    front_end = FrontEnd()
    try:
        code = SETUP.format(here=str(HERE), model=model, config=config, count=count, share=share, views=", ".join(VIEWS))
        front_end.run(code)
        found = in_turn(front_end, ("closed", "open"), rounds, lambda kind: front_end.look(kind == "open"))
        sizes = front_end.run("engine.pause(); engine.submit_all([p for p, _ in jobs]); engine.step(40); time.sleep(1)", SIZES)
        about = described(front_end, model, count)
    finally:
        front_end.close()
    seconds, spent = (sum(one[name] for one in found["open"]) for name in ("seconds", "front_s"))
    return {
        **about,
        "views": VIEWS,
        "share": share,
        "tokens_per_s": medians(found),
        **lost(found["closed"], found["open"]),
        "front_share_of_a_core": round(spent / seconds, 4),
        "ms_per_update": round(1e3 * spent / max(1, sum(one["updates"] for one in found["open"])), 3),
        "updates_per_s": round(sum(one["updates"] for one in found["open"]) / seconds, 2),
        "largest_update_bytes": sizes,
        "runs": found,
    }


def measure_trace(model: str, count: int, rounds: int, config: dict[str, Any]) -> dict[str, Any]:
    """Rounds of the same load in the same engine, with its trace kept and without it in turn."""
    front_end = FrontEnd()
    try:
        front_end.run(SETUP.format(here=str(HERE), model=model, config=config, count=count, share=100, views=""))
        kept = front_end.run("", "engine.trace.capacity")
        capacities = {"without": 0, "with": kept}
        found = in_turn(front_end, tuple(capacities), rounds, lambda kind: front_end.run(f"engine.trace.capacity = {capacities[kind]}"))
        about = described(front_end, model, count)
    finally:
        front_end.close()
    return {**about, "trace_steps": kept, "tokens_per_s": medians(found), **lost(found["without"], found["with"]), "runs": found}


def in_turn(front_end: FrontEnd, kinds: tuple[str, str], rounds: int, prepare: Callable[[str], object]) -> dict[str, list[Any]]:
    """What each run of each kind was."""
    prepare(kinds[0])
    front_end.run("run()")  # warm up
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for number in range(2 * rounds):
        kind = kinds[(number + number // 2) % 2]  # the order alternates too
        prepare(kind)
        front_end.run("time.sleep(1)")  # views that are looked at again have caught up
        found[kind].append(front_end.run("result = run()", "result"))
        print(kind, {name: round(value, 3) for name, value in found[kind][-1].items()}, flush=True)
    return found


def medians(found: dict[str, list[Any]]) -> dict[str, float]:
    """Of the speeds of each kind."""
    return {kind: round(statistics.median(one["tokens_per_s"] for one in runs), 1) for kind, runs in found.items()}


def lost(before: list[Any], after: list[Any]) -> dict[str, float | None]:
    """The share of throughput that is lost, the mean over runs that followed each other, and how sure that is: its standard error."""
    shares = [1 - b["tokens_per_s"] / a["tokens_per_s"] for a, b in zip(before, after, strict=True)]
    error = round(statistics.stdev(shares) / len(shares) ** 0.5, 4) if len(shares) > 1 else None
    return {"throughput_lost": round(statistics.mean(shares), 4), "standard_error": error}


def described(front_end: FrontEnd, model: str, count: int) -> dict[str, Any]:
    """What was measured on what."""
    from nbengine.bench.results import commit

    device, blocks = front_end.run("import torch", "(str(engine.info.device), engine.trace.num_blocks)")
    card = front_end.run("", "torch.cuda.get_device_name()") if device.startswith("cuda") else platform.processor() or platform.machine()
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "requests": count, "blocks": blocks}
    return {"model": Path(model).name, "device": device, "card": card, **about}


def synthetic(count: int, blocks: int, every: int) -> dict[str, Any]:
    """What the updates cost where no GPU is waited for; the kernel's messages are sent."""
    front_end = FrontEnd()
    try:
        found: dict[str, Any] = front_end.run(SYNTHETIC.format(here=str(HERE), count=count, blocks=blocks, every=every), "found")
    finally:
        front_end.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tales")
    parser.add_argument("--count", type=int, default=64, help="requests in a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs with the views open, and as many without")
    parser.add_argument("--config", type=json.loads, default={}, help="of the engine, as JSON")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    parser.add_argument("--share", type=int, default=100, help="views take at most one part in so many of the time")
    parser.add_argument("--trace", action="store_true", help="no view is open: measure what keeping the trace costs")
    parser.add_argument("--synthetic", action="store_true", help="no model: only what an update costs, with --count requests")
    parser.add_argument("--blocks", type=int, default=72_619, help="of the synthetic pool")
    parser.add_argument("--every", type=int, default=40, help="steps between two synthetic updates")
    given = parser.parse_args()
    if given.synthetic:
        result = synthetic(given.count, given.blocks, given.every)
    elif given.trace:
        result = measure_trace(given.model, given.count, given.rounds, given.config)
    else:
        result = measure(given.model, given.count, given.rounds, given.share, given.config)
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")

"""A cell that keeps Python busy on the main thread while requests run: what it costs them."""

from __future__ import annotations

import sys
import time
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nbengine.bench.measure import Settings, asked, jobs_of, opened
from nbengine.bench.results import Results, say, table
from nbengine.waiting import wait_all

if TYPE_CHECKING:
    from nbengine import LLM, Request

ALLOWED = {"sharegpt": 0.10, "single": 0.25}  # the share of its speed that a workload may lose
LOOP = 2_000  # turns of the busy loop between two looks at whether all have ended
RESTORED = 3.0  # seconds that the engine may take to notice that it is idle


def measure(models: list[str], workloads: list[str], settings: Settings, results: Results) -> list[dict[str, Any]]:
    """Each workload with the main thread waiting and with it in a loop of arithmetic, in turns; the best of each counts."""
    rows = []
    for model in models:
        if not settings.allows(f"a busy main thread on {model}"):
            continue
        usual = sys.getswitchinterval()
        with opened(model, settings) as (llm, _):
            for name in workloads:
                rates: dict[bool, list[float]] = {False: [], True: []}
                turns = 0
                for turn in range(settings.turns):
                    for busy in (False, True):
                        rate, done = _rate(llm, name, settings, turn, busy=busy)
                        rates[busy].append(rate)
                        turns = max(turns, done)
                idle, under_load = max(rates[False]), max(rates[True])
                row = {
                    "model": model, "workload": name, "idle_tok_s": idle, "busy_tok_s": under_load, "lost": 1 - under_load / idle,
                    "allowed": ALLOWED.get(name), "main_thread_turns_s": turns, "main_thread_alone_turns_s": alone(),
                    "switch_interval_restored": restored(usual),
                }  # fmt: skip
                rows.append(results.add("busy", row))
                say(f"{model} {name}: {idle:,.0f} tok/s with an idle main thread, {under_load:,.0f} with a busy one")
    shown = [
        (
            f"{row['model']} {row['workload']}",
            row["idle_tok_s"],
            row["busy_tok_s"],
            row["lost"],
            row["allowed"],
            row["switch_interval_restored"],
        )
        for row in rows
    ]
    table("a busy main thread", ("cell", "idle tok/s", "busy tok/s", "lost", "allowed", "switch interval restored"), shown)
    return rows


def _rate(llm: LLM, name: str, settings: Settings, turn: int, *, busy: bool) -> tuple[float, int]:
    """Tokens a second, and turns a second of the loop on the main thread."""
    prompts, params = asked(jobs_of(name, llm, settings, f"{'busy' if busy else 'idle'} {turn}"))
    began = perf_counter()
    requests = llm.engine.submit_all(prompts, params)
    turns = 0
    if busy:
        turns = _arithmetic_until_ended(requests)
    outputs = wait_all(requests)
    ended = max(request.metrics.finished_time or 0.0 for request in requests)  # on the engine's clock: no look from here is in it
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return tokens / (ended - began), round(turns / (ended - began))


def _arithmetic_until_ended(requests: list[Request]) -> int:
    turns, left = 0, list(requests)
    while left:
        _arithmetic()
        turns += LOOP
        while left and left[-1].finished:
            left.pop()
    return turns


def _arithmetic() -> int:
    total = 0
    for number in range(LOOP):
        total += number * number
    return total


def alone() -> int:
    """Turns a second of the same loop when nothing else runs."""
    began = perf_counter()
    turns = 0
    while perf_counter() - began < 0.2:
        _arithmetic()
        turns += LOOP
    return round(turns / (perf_counter() - began))


def restored(usual: float) -> bool:
    """Whether the interpreter's switch interval is what it was, once the engine has seen that it is idle."""
    deadline = perf_counter() + RESTORED
    while sys.getswitchinterval() != usual and perf_counter() < deadline:
        time.sleep(0.01)
    return sys.getswitchinterval() == usual

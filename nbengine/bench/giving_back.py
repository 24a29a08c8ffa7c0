"""Whether memory comes back: after `close()`, over many rounds, however they end, and while an engine sleeps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from nbengine import LLM
from nbengine.bench.measure import Settings, asked, engine_options, jobs_of, opened, run
from nbengine.bench.results import Results, say, table
from nbengine.bench.shapes import model_folder

ROUNDS = 20
LIBRARIES = 20e6  # bytes that workspaces of libraries may keep
WAKE_UP = 1.0  # seconds that an 8B model may take from level 1
ENDINGS = ("closed", "an exception", "an interrupt")


class OurError(Exception):
    """What a user's own code may raise between two lines."""


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes allocated and reserved on the card; on a CPU, of this process, twice."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    resident = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, resident


def measure(models: list[str], settings: Settings, results: Results, rounds: int | None = None) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        if settings.allows(f"rounds of load, generate and close on {model}"):
            rows.append(results.add("rounds", rounds_of(model, settings, rounds or (3 if settings.quick else ROUNDS))))
        levels = [level for level in (1, 2) if settings.allows(f"sleep({level}) on {model}")]
        rows += [results.add("sleep", asleep(model, settings, level)) for level in levels]
    shown = [
        (
            f"{row['model']}, " + (f"{row['rounds']} rounds" if row["kind"] == "rounds" else f"sleep({row['level']})"), row["before_MB"],
            row["running_MB"], row["after_MB"], row.get("wake_up_s"),
        )
        for row in rows
    ]  # fmt: skip
    table("reserved memory in MB; asleep stands under after", ("case", "before", "running", "after", "wake up s"), shown)
    return rows


def rounds_of(model: str, settings: Settings, rounds: int) -> dict[str, Any]:
    """Load, generate, close, again and again; every second and third round ends by an exception and an interrupt."""
    before, closed, after, running = memory(settings.device), [], [], (0, 0)
    for number in range(rounds):
        with contextlib.suppress(OurError, KeyboardInterrupt), opened(model, settings) as (llm, _):
            try:
                run(llm, jobs_of("single", llm, settings, f"round {number}"))
                running = memory(settings.device)
                _end(llm, ENDINGS[number % len(ENDINGS)], settings)
            finally:
                llm.close()
                closed.append(memory(settings.device))  # before any garbage is collected
        after.append(memory(settings.device))
    say(
        f"{model}: {before[1] / 1e6:,.0f} MB reserved before, {after[0][1] / 1e6:,.0f} after one round, {after[-1][1] / 1e6:,.0f} after {rounds}"
    )
    return {
        "model": model, "rounds": rounds, "before_MB": before[1] / 1e6, "running_MB": running[1] / 1e6, "after_MB": after[-1][1] / 1e6,
        "before_allocated_MB": before[0] / 1e6, "after_allocated_MB": after[-1][0] / 1e6,
        "each_after_MB": [reserved / 1e6 for _, reserved in after], "each_closed_MB": [reserved / 1e6 for _, reserved in closed],
        "after_interrupted_load_MB": _interrupted_load(model, settings) / 1e6,
        "returned": max(a - b for a, b in zip(after[-1], before, strict=True)) <= LIBRARIES,
        "returned_by_close": max(a - b for a, b in zip(closed[-1], before, strict=True)) <= LIBRARIES,
    }  # fmt: skip


def _interrupted_load(model: str, settings: Settings) -> int:
    """Bytes reserved after a load that somebody interrupted, at no particular place in it."""
    path, options = model_folder(model, settings.folder), engine_options(model, settings)
    with contextlib.suppress(KeyboardInterrupt), _interrupt(0.2):
        LLM(str(path), **options).close()
        sleep(1.0)  # it was quicker: there is nothing to give back
    return memory(settings.device)[1]


def _end(llm: LLM, how: str, settings: Settings) -> None:
    if how == "an exception":
        raise OurError
    if how == "an interrupt":
        with _interrupt(0.05):
            while True:  # until it comes
                llm.generate(*asked(jobs_of("single", llm, settings, "interrupted")), use_tqdm=False)


@contextlib.contextmanager
def _interrupt(seconds: float) -> Iterator[None]:
    """As the stop button does, so long after this begins."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever else this process has made of it
    timer = threading.Timer(seconds, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def asleep(model: str, settings: Settings, level: int) -> dict[str, Any]:
    """How long it takes to go to sleep and to wake up, and what the card has meanwhile."""
    before = memory(settings.device)
    with opened(model, settings) as (llm, _):
        running = memory(settings.device)
        began = perf_counter()
        llm.sleep(level)
        slept = perf_counter()
        sleeping = memory(settings.device)
        woken = perf_counter()
        llm.wake_up()
        awake = perf_counter()
        again = run(llm, jobs_of("single", llm, settings, "awake"))
    say(f"{model}, level {level}: asleep in {slept - began:.3f} s, awake in {awake - woken:.3f} s, then {again.rate:,.0f} tok/s")
    return {
        "model": model, "level": level, "before_MB": before[1] / 1e6, "running_MB": running[1] / 1e6, "after_MB": sleeping[1] / 1e6,
        "sleep_s": slept - began, "wake_up_s": awake - woken, "allowed_wake_up_s": WAKE_UP if level == 1 else None, "single_after_tok_s": again.rate,
    }  # fmt: skip

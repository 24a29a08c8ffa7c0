"""Latency: requests that arrive at random at a share of the capacity, and a long prompt that arrives among others.

Tokens are timed by the bell that the engine's thread rings for a request's reader, so nothing wakes and nothing competes for
the interpreter. Tokens that come together count as one gap.
"""

from __future__ import annotations

import random
import time
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from nbengine.bench.measure import Settings, asked, jobs_of, opened, run
from nbengine.bench.results import Results, say, table
from nbengine.bench.shapes import shape
from nbengine.bench.workloads import Job, workload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbengine import LLM, Request

SHARE = 0.7  # of the measured capacity
DECODING = 64  # requests that a long prompt meets
FEW = 3  # tokens that each of these has before
LONG = 30_000  # tokens
LONG_CONTEXT = 32_768
TIMES = ("first", "second")


class Arrivals:
    """When a request's tokens came."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.times: list[float] = []
        self._tokens = 0
        request._waiters.append(self._ring)  # noqa: SLF001 - as a reader hangs up its bell, but this one wakes nobody

    def _ring(self) -> None:
        tokens = len(self.request.completions[0].token_ids)
        if tokens > self._tokens:  # it rings for other news too
            self._tokens = tokens
            self.times.append(perf_counter())

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between tokens, of those gaps that end in this time."""
        return [later - earlier for earlier, later in pairwise(self.times) if begin <= later <= end]


def percentiles(seconds: Iterable[float]) -> tuple[float | None, float | None]:
    """The 50th and the 99th, in milliseconds."""
    values = list(seconds)
    if not values:
        return None, None
    middle, high = 1e3 * np.percentile(values, [50, 99])
    return float(middle), float(high)


def measure(models: list[str], settings: Settings, results: Results, *, long: bool = True) -> list[dict[str, Any]]:
    rows = []
    for model in models:
        if settings.allows(f"arrivals on {model}"):
            rows += [results.add("online", row) for row in arriving(model, settings)]
        longest = 640 if settings.quick else LONG_CONTEXT
        if not long or shape(model)["max_position_embeddings"] < longest:
            continue
        ways = [chunked for chunked in (True, False) if settings.allows(f"a long prompt on {model}")]
        rows += [results.add("long-prompt", among_others(model, settings, chunked=chunked)) for chunked in ways]
    shown = [
        (
            row["model"] + (f", {row['rate_per_s']:.3g} requests/s, the {row['time']} time" if row["kind"] == "online" else f", long prompt, chunked={row['chunked']}"),
            row["first_token_p50_ms"], row["first_token_p99_ms"], row["between_p50_ms"], row["between_p99_ms"],
        )
        for row in rows
    ]  # fmt: skip
    columns = ("case", "first token p50 ms", "p99", "between tokens p50 ms", "p99")
    table("latency (with a long prompt: its first token, and the gaps of the others until then)", columns, shown)
    return rows


def arriving(model: str, settings: Settings) -> list[dict[str, Any]]:
    """sharegpt, each request at a time of its own; twice, as the first time some shapes of steps are met, compiled and captured."""
    with opened(model, settings) as (llm, _):
        full = run(llm, jobs_of("sharegpt", llm, settings, "capacity"))
        rate = SHARE * full.requests / full.seconds
        say(f"{model}: {rate:.3g} requests a second, {SHARE:.0%} of {full.requests / full.seconds:.3g}")
        about = {"model": model, "workload": "sharegpt", "share": SHARE, "rate_per_s": rate, "capacity_tok_s": full.rate}
        return [{**about, "time": turn, **_arrive(llm, jobs_of("sharegpt", llm, settings, f"arriving {turn}"), rate)} for turn in TIMES]


def _arrive(llm: LLM, jobs: list[Job], rate: float) -> dict[str, Any]:
    rng, watched, due = random.Random(0), [], perf_counter()
    began = due
    for prompt, param in zip(*asked(jobs), strict=True):
        due += rng.expovariate(rate)
        time.sleep(max(0.0, due - perf_counter()))
        watched.append(Arrivals(llm.engine.submit(prompt, param)))
    for one in watched:
        one.request.result()
    seconds = perf_counter() - began
    first = percentiles(one.request.metrics.time_to_first_token or 0.0 for one in watched)
    between = percentiles(gap for one in watched for gap in one.gaps())
    tokens = sum(len(one.request.completions[0].token_ids) for one in watched)
    return {
        "requests": len(watched), "tok_s": tokens / seconds, "first_token_p50_ms": first[0], "first_token_p99_ms": first[1],
        "between_p50_ms": between[0], "between_p99_ms": between[1],
    }  # fmt: skip


def among_others(model: str, settings: Settings, *, chunked: bool) -> dict[str, Any]:
    """What decoding requests notice of a long prompt, from its arrival to its first token."""
    decoding, tokens, longest, new = (8, 500, 640, 200) if settings.quick else (DECODING, LONG, LONG_CONTEXT, 4096)
    with opened(model, settings, max_model_len=longest, enable_chunked_prefill=chunked) as (llm, _):
        _long(llm, tokens, "warm-up").result()
        jobs = [(prompt[: 128 if not settings.quick else 16], new) for prompt, _ in _some(llm, decoding)]
        watched = [Arrivals(request) for request in llm.engine.submit_all(*asked(jobs))]
        _until_all_decode(watched)
        if not settings.quick:
            time.sleep(0.5)
        arrived = perf_counter()
        long = _long(llm, tokens, "measured")
        long.result()
        metrics = long.metrics
        assert metrics.first_token_time is not None
        for one in watched:
            one.request.cancel()
    before = percentiles(gap for one in watched for gap in one.gaps(end=arrived))
    during = percentiles(gap for one in watched for gap in one.gaps(arrived, metrics.first_token_time + 0.05))
    first = percentiles([metrics.time_to_first_token or 0.0])
    return {
        "model": model, "chunked": chunked, "decoding": decoding, "long_tokens": tokens, "first_token_p50_ms": first[0],
        "first_token_p99_ms": first[1], "between_p50_ms": during[0], "between_p99_ms": during[1], "before_p50_ms": before[0],
        "before_p99_ms": before[1],
    }  # fmt: skip


def _some(llm: LLM, count: int) -> list[tuple[list[int], int]]:
    return workload("fifty", count, fresh="decoding", vocab_size=llm.engine.info.vocab_size)


def _long(llm: LLM, tokens: int, fresh: object) -> Request:
    pieces = workload("fifty", -(-tokens // 128), fresh=f"long {fresh}", vocab_size=llm.engine.info.vocab_size)
    prompt = [token for piece, _ in pieces for token in piece][:tokens]
    prompts, params = asked([(prompt, 4)])
    return llm.engine.submit(prompts[0], params[0])


def _until_all_decode(watched: list[Arrivals]) -> None:
    """And have done so a few times."""
    deadline = perf_counter() + 60
    while not all(len(one.times) > FEW for one in watched):
        if perf_counter() > deadline:
            raise TimeoutError("the requests that are to decode had no token after a minute: is another program using the device?")
        time.sleep(0.001)

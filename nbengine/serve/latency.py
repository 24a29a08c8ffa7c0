"""How long requests took, as histograms with vLLM's names and buckets: cheap to write, read when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbengine.request import Request

FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
WHOLE = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts by upper bound, the sum, and what it is of."""

    def __init__(self, about: str, bounds: tuple[float, ...]) -> None:
        self.about = about
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: above every bound
        self.sum = 0.0

    def add(self, value: float | None, times: int = 1) -> None:
        """The same value, seen so many times; None is not known."""
        if value is not None and times > 0:
            self.counts[bisect_left(self.bounds, value)] += times
            self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        total, found = 0, []
        for bound, count in zip((*map(float, self.bounds), float("inf")), self.counts.copy(), strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return found


class Latency:
    """Of the requests that came over HTTP to one engine."""

    def __init__(self) -> None:
        self.histograms = {
            "time_to_first_token_seconds": Histogram("From a request's arrival to its first token", FIRST_TOKEN),
            "inter_token_latency_seconds": Histogram("From one token of a request to its next", BETWEEN_TOKENS),
            "request_time_per_output_token_seconds": Histogram("The same, averaged over each request", BETWEEN_TOKENS),
            "e2e_request_latency_seconds": Histogram("From a request's arrival to its end", WHOLE),
            "request_queue_time_seconds": Histogram("From a request's arrival to its first step", WHOLE),
            "request_inference_time_seconds": Histogram("From a request's first step to its last token", WHOLE),
            "request_prefill_time_seconds": Histogram("From a request's first step to its first token", WHOLE),
            "request_decode_time_seconds": Histogram("From a request's first token to its last", WHOLE),
            "request_prompt_tokens": Histogram("Tokens of a request's prompt", TOKENS),
            "request_generation_tokens": Histogram("Tokens of a request's outputs", TOKENS),
        }
        self.finished: Counter[str] = Counter()  # outputs by finish reason
        self._between = self.histograms["inter_token_latency_seconds"]

    def between(self, seconds: float, steps: int) -> None:
        """That many tokens of one output came in that time."""
        if steps > 0:
            self._between.add(seconds / steps, steps)

    def ended(self, request: Request, *, between_told: bool = False) -> None:
        """A request has ended; `between_told`: the times between its tokens were told as they came."""
        metrics, h = request.metrics, self.histograms
        lengths = [len(completion.token_ids) for completion in request.completions]
        steps = max(lengths)
        for completion in request.completions:
            self.finished[completion.finish_reason or "error"] += 1
        if metrics.first_token_time is not None and metrics.last_token_time is not None:
            decoding = metrics.last_token_time - metrics.first_token_time
            h["time_to_first_token_seconds"].add(metrics.time_to_first_token)
            h["request_prefill_time_seconds"].add(metrics.prefill_time)
            h["request_decode_time_seconds"].add(decoding)
            if steps > 1:
                h["request_time_per_output_token_seconds"].add(decoding / (steps - 1))
                if not between_told:
                    self.between(decoding, steps - 1)
            if metrics.first_scheduled_time is not None:
                h["request_inference_time_seconds"].add(metrics.last_token_time - metrics.first_scheduled_time)
        if metrics.finished_time is not None:
            h["e2e_request_latency_seconds"].add(metrics.finished_time - metrics.arrival_time)
        h["request_queue_time_seconds"].add(metrics.time_in_queue)
        h["request_prompt_tokens"].add(len(request.prompt_token_ids))
        h["request_generation_tokens"].add(sum(lengths))

"""The engine's counters under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GAUGES = {  # by their names in Engine.stats()
    "num_running": ("num_requests_running", "Sequences that run"),
    "num_waiting": ("num_requests_waiting", "Sequences that wait"),
    "kv_cache_usage": ("kv_cache_usage_perc", "Share of the KV blocks that is used, from 0 to 1"),
}
COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens found there"),
    "num_preemptions": ("num_preemptions", "Sequences that were preempted"),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of sequences that were admitted"),
    "generation_tokens": ("generation_tokens", "Tokens made"),
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One value, and what it is called."""

    name: str
    labels: dict[str, str]
    value: float


class Gauge(Metric):
    """A value that rises and falls."""

    __slots__ = ()


class Counter(Metric):
    """A value that only rises."""

    __slots__ = ()


def metrics_of(stats: Mapping[str, Any], model: str) -> list[Metric]:
    """What `Engine.stats()` has of vLLM's metrics, named as a script for vLLM asks for them."""
    labels = {"model_name": model}
    gauges = [Gauge(f"vllm:{name}", labels, stats[key]) for key, (name, _) in GAUGES.items()]
    return [*gauges, *(Counter(f"vllm:{name}", labels, stats[key]) for key, (name, _) in COUNTERS.items())]

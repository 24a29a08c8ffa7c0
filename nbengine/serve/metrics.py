"""/metrics: vLLM's names under `nbengine:`. The engine's counters are read when somebody scrapes, and cost nothing otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from nbengine.metrics import COUNTERS, GAUGES

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.serve.listener import Listener

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
REASONS = ("stop", "length", "abort", "error")


def exposition(listener: Listener) -> bytes:
    """Prometheus's text, from a registry of this server alone."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(listener))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._model = [listener.names[0]]

    def collect(self) -> Iterator[Metric]:
        engine = self._listener.engine_of()
        if engine is not None:
            yield from self._engine(engine)
        yield from self._latency()
        yield from self._traffic()

    def _engine(self, engine: Engine) -> Iterator[Metric]:
        stats = engine.stats()
        for key, (name, about) in GAUGES.items():
            yield self._gauge(name, about, stats[key])
        for key, (name, about) in COUNTERS.items():
            yield self._counter(name, about, stats[key])
        yield self._counter("engine_steps", "Steps of the engine", stats["steps"])
        states = GaugeMetricFamily("nbengine:engine_sleep_state", "1 for the state it is in", labels=["model_name", "sleep_state"])
        for state, level in (("awake", 0), ("weights_offloaded", 1), ("discard_all", 2)):
            states.add_metric([*self._model, state], float(engine.sleep_level == level))
        yield states
        labels = {
            "model_name": self._model[0],
            "block_size": str(engine.config.block_size),
            "num_gpu_blocks": str(stats["blocks_total"]),
            "enable_prefix_caching": str(engine.config.enable_prefix_caching),
        }
        about_cache = GaugeMetricFamily("nbengine:cache_config_info", "How the KV cache is made", labels=list(labels))
        about_cache.add_metric(list(labels.values()), 1.0)
        yield about_cache

    def _latency(self) -> Iterator[Metric]:
        latency = self._listener.latency
        for name, histogram in latency.histograms.items():
            family = HistogramMetricFamily(f"nbengine:{name}", histogram.about, labels=["model_name"])
            family.add_metric(self._model, histogram.buckets(), histogram.sum)
            yield family
        ended = CounterMetricFamily(
            "nbengine:request_success", "Outputs of requests over HTTP, by what ended them", labels=["model_name", "finished_reason"]
        )
        for reason in REASONS:
            ended.add_metric([*self._model, reason], latency.finished[reason])
        yield ended

    def _traffic(self) -> Iterator[Metric]:
        traffic = self._listener.traffic
        yield self._gauge("http_active_requests", "HTTP requests that are being answered by the model", traffic.active_requests)
        yield self._gauge("http_active_streams", "Those of them that are answered by events", traffic.active_streams)
        yield self._counter("http_sent_bytes", "Bytes of answers, without headers", traffic.bytes_sent)
        yield self._counter("http_cancelled_requests", "Clients that left before their answer was whole", traffic.cancelled)
        answered = CounterMetricFamily("nbengine:http_requests", "HTTP requests", labels=["model_name", "handler", "status"])
        for (endpoint, status), count in list(traffic.requests.items()):
            answered.add_metric([*self._model, endpoint, str(status)], count)
        yield answered

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"nbengine:{name}", about, labels=["model_name"])
        family.add_metric(self._model, value)
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(f"nbengine:{name}", about, labels=["model_name"])
        family.add_metric(self._model, value)
        return family

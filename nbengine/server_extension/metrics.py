"""The metrics of several engines as one page: each series carries labels of the engine that it is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Merged(Collector):
    def __init__(self, pages: Iterable[tuple[Mapping[str, str], str]]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        merged: dict[tuple[str, str], Metric] = {}
        for labels, page in self._pages:
            for family in text_string_to_metric_families(page):
                one = merged.setdefault((family.name, family.type), Metric(family.name, family.documentation, family.type))
                one.samples += [sample._replace(labels={**sample.labels, **labels}) for sample in family.samples]
        return merged.values()


def merge(pages: Iterable[tuple[Mapping[str, str], str]]) -> bytes:
    """Pages in Prometheus's text format, each with its engine's labels."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(pages))
    return generate_latest(registry)

"""/metrics and its dashboard: vLLM's names, values that are what happened, each server's own."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from nbengine.serve.latency import Histogram, Latency

VLLM = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions",
    "prompt_tokens", "generation_tokens", "request_success", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_inference_time_seconds", "request_prompt_tokens", "request_generation_tokens", "request_time_per_output_token_seconds",
    "cache_config_info",
}  # fmt: skip


def scrape(http):
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {family.name.removeprefix("nbengine:"): family for family in text_string_to_metric_families(answer.text)}


def value(families, name, sample=None, **labels):
    found = [
        s.value for s in families[name].samples
        if s.name == f"nbengine:{sample or name}" and all(s.labels.get(k) == v for k, v in labels.items())
    ]  # fmt: skip
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_the_names_are_vllms(http):
    families = scrape(http)
    assert set(families) >= VLLM
    assert all(sample.labels["model_name"] == "tales" for family in families.values() for sample in family.samples)


def test_what_happened_is_what_is_told(http):
    before = scrape(http)
    body = {"prompt": [10, 11, 12, 13, 14], "max_tokens": 9, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert "[DONE]" in http.post("/v1/completions", json={**body, "stream": True}).text
    assert http.post("/v1/completions", json={**body, "temperature": -1}).status_code == 400
    after = scrape(http)

    def more(name, sample=None, **labels):
        return value(after, name, sample, **labels) - value(before, name, sample, **labels)

    assert more("generation_tokens", "generation_tokens_total") == 18
    assert more("prompt_tokens", "prompt_tokens_total") == 10
    assert more("request_success", "request_success_total", finished_reason="length") == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prompt_tokens"):
        assert more(name, f"{name}_count") == 2
    assert more("inter_token_latency_seconds", "inter_token_latency_seconds_count") == 16
    assert more("request_generation_tokens", "request_generation_tokens_sum") == 18
    assert (
        more("e2e_request_latency_seconds", "e2e_request_latency_seconds_sum")
        >= more("request_decode_time_seconds", "request_decode_time_seconds_sum")
        > 0
    )
    assert more("inter_token_latency_seconds", "inter_token_latency_seconds_sum") == pytest.approx(
        more("request_decode_time_seconds", "request_decode_time_seconds_sum")
    )


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 5))))
def test_a_histograms_buckets_are_cumulative_and_lose_nothing(seen):
    histogram = Histogram("", (0.1, 1.0, 10.0))
    for number, times in seen:
        histogram.add(number, times)
    counts = [count for _, count in histogram.buckets()]
    assert counts == [sum(times for number, times in seen if number <= bound) for bound in (0.1, 1.0, 10.0, float("inf"))]
    assert histogram.sum == pytest.approx(sum(number * times for number, times in seen))


def test_a_request_that_never_ran_counts_where_it_can():
    latency = Latency()
    metrics = SimpleNamespace(first_token_time=None, last_token_time=None, finished_time=2.0, arrival_time=1.0, time_in_queue=None)
    latency.ended(
        SimpleNamespace(metrics=metrics, completions=[SimpleNamespace(token_ids=[], finish_reason="abort")], prompt_token_ids=[1])
    )
    assert latency.finished == {"abort": 1}
    assert sum(latency.histograms["e2e_request_latency_seconds"].counts) == 1
    assert sum(latency.histograms["time_to_first_token_seconds"].counts) == 0


def test_the_dashboard_asks_for_metrics_that_there_are(http):
    board = json.loads(files("nbengine.serve").joinpath("grafana.json").read_text("utf-8"))
    there = {sample.name for family in scrape(http).values() for sample in family.samples}
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 10
    for expression in asked:
        names = re.findall(r"nbengine:\w+", expression)
        assert names, expression
        assert set(names) <= there, expression

"""What comes back: vLLM's names, times that follow from times, reprs short enough for a notebook."""

import dataclasses
import pickle

import pytest

from nbengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def names(cls):
    return [field.name for field in dataclasses.fields(cls)]


def test_names_are_vllms_in_vllms_order():
    assert names(RequestOutput)[:7] == ["request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "metrics"]
    assert "num_cached_tokens" in names(RequestOutput)
    assert names(CompletionOutput) == ["index", "text", "token_ids", "cumulative_logprob", "logprobs", "finish_reason", "stop_reason"]
    assert names(Logprob) == ["logprob", "rank", "decoded_token"]
    assert {"arrival_time", "first_scheduled_time", "first_token_time", "finished_time"} <= set(names(RequestMetrics))


def test_times_follow_from_when_things_happened():
    metrics = RequestMetrics(
        arrival_time=10.0,
        first_scheduled_time=10.5,
        first_token_time=11.0,
        last_token_time=13.0,
        finished_time=14.0,
        num_generation_tokens=10,
        num_steps=5,
    )
    assert metrics.time_in_queue == 0.5
    assert metrics.time_to_first_token == 1.0
    assert metrics.prefill_time == 0.5
    assert metrics.decode_time == 2.0
    assert metrics.inter_token_latency == 0.5
    assert metrics.e2e_latency == 4.0
    assert metrics.tokens_per_second == 2.5


@pytest.mark.parametrize(
    "name",
    ["time_in_queue", "time_to_first_token", "prefill_time", "decode_time", "inter_token_latency", "e2e_latency", "tokens_per_second"],
)
def test_a_time_that_is_not_known_yet_is_none(name):
    assert getattr(RequestMetrics(arrival_time=5.0), name) is None


def test_one_token_has_no_time_between_tokens():
    assert RequestMetrics(first_token_time=1.0, last_token_time=1.0, num_steps=1).inter_token_latency is None


def test_an_output_is_finished_once_it_has_a_reason():
    output = CompletionOutput(0, "a", [1])
    assert not output.finished()
    output.finish_reason = "stop"
    assert output.finished()


def test_reprs_are_short_and_say_what_matters():
    output = RequestOutput(
        "r7", "word " * 1000, [5] * 1000, outputs=[CompletionOutput(1, "tale " * 1000, [6] * 900, finish_reason="length")]
    )
    output.prompt_logprobs = [None, *({token: Logprob(-1.0, 1, "x") for token in range(20)} for _ in range(999))]
    shown = repr(output)
    assert len(shown) < 420
    for part in ("r7", "word word", "[1000 ids]", "index=1", "tale tale", "[900 ids]", "finish_reason='length'", "finished=False"):
        assert part in shown
    assert "stop_reason=13" in repr(CompletionOutput(0, "", [], finish_reason="stop", stop_reason=13))
    assert "prompt=" not in repr(RequestOutput("0", None, [1]))
    assert "time_to_first_token=1.5" in repr(RequestMetrics(arrival_time=1.0, first_token_time=2.5))


def test_two_outputs_share_nothing():
    one, other = RequestOutput("1", None, []), RequestOutput("2", None, [])
    one.outputs.append(CompletionOutput(0, "", []))
    one.metrics.num_preemptions = 3
    assert (other.outputs, other.metrics.num_preemptions) == ([], 0)


def test_outputs_are_plain_values_that_pickle():
    output = RequestOutput(
        "1", "p", [1], [None], [CompletionOutput(0, "t", [2], -0.5, [{2: Logprob(-0.5, 1, "t")}], "stop", "end")], finished=True
    )
    assert pickle.loads(pickle.dumps(output)) == output
    assert dataclasses.asdict(output)["outputs"][0]["logprobs"] == [{2: {"logprob": -0.5, "rank": 1, "decoded_token": "t"}}]

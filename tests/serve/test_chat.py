"""Chat completions, and token ids by way of the template."""

from __future__ import annotations

import pytest

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Tell me a tale about a fox."}]
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
pytestmark = pytest.mark.usefixtures("untouched")


def post(http, **body):
    answer = http.post(PATH, json={"messages": MESSAGES, **GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_conversation_goes_through_the_models_template(http, engine):
    told = post(http, max_completion_tokens=8, return_token_ids=True)
    text = engine.get_tokenizer().apply_chat_template(MESSAGES)
    assert told["prompt_token_ids"] == engine.get_tokenizer().encode(text, add_special_tokens=False)
    assert told["choices"][0]["message"]["role"] == "assistant"
    assert told["choices"][0]["message"]["content"] == engine.get_tokenizer().decode(told["choices"][0]["token_ids"])
    assert http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"] == told["prompt_token_ids"]


@pytest.mark.parametrize(
    "body",
    [{}, {"n": 2, "seed": 3, "temperature": 0.9}, {"logprobs": True, "top_logprobs": 2}, {"stop": [" fox"]}, {"return_token_ids": True}],
)
def test_events_together_are_the_whole_answer(http, stream, body):
    body = {"messages": MESSAGES, **GREEDY, "max_completion_tokens": 20, **body}
    whole = http.post(PATH, json=body).json()
    *found, last = stream(PATH, **body, stream_options={"include_usage": True})
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
    assert all(event["usage"] is None for event in found)
    for choice in whole["choices"]:
        own = [c for event in found for c in event["choices"] if c["index"] == choice["index"]]
        assert [event["prompt_token_ids"] for event in found if "prompt_token_ids" in event] == (
            [whole["prompt_token_ids"]] if "return_token_ids" in body else []
        )
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        if body.get("logprobs"):
            told = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert [entry["token"] for entry in told] == [entry["token"] for entry in choice["logprobs"]["content"]]
            assert all(len(entry["top_logprobs"]) == 2 for entry in told)
            assert b"".join(bytes(entry["bytes"]) for entry in told).decode() == choice["message"]["content"]


def test_usage_comes_with_every_event_where_that_is_asked_for(stream):
    found = stream(
        PATH,
        messages=MESSAGES,
        max_completion_tokens=6,
        ignore_eos=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_no_usage_is_told_where_none_is_asked_for(stream):
    assert all("usage" not in event for event in stream(PATH, messages=MESSAGES, max_completion_tokens=3))


def test_the_last_message_can_be_gone_on_with(http):
    begun = [*MESSAGES, {"role": "assistant", "content": "Once upon a time there"}]
    told = post(http, messages=begun, continue_final_message=True, echo=True, max_completion_tokens=4)
    assert told["choices"][0]["message"]["content"].startswith("Once upon a time there")


def test_both_names_of_max_tokens_are_obeyed(http):
    for name in ("max_tokens", "max_completion_tokens"):
        assert post(http, ignore_eos=True, **{name: 3})["usage"]["completion_tokens"] == 3


def test_contents_may_be_lists_of_text_parts(http):
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    one, two = post(http, max_tokens=8), post(http, messages=parts, max_tokens=8)
    assert one["choices"][0]["message"] == two["choices"][0]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": 7, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
        ({"chat_template_kwargs": {"nothing_reads_this": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenizer": True}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Ada"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, *MESSAGES]}, "messages"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"priority": 1}, "priority"),
        ({"min_tokens": 100_000}, "min_tokens"),
        ({"stop": [str(i) for i in range(65)]}, "stop"),
        ({"bad_words": [str(i) for i in range(1025)]}, "bad_words"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 500}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_what_cannot_be_is_refused_by_name(refused, body, param):
    assert refused(PATH, **{"messages": MESSAGES, **body})["param"] == param


def test_messages_are_needed(refused):
    assert refused(PATH)["param"] == "messages"


def test_tokens_there_and_back(http, engine):
    told = http.post("/tokenize", json={"prompt": "Once upon a time", "return_token_strs": True}).json()
    assert told["tokens"] == engine.get_tokenizer().encode("Once upon a time")
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == engine.info.max_model_len
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "Once upon a time"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": False}, "add_generation_prompt"),
        ("/detokenize", {"tokens": [99999999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_tokens_and_texts_are_refused_by_name(refused, path, body, param):
    assert refused(path, **body)["param"] == param

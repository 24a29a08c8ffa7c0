"""Completions: what is asked for is what comes, whole and by events, and what cannot be is refused by its field's name."""

from __future__ import annotations

import pytest

from nbengine import SamplingParams

PATH = "/v1/completions"
PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "repetition_penalty": 1.0}
pytestmark = pytest.mark.usefixtures("untouched")


def post(http, **body):
    answer = http.post(PATH, json={"prompt": PROMPT, **GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def greedy(engine, tokens, **more):
    [output] = engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=tokens, **more))
    return output.outputs[0]


def joined(found, index=0):
    return "".join(choice["text"] for event in found for choice in event["choices"] if choice["index"] == index)


def test_the_text_is_the_engines_own(http, engine):
    told = post(http, max_tokens=12, return_token_ids=True)
    assert told["object"] == "text_completion"
    assert told["model"] == "tales"
    [choice] = told["choices"]
    expected = greedy(engine, 12)
    assert choice["text"] == expected.text
    assert choice["token_ids"] == expected.token_ids
    assert choice["prompt_token_ids"] == engine.get_tokenizer().encode(PROMPT)
    assert choice["finish_reason"] == "length"
    assert told["usage"]["completion_tokens"] == 12
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + 12


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 3, "temperature": 1.0, "seed": 7},
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"prompt": ["The fox", "The crow said"], "n": 2, "temperature": 0.8, "seed": 1},
        {"prompt": [[5, 6, 7], [8, 9]]},
        {"stop": [" a"]},
        {"stop": [" a"], "include_stop_str_in_output": True},
        {"return_token_ids": True},
        {"return_token_ids": True, "echo": True, "logprobs": 1, "prompt": ["The fox", "The crow said"]},
        {"logprobs": 1, "return_tokens_as_token_ids": True},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
        {"echo": True, "max_tokens": 0},
    ],
)
def test_events_together_are_the_whole_answer(http, stream, body):
    body = {"prompt": PROMPT, **GREEDY, "max_tokens": 20, **body}
    whole = http.post(PATH, json=body).json()
    found = stream(PATH, **body, stream_options={"include_usage": True})
    *parts, last = found
    assert last["choices"] == []
    assert {k: v for k, v in last["usage"].items() if k != "prompt_tokens_details"} == {
        k: v for k, v in whole["usage"].items() if k != "prompt_tokens_details"
    }
    for choice in whole["choices"]:
        own = [c for event in parts for c in event["choices"] if c["index"] == choice["index"]]
        assert joined(parts, choice["index"]) == choice["text"]
        assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["stop_reason"] == choice["stop_reason"]
        if choice["logprobs"] is not None:
            for name, values in choice["logprobs"].items():
                told = [value for c in own if c["logprobs"] for value in c["logprobs"][name]]
                assert told == (pytest.approx(values, abs=1e-3) if name == "token_logprobs" and None not in values else told)
                assert len(told) == len(values)
                if name in {"tokens", "text_offset"}:
                    assert told == values
        if "token_ids" in choice:
            assert [token for c in own for token in c.get("token_ids", [])] == choice["token_ids"]
            assert [c["prompt_token_ids"] for c in own if "prompt_token_ids" in c] == [choice["prompt_token_ids"]]


def test_offsets_point_at_their_tokens_in_the_text(http):
    [choice] = post(http, max_tokens=10, echo=True, logprobs=0)["choices"]
    told = choice["logprobs"]
    for token, at in zip(told["tokens"], told["text_offset"], strict=True):
        assert choice["text"][at : at + len(token)] == token
    assert told["token_logprobs"][0] is None
    assert all(value <= 0 for value in told["token_logprobs"][1:])
    chosen = zip(told["tokens"], told["token_logprobs"], strict=True)
    assert told["top_logprobs"] == [None, *({token: value} for token, value in list(chosen)[1:])]


def test_a_prompt_can_be_scored_without_an_answer(http):
    told = post(http, echo=True, max_tokens=0, logprobs=1)
    [choice] = told["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == told["usage"]["prompt_tokens"]
    assert told["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_come_as_vllm_tells_them(http):
    [choice] = post(http, max_tokens=1, prompt_logprobs=1)["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert all({"logprob", "rank", "decoded_token"} == set(entry) for token in rest for entry in token.values())


def test_every_sampling_field_reaches_the_sampler(http, engine):
    ids = engine.get_tokenizer().encode("the fox", add_special_tokens=False)
    only = {"allowed_token_ids": ids, "max_tokens": 6, "return_token_ids": True, "ignore_eos": True}
    assert set(post(http, **only)["choices"][0]["token_ids"]) <= set(ids)
    forced = post(http, logit_bias={str(ids[0]): 90}, max_tokens=3, return_token_ids=True)
    assert forced["choices"][0]["token_ids"] == [ids[0]] * 3
    plain = greedy(engine, 30).text
    for penalty in ({"repetition_penalty": 3.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert post(http, max_tokens=30, **penalty)["choices"][0]["text"] == greedy(engine, 30, **penalty).text != plain
    first = greedy(engine, 8).token_ids
    stopped = post(http, stop_token_ids=[first[3]], max_tokens=8, return_token_ids=True)["choices"][0]
    assert stopped["token_ids"] == first[: first.index(first[3]) + 1]
    assert stopped["stop_reason"] == first[3]
    assert stopped["finish_reason"] == "stop"
    seeded = [post(http, temperature=1.5, seed=3, max_tokens=8)["choices"][0]["text"] for _ in range(2)]
    assert seeded[0] == seeded[1] != post(http, temperature=1.5, seed=4, max_tokens=8)["choices"][0]["text"]
    word = greedy(engine, 2).text.split()[0]
    assert word not in post(http, bad_words=[word], max_tokens=8)["choices"][0]["text"].split()
    assert post(http, temperature=2.0, top_k=1, max_tokens=8)["choices"][0]["text"] == greedy(engine, 8).text
    assert post(http, temperature=2.0, min_p=1.0, max_tokens=8)["choices"][0]["text"] == greedy(engine, 8).text
    assert post(http, temperature=2.0, top_p=0.0001, max_tokens=8)["choices"][0]["text"] == greedy(engine, 8).text
    assert len(post(http, max_tokens=30, min_tokens=25, return_token_ids=True)["choices"][0]["token_ids"]) >= 25


def test_what_is_left_out_is_the_models_own_default_and_null_is_as_good_as_left_out(http, engine):
    defaults = engine.default_params()
    own = {name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    assert own != {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    one = http.post(PATH, json={"prompt": PROMPT, "seed": 5}).json()["choices"][0]
    two = http.post(PATH, json={"prompt": PROMPT, "seed": 5, **own, "top_p": None}).json()["choices"][0]
    assert one["text"] == two["text"]
    assert http.post(PATH, json={"prompt": PROMPT, "seed": 5}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 100000}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2, "min_tokens": 5}, "min_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": [1]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": 500}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e300}}, "logit_bias"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"stop_token_ids": [99999999]}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"seed": "x"}, "seed"),
        ({"priority": "first"}, "priority"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a", 7]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "word " * 3000}, "prompt"),
        ({"suffix": "and so"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"guided_json": {}}, "guided_json"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_is_refused_by_name(refused, body, param):
    error = refused(PATH, **{"prompt": PROMPT, **body})
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_values_that_ask_for_nothing_are_taken(http):
    neutral = {"best_of": 1, "suffix": "", "use_beam_search": False, "response_format": {"type": "text"}, "guided_json": None, "user": "me"}
    assert post(http, max_tokens=2, **neutral)["choices"]


def test_an_unknown_field_is_told_with_the_nearest_name(refused):
    assert "temperature" in refused(PATH, prompt=PROMPT, temprature=1)["message"]


def test_another_model_is_not_found(refused):
    error = refused(PATH, 404, prompt=PROMPT, model="gpt-4")
    assert error["param"] == "model"
    assert error["code"] == "model_not_found"
    assert "tales" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [list(range(10, 410))] * 60, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "fox " * 6000}]}),
        ("/tokenize", {"prompt": "fox " * 6000, "return_token_strs": True}),
        ("/detokenize", {"tokens": [100] * 6000}),
    ],
)
def test_a_long_prompt_is_worked_on_beside_the_front(http, server, monkeypatch, path, body):
    worked = []
    submit = server._listener.preparing.submit
    monkeypatch.setattr(server._listener.preparing, "submit", lambda function: worked.append(path) or submit(function))
    assert http.post(path, json=body).status_code == (400 if "chat" in path else 200)  # a conversation too long for tales
    assert worked == [path]

"""The official client, sync and async, two hundred streams at once, and the errors that it raises for what we answer."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest

from nbengine import SamplingParams

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Tell me a tale about a fox."}]
STREAMS = 200
pytestmark = pytest.mark.usefixtures("untouched")


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tales"]
    assert client.models.retrieve("tales").owned_by == "nbengine"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_whole_answers(client, engine):
    told = client.completions.create(model="tales", prompt=PROMPT, max_tokens=8, temperature=0, extra_body={"repetition_penalty": 1.0})
    assert told.choices[0].text == engine.generate(PROMPT, SamplingParams(max_tokens=8, temperature=0))[0].outputs[0].text
    chat = client.chat.completions.create(model="tales", messages=MESSAGES, max_completion_tokens=8, n=2, logprobs=True, top_logprobs=1)
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens - len(chat.choices[1].logprobs.content)


def test_streams(client):
    body = {"model": "tales", "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**body)
    with client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}) as stream:
        parts = list(stream)
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(model="tales", messages=MESSAGES, stop=[" "], temperature=0) as stream:
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


def test_the_clients_own_errors_are_raised(client, server):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tales", prompt=PROMPT, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=PROMPT)
    for key in ("wrong", server.api_key + "x", server.api_key[:-1]):
        with pytest.raises(openai.AuthenticationError) as refused:
            client.with_options(api_key=key).models.list()
        assert refused.value.code == "invalid_api_key"
        assert server.api_key not in str(refused.value)


@pytest.mark.asyncio
async def test_every_token_of_two_hundred_streams_arrives(server, engine):
    """Different lengths and prompts: each stream's ids are what the engine itself gives for it, so no token is lost or another's."""
    prompts = [f"The {i}th tale is of a fox" for i in range(STREAMS)]
    lengths = [3 + i % 9 for i in range(STREAMS)]
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=280) as client:

        async def one(prompt: str, length: int):
            ids, texts, usage = [], [], None
            stream = await client.completions.create(
                model="tales", prompt=prompt, max_tokens=length, temperature=0, stream=True, stream_options={"include_usage": True},
                extra_body={"repetition_penalty": 1.0, "ignore_eos": True, "return_token_ids": True, "top_k": 0, "top_p": 1.0},
            )  # fmt: skip
            async for event in stream:
                usage = event.usage or usage
                for choice in event.choices:
                    texts.append(choice.text)
                    ids += choice.token_ids
            return ids, "".join(texts), usage.completion_tokens

        found = await asyncio.gather(*map(one, prompts, lengths))
    expected = await engine.agenerate(prompts, [SamplingParams(max_tokens=length, temperature=0, ignore_eos=True) for length in lengths])
    for (ids, text, count), output, length in zip(found, expected, lengths, strict=True):
        assert len(ids) == count == length
        assert ids == output.outputs[0].token_ids
        assert text == output.outputs[0].text


def test_blocks_are_back_within_a_second_of_a_clients_leaving(client, engine, until):
    endless = {"model": "tales", "prompt": PROMPT, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    streams = [client.completions.create(**endless, stream=True) for _ in range(4)]
    for stream in streams:
        next(iter(stream))
    until(lambda: engine.stats()["num_running"] == 4)
    left = time.perf_counter()
    for stream in streams:
        stream.close()
    until(lambda: engine.stats()["blocks_used"] == 0, timeout=30)
    assert time.perf_counter() - left < 1.0
    assert engine.http_stats()["requests_cancelled"] >= 4


def test_a_client_that_gives_up_on_a_whole_answer_ends_it_too(client, engine, until):
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(model="tales", prompt=PROMPT, max_tokens=1900, extra_body={"ignore_eos": True})
    until(lambda: engine.stats()["num_running"] == 0, timeout=5)


def test_one_that_leaves_does_not_disturb_the_others(client, engine):
    body = {"model": "tales", "prompt": PROMPT, "temperature": 0, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    alone = client.completions.create(**body).choices[0].text
    stay = client.completions.create(**body, stream=True)
    leave = client.completions.create(**body, stream=True)
    next(iter(leave))
    leave.close()
    assert "".join(event.choices[0].text for event in stay) == alone


def test_an_engine_that_is_put_to_sleep_answers_503_and_wakes(client, server, engine):
    engine.sleep()
    try:
        assert server.stats()["servers"]
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="tales", prompt=PROMPT)
        assert refused.value.status_code == 503
        assert refused.value.code == "engine_asleep"
        assert refused.value.response.headers["retry-after"]
        assert httpx.get(f"{server.url}/health", headers={"Authorization": f"Bearer {server.api_key}"}).status_code == 503
    finally:
        engine.wake_up()
    assert client.completions.create(model="tales", prompt=PROMPT, max_tokens=2).choices


def test_a_stream_outlasts_a_pause(client, engine):
    stream = client.completions.create(
        model="tales", prompt=PROMPT, max_tokens=40, temperature=0, stream=True, extra_body={"ignore_eos": True, "return_token_ids": True}
    )
    first = next(iter(stream))
    engine.pause()
    time.sleep(0.1)
    engine.resume()
    assert len(first.choices[0].token_ids) + sum(len(event.choices[0].token_ids) for event in stream) == 40

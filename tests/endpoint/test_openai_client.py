"""OpenAI's own client, through a real Jupyter server, with engines in real kernels."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import psutil
import pytest
from jupyter_process import Jupyter, Kernel
from openai import AsyncOpenAI, OpenAI

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
FULL: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}  # vLLM's
LONG: dict[str, Any] = {"max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "Tell me a tale about a fox."}]


@pytest.fixture
def client(jupyter: Jupyter, two_kernels: list[Kernel]):
    with OpenAI(base_url=jupyter.base_url, api_key=jupyter.token, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def tales(kernel: Kernel) -> str:
    """The first kernel's model, which the second serves too."""
    return f"tales@{kernel.short}"


def idle(kernel: Kernel) -> bool:
    stats = kernel.value("{name: engine.stats()[name] for name in ('num_running', 'num_waiting', 'blocks_used')}")
    return not any(stats.values())


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_kernels_models_are_listed(client: OpenAI, two_kernels: list[Kernel]):
    one, two = two_kernels
    listed = {model.id for model in client.models.list()}
    assert listed == {f"tales@{one.short}", f"tales@{two.short}", "twin"}
    for name in listed:
        assert client.models.retrieve(name).id == name


def test_a_completion_is_the_one_that_the_kernel_itself_makes(client: OpenAI, kernel: Kernel, tales: str):
    params = "SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1.2)"  # by default the endpoint takes the model's own
    kernel.run(f"from nbengine import SamplingParams\n[out] = engine.generate(['The fox'], {params})")
    answer = client.completions.create(model=tales, prompt="The fox", extra_body={"repetition_penalty": 1.2}, **GREEDY)
    assert answer.choices[0].text == kernel.value("out.outputs[0].text")
    assert answer.usage.completion_tokens == kernel.value("len(out.outputs[0].token_ids)")


def test_a_stream_of_chat_is_the_whole_answer_in_pieces(client: OpenAI, tales: str):
    whole = client.chat.completions.create(model=tales, messages=MESSAGES, **GREEDY)
    pieces = list(
        client.chat.completions.create(model=tales, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_each_kernel_answers_for_its_own_model(client: OpenAI, two_kernels: list[Kernel], tales: str):
    counts = "len(engine.trace.records)"
    for kernel, name in zip(two_kernels, (tales, "twin"), strict=True):
        before = [one.value(counts) for one in two_kernels]
        client.completions.create(model=name, prompt="The king", max_tokens=4)
        after = [one.value(counts) for one in two_kernels]
        assert [one for one, was, now in zip(two_kernels, before, after, strict=True) if now > was] == [kernel]
    with pytest.raises(openai.BadRequestError, match="2 kernels serve 'tales'"):
        client.completions.create(model="tales", prompt="x")


def test_tokenize_and_metrics_are_there(jupyter: Jupyter, two_kernels: list[Kernel]):
    told = jupyter.http.post("nbengine/tokenize", json={"model": "twin", "prompt": "The fox"}).raise_for_status().json()
    back = jupyter.http.post("nbengine/detokenize", json={"model": "twin", "tokens": told["tokens"]}).raise_for_status().json()
    assert back["prompt"].endswith("The fox")
    metrics = jupyter.http.get("nbengine/metrics").raise_for_status().text
    for kernel in two_kernels:
        assert f'kernel="{kernel.short}"' in metrics
    assert set(jupyter.get("/health")["engines"].values()) == {200}
    assert jupyter.get("/load") == {"server_load": 0}


def test_hugging_faces_client_works_too(jupyter: Jupyter, two_kernels: list[Kernel]):
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=jupyter.base_url, api_key=jupyter.token)
    answer = client.chat_completion(MESSAGES, model="twin", max_tokens=8, temperature=0)
    assert answer.choices[0].message.content
    assert "".join(
        piece.choices[0].delta.content or "" for piece in client.chat_completion(MESSAGES, model="twin", max_tokens=8, stream=True)
    )


@pytest.mark.slow
def test_litellm_works_too(jupyter: Jupyter, two_kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask a network
    import litellm

    about = {"model": "hosted_vllm/twin", "api_base": jupyter.base_url, "api_key": jupyter.token, "messages": MESSAGES, "max_tokens": 8}
    assert litellm.completion(**about).choices[0].message.content
    assert "".join(piece.choices[0].delta.content or "" for piece in litellm.completion(**about, stream=True))


# ── many at once ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def streams(jupyter: Jupyter, models: list[str], count: int, max_tokens: int) -> None:
    """So many streams at once; each has all its tokens, in order, and no other's."""

    async def stream(number: int) -> tuple[list[int], str, Any]:
        ids, text, usage = [], "", None
        options = {"stream": True, "stream_options": {"include_usage": True}, "seed": number, "extra_body": FULL}
        async for event in await client.completions.create(
            model=models[number % len(models)], prompt=f"Tale {number}: The fox", max_tokens=max_tokens, **options
        ):
            for choice in event.choices:
                ids += choice.token_ids or []
                text += choice.text
            usage = event.usage or usage
        return ids, text, usage

    async def whole(number: int) -> tuple[list[int], str]:
        answer = await client.completions.create(
            model=models[number % len(models)], prompt=f"Tale {number}: The fox", max_tokens=max_tokens, seed=number, extra_body=FULL
        )
        return answer.choices[0].token_ids, answer.choices[0].text

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(limits=limits, timeout=300) as http,
        AsyncOpenAI(base_url=jupyter.base_url, api_key=jupyter.token, max_retries=0, http_client=http) as client,
    ):
        got = await asyncio.gather(*(stream(number) for number in range(count)))
        for ids, _, usage in got:
            assert len(ids) == usage.completion_tokens == max_tokens
        for number in range(0, count, count // 4):
            assert await whole(number) == got[number][:2]


@pytest.mark.asyncio
async def test_every_token_of_32_streams_over_two_kernels_is_accounted_for(jupyter: Jupyter, two_kernels: list[Kernel], tales: str):
    await streams(jupyter, [tales, "twin"], 32, 24)
    assert all(idle(kernel) for kernel in two_kernels)


@pytest.mark.slow
@pytest.mark.asyncio
async def test_every_token_of_200_streams_is_accounted_for(jupyter: Jupyter, kernel: Kernel, tales: str):
    await streams(jupyter, [tales], 200, 64)
    assert idle(kernel)


def test_clients_that_leave_in_mid_stream_give_their_blocks_back_within_a_second(
    client: OpenAI, kernel: Kernel, tales: str, until: Callable[..., None]
):
    answers = [client.completions.create(model=tales, prompt="Once", **LONG) for _ in range(4)]
    for answer in answers:
        for _, _ in zip(range(3), answer, strict=False):
            pass
    assert kernel.value("engine.stats()['num_running']") == 4
    for answer in answers:
        answer.close()
    began = time.monotonic()
    until(lambda: idle(kernel))
    assert time.monotonic() - began < 1.0


# ── strangers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_wrong_and_missing_tokens_are_refused(jupyter: Jupyter, other_server: Jupyter, two_kernels: list[Kernel]):
    secrets = [json.loads(file.read_text())["secret"] for file in jupyter.runtime.glob("nbengine-*.json")]
    assert len(secrets) == 2
    for key in ("wrong", other_server.token, *secrets):
        with OpenAI(base_url=jupyter.base_url, api_key=key, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.completions.create(model="twin", prompt="x")
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    assert httpx.post(f"{jupyter.base_url}/completions", json={"model": "twin", "prompt": "x"}).status_code == 401


def test_another_server_does_not_find_these_kernels(other_server: Jupyter, two_kernels: list[Kernel]):
    with OpenAI(base_url=other_server.base_url, api_key=other_server.token, max_retries=0) as client:
        assert list(client.models.list()) == []
        with pytest.raises(openai.NotFoundError, match="%engine serve"):
            client.completions.create(model="twin", prompt="x")


def test_a_browsers_request_needs_its_xsrf_token(jupyter: Jupyter, two_kernels: list[Kernel]):
    body = {"model": "twin", "prompt": "x", "max_tokens": 2}
    with httpx.Client(base_url=jupyter.url, follow_redirects=True) as browser:
        browser.get("login", params={"token": jupyter.token})
        browser.get("login")
        assert browser.get("api/me").status_code == 200  # logged in
        refused = browser.post("nbengine/v1/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, None)
        xsrf = browser.cookies["_xsrf"]
        assert browser.post("nbengine/v1/completions", json=body, headers={"X-XSRFToken": xsrf}).status_code == 200


def test_what_the_engine_refuses_is_told_through(client: OpenAI):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="twin", prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="'twin'"):
        client.completions.create(model="twins", prompt="x")


# ── kernels that restart, and that serve ────────────────────────────────────────────────────────────────────────────────


def test_a_kernel_that_serves_is_not_culled_and_an_idle_one_is(other_server: Jupyter, until: Callable[..., None]):
    kernel = other_server.start_kernel()
    kernel.run(kernel.LOAD)
    kernel.run("%engine serve")
    # the request waits, with nothing to tell, for longer than an idle kernel lives
    kernel.run("import threading\nengine.pause()\nthreading.Timer(9, engine.resume).start()")
    with OpenAI(base_url=other_server.base_url, api_key=other_server.token, max_retries=0, timeout=60) as client:
        answer = client.completions.create(model="tales", prompt="The fox", max_tokens=4)
    assert answer.usage.completion_tokens == 4
    assert kernel.id in other_server.kernel_ids()
    until(lambda: kernel.id not in other_server.kernel_ids())
    kernel.close()


def test_no_secret_is_in_logs_or_process_lists(jupyter: Jupyter, other_server: Jupyter, two_kernels: list[Kernel], client: OpenAI):
    client.completions.create(model="twin", prompt="x", max_tokens=2)
    private = [json.loads(file.read_text())["secret"] for file in jupyter.runtime.glob("nbengine-*.json")]
    private += [jupyter.token, other_server.token]
    assert len(private) >= 4
    told = jupyter.log.read_text() + other_server.log.read_text()
    assert "nbengine/v1/completions" in told
    lists = "\n".join(" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    assert str(jupyter.runtime) in lists  # the kernels' lines were seen
    for one in private:
        assert one not in told
        assert one not in lists


def test_a_kernel_that_restarts_is_503_until_its_new_engine_is_found(client: OpenAI, two_kernels: list[Kernel]):
    _, kernel = two_kernels
    stream = client.completions.create(model="twin", prompt="Once", **LONG)
    next(iter(stream))
    kernel.restart()
    with pytest.raises(openai.APIError, match="closed"):
        list(stream)
    with pytest.raises(openai.InternalServerError) as unavailable:
        client.completions.create(model="twin", prompt="x", max_tokens=2)
    assert unavailable.value.status_code == 503
    assert unavailable.value.response.headers["Retry-After"]
    assert unavailable.value.code == "kernel_restarted"
    cell = kernel.start(f"{kernel.LOAD}\n%engine serve --served-model-name twin")
    # a client that asks again by itself does not notice
    answer = client.with_options(max_retries=1000).completions.create(model="twin", prompt="The fox", max_tokens=4)
    assert answer.usage.completion_tokens == 4
    kernel.finish(cell)


def test_a_kernel_that_is_killed_ends_its_streams_with_an_error(client: OpenAI, two_kernels: list[Kernel]):
    _, kernel = two_kernels
    stream = client.completions.create(model="twin", prompt="Once", **LONG)
    next(iter(stream))
    os.kill(kernel.value("__import__('os').getpid()"), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="restarted or ended"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="restarted"):
        client.completions.create(model="twin", prompt="x")

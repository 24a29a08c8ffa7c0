"""One client's events, with a connection that takes them when it is told to: whatever the order of things, each is sent once."""

from __future__ import annotations

import asyncio
import gc
import json
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbengine import SamplingParams
from nbengine.errors import RequestError
from nbengine.request import Request
from nbengine.serve.answers import Heading
from nbengine.serve.asks import Asked
from nbengine.serve.generation import Generation, Whole
from nbengine.serve.latency import Latency
from nbengine.serve.protocol import CompletionRequest
from nbengine.serve.refusal import Refusal
from nbengine.serve.stream import Stream
from nbengine.serve.traffic import Traffic
from nbengine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(engine):
    return engine.get_tokenizer()


class Slow:
    """A connection that has taken a write when `take` is called."""

    def __init__(self):
        self.data, self.taken = b"", None

    def write(self, chunk):
        assert self.taken is None or self.taken.done(), "two writes at once"
        self.data += chunk
        self.taken = asyncio.get_running_loop().create_future()
        return self.taken

    def take(self):
        if self.taken is not None and not self.taken.done():
            self.taken.set_result(None)


def make(tokenizer: Tokenizer, requests: int, n: int):
    params = SamplingParams(n=n).resolve((), tokenizer)
    mailbox = SimpleNamespace(stalled=None)
    made = [Request(f"r{i}", "x", [5], params, mailbox, tokenizer, 1000) for i in range(requests)]
    body = msgspec.convert(
        {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}, CompletionRequest
    )
    asked = Asked(made, body, chat=False)
    return made, Stream(asked, Heading(asked, "tales"), tokenizer, Latency(), Traffic())


def events(data: bytes):
    *parts, end = data.decode().split("\n\n")
    assert end == ""
    assert parts.count("data: [DONE]") == 1
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


@settings(max_examples=150)
@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_every_token_is_sent_once_whatever_the_order(tokenizer, data, requests, n):
    async def main():
        made, stream = make(tokenizer, requests, n)
        connection = Slow()
        left = {(r.id, c.index): data.draw(st.integers(0, 5)) for r in made for c in r.completions}
        put = {key: [] for key in left}
        steps = data.draw(st.lists(st.sampled_from(["token", "pump", "take"]), max_size=40))
        stream.begin(connection)
        for step in [*steps, *["token"] * sum(left.values())]:
            await asyncio.sleep(0)
            if step == "take":
                connection.take()
            elif step == "pump":
                stream.pump()
            else:
                waiting = [key for key, count in left.items() if count]
                if waiting:
                    key = data.draw(st.sampled_from(waiting))
                    request = next(r for r in made if r.id == key[0])
                    request.completions[key[1]].put([token := 100 + len(put[key])], None)
                    request.metrics.first_token_time = request.metrics.first_token_time or 1.0
                    request.metrics.last_token_time = 2.0
                    put[key].append(token)
                    left[key] -= 1
        for request in made:
            for completion in request.completions:
                completion.finish("length", None)
                completion.complete()
                stream.pump()
            request.end(3.0)
            stream.pump()
        for _ in range(50):
            stream.pump()
            connection.take()
            await asyncio.sleep(0)
        assert stream.done.done()
        *parts, last = events(connection.data)
        sent = {key: [] for key in put}
        for event in parts:
            for choice in event["choices"]:
                sent[f"r{choice['index'] // n}", choice["index"] % n] += choice["token_ids"]
        assert sent == put
        assert last["usage"]["completion_tokens"] == sum(map(len, put.values()))
        assert sum(choice["finish_reason"] == "length" for event in parts for choice in event["choices"]) == requests * n

    asyncio.run(main())


def test_one_that_fails_ends_all_with_one_error(tokenizer):
    async def main():
        made, stream = make(tokenizer, 3, 1)
        connection = Slow()
        stream.begin(connection)
        made[0].fail(RequestError("the policy is wrong"), 1.0)
        made[1].fail(RequestError("the policy is wrong"), 1.0)
        for _ in range(10):
            stream.pump()
            connection.take()
            await asyncio.sleep(0)
        assert stream.done.done()
        [event] = events(connection.data)
        assert event["error"]["code"] == "request_failed"

    asyncio.run(main())


def test_an_error_in_writing_what_came_while_a_client_was_slow_ends_it(tokenizer, monkeypatch):
    async def main():
        made, stream = make(tokenizer, 1, 1)
        connection = Slow()
        stream.begin(connection)
        made[0].completions[0].put([100], None)
        stream.pump()
        made[0].completions[0].put([101], None)
        stream.pump()  # the client has not taken the first
        monkeypatch.setattr(stream, "frame", lambda choice: 1 / 0)
        connection.take()
        await asyncio.wait_for(stream.done, 5)
        assert events(connection.data)[-1]["error"]["code"] == "internal_error"

    asyncio.run(main())


def test_nothing_is_written_before_there_is_a_token_unless_the_client_is_to_know(tokenizer):
    async def main():
        for told in (False, True):
            made, stream = make(tokenizer, 1, 1)
            connection = Slow()
            stream.begin(connection)
            stream.pump()
            stream.ping()
            assert connection.taken is None
            if told:
                stream.open()
                assert connection.data == b""
                connection.take()
                stream.open()
                await asyncio.sleep(0)
                assert connection.taken.done()
            made[0].completions[0].put([100], None)
            stream.pump()
            assert connection.data.count(b"data: ") == 1

    asyncio.run(main())


def test_one_that_fails_before_anything_was_written_leaves_the_answer_to_who_waits(tokenizer):
    async def main():
        _, stream = make(tokenizer, 1, 1)
        connection = Slow()
        stream.begin(connection)
        stream.fail(Refusal(503, "the server was closed", code="server_closed"))
        with pytest.raises(Refusal, match="closed"):
            await stream.done
        assert connection.taken is None
        _, stream = make(tokenizer, 1, 1)
        stream.begin(connection)
        stream.open()
        connection.take()
        await asyncio.sleep(0)
        stream.fail(Refusal(503, "the server was closed", code="server_closed"))
        await stream.done
        [event] = events(connection.data)
        assert event["error"]["code"] == "server_closed"

    asyncio.run(main())


def test_what_has_been_answered_is_gone_without_a_collection(http, engine, until):
    def kept():
        return [type(one).__name__ for one in gc.get_objects() if issubclass(type(one), Stream | Whole | Generation | Request)]

    gc.collect()
    before = kept()
    gc.disable()
    try:
        for stream in (True, False):
            asked = {"max_tokens": 3, "stream": stream}
            assert http.post("/v1/completions", json={"prompt": "The fox", **asked}).status_code == 200
            assert http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], **asked}).status_code == 200
        http.get("/health")  # a connection holds its last request
        until(lambda: kept() == before)
    finally:
        gc.enable()


def test_a_client_that_has_left_is_written_nothing(tokenizer):
    async def main():
        made, stream = make(tokenizer, 1, 1)
        connection = Slow()
        stream.begin(connection)
        stream.gone()
        made[0].completions[0].put([100], None)
        stream.pump()
        stream.ping()
        assert stream.done.done()
        assert connection.data == b""

    asyncio.run(main())

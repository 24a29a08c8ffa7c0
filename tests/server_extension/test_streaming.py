"""Answers that come piece by piece, and clients and engines that go in the middle of them."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from stand_in import told
from tornado.httpclient import HTTPClientError
from tornado.iostream import StreamClosedError

PROMPT = {"model": "tales", "prompt": "The fox", "stream": True}
PATH = "/v1/completions"


def events(*texts):
    """An engine's answer: one event for each text."""

    async def answer(handler):
        handler.set_header("Content-Type", "text/event-stream")
        for text in texts:
            await handler.piece(f"data: {text}\n\n")
        handler.finish()

    return answer


@pytest.fixture
def connect(http_server, http_server_port, jp_serverapp):
    """A client's bare connection, on which a completion has been asked for."""
    writers = []

    async def open_and_ask(body=PROMPT):
        reader, writer = await asyncio.open_connection("127.0.0.1", http_server_port[1], limit=1 << 16)
        writers.append(writer)
        data = json.dumps(body)
        writer.write(
            f"POST {jp_serverapp.base_url}nbengine{PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
            f"Authorization: Bearer {jp_serverapp.identity_provider.token}\r\n\r\n{data}".encode()
        )
        await writer.drain()
        return reader, writer

    yield open_and_ask
    for writer in writers:
        writer.transport.abort()


async def test_each_piece_comes_before_the_next_is_made(serve, ask):
    engine, taken = await serve(), asyncio.Event()

    async def answer(handler):
        handler.set_header("Content-Type", "text/event-stream")
        handler.set_header("Cache-Control", "no-cache")
        for number in range(5):
            await handler.piece(f"data: {number}\n\n")
            await asyncio.wait_for(taken.wait(), 10)  # until the client has it
            taken.clear()

    got = []

    def take(chunk):
        got.append(chunk)
        taken.set()

    engine.answers[PATH] = answer
    response = await ask(PATH, PROMPT, streaming_callback=take)
    assert got == [b"data: %d\n\n" % number for number in range(5)]
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-cache"


async def test_the_head_of_a_stream_comes_before_the_first_token(serve, connect):
    engine, go = await serve(), asyncio.Event()

    async def answer(handler):
        handler.set_header("Content-Type", "text/event-stream")
        await handler.flush()
        await go.wait()

    engine.answers[PATH] = answer
    reader, _ = await connect()
    assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"200"
    go.set()


async def test_many_streams_at_once_get_what_is_theirs(serve, ask):
    engine = await serve()

    async def answer(handler):
        number = json.loads(handler.request.body)["prompt"]
        handler.set_header("Content-Type", "text/event-stream")
        for index in range(20):
            await handler.piece(f"data: {number}.{index}\n\n")
            await asyncio.sleep(0)

    engine.answers[PATH] = answer
    # the test's client has ten connections
    answers = await asyncio.gather(*(ask(PATH, {**PROMPT, "prompt": number}) for number in range(60)))
    for number, response in enumerate(answers):
        assert response.body.decode() == "".join(f"data: {number}.{index}\n\n" for index in range(20))


@pytest.mark.parametrize("pieces", [0, 3])
async def test_when_the_client_goes_the_engine_hears_of_it_at_once(serve, connect, extension, pieces):
    engine, begun = await serve(), asyncio.Event()

    async def answer(handler):
        handler.set_header("Content-Type", "text/event-stream")
        for number in range(pieces):
            await handler.piece(f"data: {number}\n\n")
        begun.set()
        await engine.left.wait()

    engine.answers[PATH] = answer
    reader, writer = await connect()
    await asyncio.wait_for(begun.wait(), 10)
    if pieces:
        await reader.readuntil(b"data: 2\n\n")
    assert sum(extension.activity.running.values()) == 1
    began = time.monotonic()
    writer.close()
    await asyncio.wait_for(engine.left.wait(), 10)
    assert time.monotonic() - began < 1.0
    await asyncio.sleep(0.05)
    assert not extension.activity.running


async def test_a_client_that_reads_slowly_holds_up_the_engine_and_fills_no_memory(serve, connect):
    engine, piece = await serve(), b"x" * 100_000
    sent, total = 0, 400

    async def answer(handler):
        nonlocal sent
        handler.set_header("Content-Type", "text/event-stream")
        for _ in range(total):
            await handler.piece(piece)
            sent += 1

    engine.answers[PATH] = answer
    reader, _ = await connect()
    before = -1
    while sent != before:  # until the engine is stuck
        before = sent
        await asyncio.sleep(0.3)
    in_flight = sent * len(piece)
    assert in_flight < 20_000_000, "what the sockets hold, on both ways, and nothing more"
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"chunked" in head
    got = 0
    while length := int(await reader.readline(), 16):
        got += len(await reader.readexactly(length))
        await reader.readline()
    assert got == total * len(piece)
    assert sent == total


async def test_a_slow_client_that_goes_lets_the_engine_go(serve, connect):
    engine = await serve()

    async def answer(handler):
        handler.set_header("Content-Type", "text/event-stream")
        while not handler.gone:
            await handler.piece(b"x" * 100_000)

    engine.answers[PATH] = answer
    _, writer = await connect()
    await asyncio.sleep(0.5)
    assert not engine.left.is_set()
    writer.transport.abort()
    await asyncio.wait_for(engine.left.wait(), 5)


async def test_when_the_engine_goes_in_the_middle_a_stream_ends_with_an_error(serve, ask):
    engine = await serve()

    async def answer(handler):
        handler.set_header("Content-Type", "text/event-stream")
        await handler.piece("data: 1\n\n")
        await asyncio.sleep(0.1)
        handler.request.connection.stream.close()

    engine.answers[PATH] = answer
    response = await ask(PATH, PROMPT)
    first, last = response.body.decode().split("\n\n")[0], response.body.decode().split("\n\n")[-2]
    assert first == "data: 1"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert "kernel 1a2b3c4d has gone" in error["message"]
    assert "[DONE]" not in response.body.decode()


@pytest.mark.parametrize("length", [None, "1000"])
async def test_when_the_engine_goes_in_the_middle_a_whole_answer_is_not_taken_for_one(serve, ask, length):
    engine = await serve()

    async def answer(handler):
        if length:
            handler.set_header("Content-Length", length)
        await handler.piece('{"id": "1"')
        await asyncio.sleep(0.1)
        handler.request.connection.stream.close()

    engine.answers[PATH] = answer
    with pytest.raises((StreamClosedError, HTTPClientError)):
        await ask(PATH, PROMPT)


async def test_an_engine_that_goes_without_an_answer_is_503(serve, ask):
    engine = await serve()

    async def answer(handler):
        handler.request.connection.stream.close()

    engine.answers[PATH] = answer
    response = await ask(PATH, PROMPT)
    assert (response.code, response.headers["Retry-After"]) == (503, "1")
    assert told(response)["code"] == "engine_gone"


@pytest.mark.parametrize("garbage", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"\x00" * 100_000])
async def test_what_speaks_no_http_at_the_engines_address_is_503(serve, ask, garbage):
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(garbage)
        writer.close()

    engine = await serve()
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        engine.announce(url=f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}")
        assert told(await ask(PATH, PROMPT))["code"] == "engine_gone"
        assert json.loads((await ask("/v1/models")).body)["data"] == []


async def test_what_refuses_the_secret_is_not_the_engine_and_the_client_is_not_blamed(serve, ask):
    engine = await serve()
    engine.announce(secret="another")
    response = await ask(PATH, PROMPT)
    assert response.code == 502
    assert "wrong secret" not in response.body.decode()
    assert told(response)["message"]


async def test_an_answer_may_be_empty(serve, ask):
    engine = await serve()

    async def answer(handler):
        handler.set_status(204)
        handler.finish()

    engine.answers[PATH] = answer
    response = await ask(PATH, PROMPT)
    assert (response.code, response.body) == (204, b"")


async def test_the_stand_in_streams(serve, ask):
    engine = await serve()
    engine.answers[PATH] = events("a", "b", "[DONE]")
    assert (await ask(PATH, PROMPT)).body == b"data: a\n\ndata: b\n\ndata: [DONE]\n\n"

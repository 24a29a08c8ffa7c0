"""On the way to the engine: what comes together goes together, what comes alone does not wait, and nothing is lost."""

from __future__ import annotations

import asyncio
import socket

import pytest

from nbengine.errors import EngineClosedError
from nbengine.serve import intake
from nbengine.serve.intake import Intake


class Queued:
    """The messages that an engine was sent, and when."""

    def __init__(self, error=None):
        self.messages, self.times, self.error = [], [], error

    def __call__(self, requests):
        if self.error is not None:
            raise self.error
        self.messages.append(requests)
        self.times.append(asyncio.get_running_loop().time())


class Connection:
    """Nothing but itself."""


async def turns(count):
    """Let the loop go round so often."""
    for _ in range(count):
        await asyncio.sleep(0)


def in_a_loop(test, queued=None):
    async def main():
        loop = asyncio.get_running_loop()
        queue = queued or Queued()
        await test(Intake(loop, queue), queue, loop)
        return queue

    return asyncio.run(main())


def unwanted(refusal):
    pytest.fail(f"nothing was to fail, and this did: {refusal}")


def test_what_comes_turn_after_turn_goes_in_one_message_and_in_order():
    async def test(take, queued, loop):
        for i in range(30):
            take.put([2 * i, 2 * i + 1], unwanted)
            assert not queued.messages
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert queued.messages == [list(range(60))]
        take.put([60], unwanted)
        await asyncio.sleep(0.01)
        assert queued.messages == [list(range(60)), [60]]

    in_a_loop(test)


def test_one_that_comes_alone_waits_for_a_few_turns_and_no_timer():
    async def test(take, queued, loop):
        loop.call_later = loop.call_at = None
        take.put([1], unwanted)
        await turns(intake.QUIET + 1)
        assert queued.messages == [[1]]

    in_a_loop(test)


def test_whoever_has_connected_is_waited_for_but_not_for_long():
    async def test(take, queued, loop):
        silent, talking = Connection(), Connection()
        take.expect(silent)
        take.expect(talking)
        began = loop.time()
        take.heard(talking)
        take.put([1], unwanted)
        await asyncio.sleep(intake.NEWCOMER / 4)
        take.put([2], unwanted)
        await asyncio.sleep(0.05)
        take.put([3], unwanted)  # the silent one is expected no more
        await turns(intake.QUIET + 1)
        assert queued.messages == [[1, 2], [3]]
        assert queued.times[0] - began >= intake.NEWCOMER

    in_a_loop(test)


def test_whoever_is_sending_is_waited_for_longer(monkeypatch):
    async def test(take, queued, loop):
        clock = [0.0]
        monkeypatch.setattr(loop, "time", lambda: clock[0])
        slow, quick = Connection(), Connection()
        take.expect(slow)
        take.expect(quick)
        take.heard(quick)
        take.put([1], unwanted)
        for _ in range(2 * intake.QUIET):  # turns in which the front is busy with what has come of the other
            clock[0] += 0.3 * intake.NEWCOMER
            take.stir()
            await asyncio.sleep(0)
        take.heard(slow)
        take.put([2], unwanted)
        await turns(intake.QUIET + 1)
        assert queued.messages == [[1, 2]]

    in_a_loop(test)


def test_when_the_last_newcomer_has_spoken_nobody_is_waited_for():
    async def test(take, queued, loop):
        one, other = Connection(), Connection()
        take.expect(one)
        take.expect(other)
        take.heard(one)
        take.put([1], unwanted)
        await turns(3 * intake.QUIET)
        assert not queued.messages
        loop.call_later = None
        take.heard(other)
        take.put([2], unwanted)
        await turns(intake.QUIET + 1)
        assert queued.messages == [[1, 2]]

    in_a_loop(test)


def test_a_connection_that_is_gone_is_not_waited_for():
    async def test(take, queued, loop):
        take.expect(Connection())
        take.put([1], unwanted)
        await turns(intake.QUIET + 1)
        assert queued.messages == [[1]]

    in_a_loop(test)


def test_those_that_keep_coming_hold_nobody_up_for_long(monkeypatch):
    async def test(take, queued, loop):
        clock = [0.0]
        monkeypatch.setattr(loop, "time", lambda: clock[0])
        for i in range(100):
            take.put([i], unwanted)
            await asyncio.sleep(0)
            clock[0] += intake.LONGEST / 10
        assert 8 <= len(queued.messages) <= 12
        came = [request for message in queued.messages for request in message]
        assert came == list(range(len(came)))

    in_a_loop(test)


def test_what_was_taken_back_is_not_queued():
    async def test(take, queued, loop):
        left, stays = [1], [1]  # equal, and not the same
        take.put(left, unwanted)
        take.put(stays, unwanted)
        take.take_back(left)
        await asyncio.sleep(0.01)
        assert queued.messages == [[1]]
        take.put(left, unwanted)
        take.take_back(left)
        await asyncio.sleep(0.01)
        assert queued.messages == [[1]]
        take.put([2], unwanted)
        await asyncio.sleep(0.01)
        assert queued.messages == [[1], [2]]

    in_a_loop(test)


def test_an_engine_that_takes_nothing_is_told_to_everybody_who_waits():
    async def test(take, queued, loop):
        told = []
        take.put([1], told.append)
        take.put([2], told.append)
        await asyncio.sleep(0.01)
        assert [refusal.status_code for refusal in told] == [503, 503]

    in_a_loop(test, Queued(EngineClosedError("it was closed")))


def test_clients_that_ask_at_once_reach_the_engine_in_few_messages(engine, server, monkeypatch):
    messages, queue = [], engine.queue
    monkeypatch.setattr(engine, "queue", lambda requests: messages.append(len(requests)) or queue(requests))
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {server.api_key}\r\n"
    body = b'{"prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": true, "stream": true}'
    clients = [socket.create_connection((host, int(port))) for _ in range(32)]
    for client in clients:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    for client in clients:
        answer = b""
        while chunk := client.recv(1 << 16):
            answer += chunk
        client.close()
        assert b" 200 " in answer.split(b"\r\n", 1)[0]
        assert b"data: [DONE]" in answer
    assert sum(messages) == 32
    assert len(messages) <= 8

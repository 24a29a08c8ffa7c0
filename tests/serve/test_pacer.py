"""Waking the front: no ring is lost, one call serves all that rang, and streams that have begun gather."""

from __future__ import annotations

import asyncio
import threading
import time

from nbengine.front import Front
from nbengine.serve import pacer
from nbengine.serve.pacer import Pacer


class Reader:
    """Sees what a writer has counted up to."""

    def __init__(self, source, begun=False, cost=0.0):
        self.source, self.begun, self.cost = source, begun, cost
        self.fresh, self.seen, self.pumps = False, 0, 0

    def pump(self):
        self.pumps += 1
        self.seen = self.source[0]
        time.sleep(self.cost)
        self.begun = True


class Broken:
    """Cannot take what is there."""

    fresh, begun, refusal = False, True, None

    def pump(self):
        raise ValueError("no template")

    def fail(self, refusal):
        self.refusal = refusal


def test_no_ring_is_lost_whatever_the_threads_do(until):
    front = Front("front-under-test")
    pace = Pacer(front.loop)
    sources = [[0] for _ in range(20)]
    readers = [Reader(source) for source in sources]
    bells = [pace.bell(reader) for reader in readers]

    def write(some):
        for _ in range(3000):
            for i in some:
                sources[i][0] += 1
                bells[i]()

    threads = [threading.Thread(target=write, args=(range(k, 20, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: all(reader.seen == 3000 for reader in readers))
    assert sum(reader.pumps for reader in readers) < 20 * 3000 / 2
    front.close()


def test_a_step_wakes_the_front_once_for_all_streams():
    async def main():
        loop = asyncio.get_running_loop()
        calls, own = [], loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda function: calls.append(function) or own(function)
        pace = Pacer(loop)
        readers = [Reader([1], begun=True) for _ in range(64)]
        bells = [pace.bell(reader) for reader in readers]
        for _ in range(3):
            for ring in bells:
                ring()
        assert len(calls) == 1
        await asyncio.sleep(0.05)
        assert [reader.pumps for reader in readers] == [1] * 64

    asyncio.run(main())


def test_rounds_that_are_costly_come_seldom_and_first_tokens_do_not_wait_for_them(until):
    front = Front("front-under-test")
    pace = Pacer(front.loop)
    busy = [Reader([0], begun=True, cost=0.001) for _ in range(5)]
    bells = [pace.bell(reader) for reader in busy]
    began = time.monotonic()
    while time.monotonic() - began < 0.6:
        for ring in bells:
            ring()
        time.sleep(0.001)
    assert busy[0].pumps <= 0.6 / pacer.LONGEST + 2
    late = []
    for _ in range(5):
        for ring in bells:
            ring()
        new = Reader([1])
        asked = time.monotonic()
        pace.bell(new)()
        until(lambda new=new: new.pumps)
        late.append(time.monotonic() - asked)
    assert min(late) < pacer.LONGEST
    front.close()


def test_an_end_does_not_wait_for_others_to_be_sent_with(until):
    front = Front("front-under-test")
    pace = Pacer(front.loop)
    busy = [Reader([0], begun=True, cost=0.002) for _ in range(5)]
    bells = [pace.bell(reader) for reader in busy]
    ends = Reader([0], begun=True)
    bell, last_bell = pace.bell(ends), pace.last_bell(ends)
    late = []
    for i in range(1, 6):
        for ring in bells:
            ring()
        until(lambda: not busy[-1].fresh)  # a round has just been, and the next is a while off
        ends.source[0] = i
        bell()  # it has already rung for a token
        asked = time.monotonic()
        last_bell()
        until(lambda i=i: ends.seen == i)
        late.append(time.monotonic() - asked)
    assert min(late) < pacer.LONGEST / 4
    front.close()


def test_an_error_ends_the_one_that_met_it_and_no_other(caplog):
    async def main():
        pace = Pacer(asyncio.get_running_loop())
        for begun in (True, False):
            broken, readers = Broken(), [Reader([1], begun) for _ in range(2)]
            broken.begun = begun
            for stream in (readers[0], broken, readers[1]):
                pace.bell(stream)()
            await asyncio.sleep(0.1)
            assert [reader.pumps for reader in readers] == [1, 1]
            assert broken.refusal.status_code == 500
            assert "no template" in caplog.text

    asyncio.run(main())


def test_a_ring_after_the_loops_end_is_harmless():
    front = Front("front-under-test")
    pace = Pacer(front.loop)
    reader = Reader([1])
    ring = pace.bell(reader)
    front.close()
    ring()
    assert reader.pumps == 0

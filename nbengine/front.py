"""The engine's front: one thread and loop for everything that faces outwards (updates of widgets, HTTP). It never blocks the engine."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

from nbengine.bell import Reply
from nbengine.errors import EngineClosedError, without_frames

log = logging.getLogger("nbengine")


class Front:
    """A thread with an asyncio loop (tornado's is the same one). Begins with the first use, ends with `close()`.

    What is given to it must not keep the engine alive: hold that by a weak reference.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._last: list[Callable[[], Any]] = []

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, running."""
        with self._lock:
            if self._closed:
                raise EngineClosedError("this engine was closed: make a new one to go on")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name=self.name, daemon=True)
                self._thread.start()
            return self._loop

    @property
    def is_current(self) -> bool:
        """Whether this is asked in the front's own thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[..., Any], *args: Any) -> Reply[Any]:
        """Call a function in the front's thread, soon; the reply has what it returns."""
        reply: Reply[Any] = Reply()

        def answer() -> None:
            try:
                result = function(*args)
            except BaseException as error:  # noqa: BLE001 - the caller's to see
                reply.fail(without_frames(error))
            else:
                reply.give(result)

        self.loop.call_soon_threadsafe(answer)
        return reply

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Reply[Any]:
        """Run a coroutine in the front's loop; the reply has what it returns."""
        reply: Reply[Any] = Reply()

        async def answer() -> None:
            try:
                result = await coroutine
            except BaseException as error:  # noqa: BLE001 - the caller's to see
                reply.fail(without_frames(error))
            else:
                reply.give(result)

        asyncio.run_coroutine_threadsafe(answer(), self.loop)
        return reply

    def every(self, seconds: float, function: Callable[[], Any]) -> Ticker:
        """Call a function in the front's thread again and again, until the ticker is stopped or the front is closed."""
        return Ticker(self, seconds, function)

    def at_end(self, function: Callable[[], Any]) -> None:
        """Call a function in the front's thread when it is closed, as the last thing; nothing happens where that never began."""
        self._last.append(function)

    def close(self) -> None:
        """End the thread; what it was doing is cancelled. Harmless when it never began."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(self._end, loop)
            if thread is not threading.current_thread():
                thread.join(5.0)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        last, self._last = self._last, []
        for function in last:
            try:
                function()
            except Exception:
                log.exception("a last call of the front failed")
        loop.stop()


class Ticker:
    """Calls a function every so often, in the front's thread. One call never begins before the last has ended."""

    def __init__(self, front: Front, seconds: float, function: Callable[[], Any]) -> None:
        self.seconds = seconds
        self._function: Callable[[], Any] | None = function
        self._front = weakref.ref(front)
        front.loop.call_soon_threadsafe(self._tick)

    @property
    def stopped(self) -> bool:
        return self._function is None

    def stop(self) -> None:
        """Harmless from any thread; a call that runs is not waited for."""
        self._function = None

    def _tick(self) -> None:
        function, front = self._function, self._front()
        if function is None or front is None:
            return
        try:
            function()
        except Exception:
            log.exception("an update of the front failed")
            self.stop()
        else:
            asyncio.get_running_loop().call_later(self.seconds, self._tick)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=2.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()

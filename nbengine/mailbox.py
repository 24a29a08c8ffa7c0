"""The way into the engine's thread: messages that it takes between two steps. Safe from any thread; keeps no engine alive."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from nbengine.errors import EngineClosedError, NBEngineError

if TYPE_CHECKING:
    from nbengine.request import Request


Message = tuple[str, tuple[Any, ...], dict[str, Any], Future[Any] | None]  # what to do, its arguments, who waits for its result


class Mailbox:
    """What handles hold of an engine."""

    def __init__(self) -> None:
        self.stalled: str | None = None  # "paused" or "asleep", set by the engine's thread
        self.closed: NBEngineError | None = None  # why nothing is taken any more
        self.thread: threading.Thread | None = None  # the engine's
        self._process = os.getpid()
        self._messages: deque[Message] = deque()
        self._wake: Callable[[], None] | None = None  # set while the engine's thread sleeps; only that thread writes it

    def submit(self, requests: list[Request]) -> None:
        """Bring requests, in their order."""
        self._post("add", (requests,))

    def cancel(self, *request_ids: str) -> None:
        """Ask for these to end; nothing happens to one that has ended, as all have when the engine is closed."""
        with contextlib.suppress(NBEngineError):
            self._post("cancel", request_ids)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have the engine's thread do something between two steps; the future has its result."""
        future: Future[Any] = Future()
        self._post(name, args, kwargs, future)
        return future

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`call`, and wait for the result."""
        self.check_wait()
        return self.call(name, *args, **kwargs).result()

    def check_wait(self) -> None:
        """Refuse to wait for the engine in its own thread, where policies, ops and logits processors run: it would never end."""
        if threading.current_thread() is self.thread:
            raise RuntimeError(
                "this runs in the engine's own thread (in a policy, an op or a logits processor), which cannot wait for itself: "
                "wait in another thread"
            )

    def take(self) -> Message | None:
        """The next message; for the engine's thread."""
        try:
            return self._messages.popleft()
        except IndexError:  # looking first would not help: at the end, whoever posts empties it too
            return None

    def sleep(self, wake: Callable[[], None]) -> bool:
        """The engine's thread is about to sleep and is woken by `wake`; False if there is a message after all."""
        self._wake = wake  # first leave the bell, then look: a message that comes in between rings it
        if self._messages:
            self._wake = None
            return False
        return True

    def awake(self) -> None:
        """The engine's thread sleeps no more."""
        self._wake = None

    def close(self, why: NBEngineError | None = None) -> None:
        """Take no more messages, and let those who wait for an answer have the reason."""
        self.closed = why or EngineClosedError("this engine was closed: make a new one to go on")
        while (message := self.take()) is not None:
            kind, args, _, future = message
            if future is not None:
                future.set_exception(_fresh(self.closed))
            if kind == "add":
                for request in args[0]:
                    request.fail(_fresh(self.closed), request.metrics.arrival_time)

    def _post(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, future: Future[Any] | None = None) -> None:
        if os.getpid() != self._process:  # a fork: the engine's thread is not in this process
            raise EngineClosedError("this engine lives in the process that made it, not in its forks: make one of this process's own")
        if self.closed is not None:
            raise _fresh(self.closed)
        self._messages.append((name, args, kwargs or {}, future))
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # its loop has just ended; what it left here is answered when it closes this
                wake()
        if self.closed is not None:  # it closed while this was put in: nobody else will answer it
            self.close(self.closed)


def _fresh(error: NBEngineError) -> NBEngineError:
    """The same error as a new object, without a traceback that would keep frames and their tensors alive."""
    return type(error)(*error.args)

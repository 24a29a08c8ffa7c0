"""The way into the engine's thread: messages that it takes between two steps. Safe from any thread; keeps no engine alive."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbengine.bell import Reply
from nbengine.checks import callers_level
from nbengine.errors import EngineClosedError, NBEngineError

if TYPE_CHECKING:
    from nbengine.request import Request


PATIENCE = 10.0  # seconds until somebody who waits for the engine's thread is told what that does
LOOK = 0.5  # seconds between two looks at whether it lives
Message = tuple[str, tuple[Any, ...], dict[str, Any], Reply[Any] | None]  # what to do, its arguments, who waits for its result


class Mailbox:
    """What handles hold of an engine."""

    def __init__(self) -> None:
        self.stalled: str | None = None  # "paused" or "asleep", set by the engine's thread
        self.blocked: str | None = None  # why nobody can run although there is no more to wait for; set by the same
        self.closed: NBEngineError | None = None  # why nothing is taken any more
        self.thread: threading.Thread | None = None  # the engine's
        self.ended: Reply[None] = Reply()  # given when that has done everything it does
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

    def call(self, name: str, *args: Any, **kwargs: Any) -> Reply[Any]:
        """Have the engine's thread do something between two steps; the reply has its result."""
        reply: Reply[Any] = Reply()
        self._post(name, args, kwargs, reply)
        return reply

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`call`, and wait for the result; who waits for long is told what for."""
        self.check_wait()
        reply = self.call(name, *args, **kwargs)
        if not reply.wait(PATIENCE):
            self.tell_of_wait(f"{name}()")
        return reply.result()

    def tell_of_wait(self, what: str) -> None:
        """Warn somebody who waits for `what` of what the engine's thread does instead."""
        doing = _doing(self.thread)
        if doing is not None:
            warnings.warn(
                f"{what} waits for the engine's thread, which is in {doing}. It goes on when that returns; an interrupt ends the wait",
                RuntimeWarning,
                stacklevel=callers_level(),
            )

    def wait_for_end(self) -> None:
        """Wait until the engine's thread has ended, unless this is that thread. An interrupt comes through."""
        thread, waited = self.thread, 0.0
        if thread is None or thread is threading.current_thread():
            return
        # not join() alone: up to Python 3.12 an interrupt of it marks the thread as ended; and a fork's copy of it never ends this way
        while thread.is_alive() and not self.ended.wait(LOOK):
            waited += LOOK
            if PATIENCE <= waited < PATIENCE + LOOK:
                self.tell_of_wait("close()")
        thread.join()

    def check_open(self) -> None:
        """Raise why nothing is taken any more, if that is so."""
        if self.closed is not None:
            raise _fresh(self.closed)

    def check_wait(self) -> None:
        """Refuse to wait for the engine in its own thread, where policies, ops and logits processors run: it would never end."""
        if threading.current_thread() is self.thread:
            raise RuntimeError(
                "this runs in the engine's own thread (in a policy, an op or a logits processor), which cannot wait for itself: "
                "wait in another thread"
            )

    @property
    def hindered(self) -> str | None:
        """What whoever waits is to be told, if their engine cannot run them."""
        if self.stalled is not None:
            how = "engine.wake_up()" if self.stalled == "asleep" else "engine.resume(), or engine.step() for one step"
            return f"its engine is {self.stalled}: call {how}"
        return self.blocked

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
            kind, args, _, reply = message
            if reply is not None:
                reply.fail(_fresh(self.closed))
            if kind == "add":
                for request in args[0]:
                    request.fail(_fresh(self.closed), request.metrics.arrival_time)

    def _post(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, reply: Reply[Any] | None = None) -> None:
        if os.getpid() != self._process:  # a fork: the engine's thread is not in this process
            raise EngineClosedError("this engine lives in the process that made it, not in its forks: make one of this process's own")
        self.check_open()
        self._messages.append((name, args, kwargs or {}, reply))
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # its loop has just ended; what it left here is answered when it closes this
                wake()
        if self.closed is not None:  # it closed while this was put in: nobody else will answer it
            self.close(self.closed)


def _doing(thread: threading.Thread | None) -> str | None:
    """Where a thread is, from its innermost call out to nbengine's own code: `wait (threading.py:320) < hold (cell.py:7) < ...`."""
    frame = None if thread is None else sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - the only way there is
    if frame is None:
        return None
    calls = []
    for call, line in traceback.walk_stack(frame):
        code = call.f_code
        calls.append(f"{code.co_name} ({Path(code.co_filename).name}:{line})")
        if str(call.f_globals.get("__name__")).startswith("nbengine."):
            break
    return " < ".join(calls[:3] + ["..."] * (len(calls) > 6) + calls[max(3, len(calls) - 3) :])


def _fresh(error: NBEngineError) -> NBEngineError:
    """The same error as a new object, without a traceback that would keep frames and their tensors alive."""
    return type(error)(*error.args)

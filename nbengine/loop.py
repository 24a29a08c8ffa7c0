"""The engine's thread: one asyncio loop that takes messages, steps the core and hands out what each step brought."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import threading
import traceback
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nbengine import collector, switch_interval
from nbengine.bell import Reply
from nbengine.core import EngineCore, NewRequest
from nbengine.errors import DeviceLostError, EngineClosedError, EngineDeadError, EnginePausedError, NBEngineError, without_frames
from nbengine.memory import empty_device_cache

if TYPE_CHECKING:
    from nbengine.mailbox import Mailbox
    from nbengine.plan import Update
    from nbengine.policy import Policy
    from nbengine.request import Request
    from nbengine.trace import StepRecord

log = logging.getLogger("nbengine")
_IN_FLIGHT = {"add", "cancel", "cancel_all", "request_ids"}  # what may be done while steps are in flight
LOOK_AGAIN = (0.001, 0.05)  # seconds until a policy that lets nobody run is asked again, first and last
YIELD = 0.005  # seconds between two turns of the asyncio loop while steps follow each other
PATIENCE = 1.0  # seconds of that until those who wait are told


class EngineLoop:
    """What runs in the engine's thread. Everybody else speaks to it through its mailbox.

    `build` makes the core, in the thread, because torch's inference mode and the device's stream belong to a thread; `ready`
    tells when it has, or why it could not.
    """

    def __init__(self, mailbox: Mailbox, build: Callable[[], EngineCore], name: str) -> None:
        self.mailbox = mailbox
        self.build = build
        self.ready: Reply[EngineCore] = Reply()
        self.thread = mailbox.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.requests: dict[str, Request] = {}
        self.closing = False
        self.fatal: BaseException | None = None  # what a step met that was made by hand
        self.paused = False
        self.asleep = False
        self._lost = False  # the GPU
        self._working = False
        self._idle = 0.0  # seconds that a policy has let nobody run

    # ── the thread ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            with contextlib.closing(asyncio.new_event_loop()) as loop:  # asyncio.run would take another where nest_asyncio has replaced it
                loop.run_until_complete(self._main(loop))
        except BaseException as error:  # noqa: BLE001 - told to everybody who waits
            reason: NBEngineError = _dead(error)
            self._lost = isinstance(error, DeviceLostError)
            if self.ready.answered:
                log.error("the engine's loop met an error:\n%s", traceback.format_exc())  # noqa: TRY400 - as text: a record keeps no frames
                without_frames(error)
            else:
                self.ready.fail(without_frames(error))
        else:
            reason = EngineClosedError("this engine was closed: make a new one to go on")
        try:
            self._let_go(reason)
        finally:
            self.mailbox.ended.give(None)

    async def _main(self, loop: asyncio.AbstractEventLoop) -> None:
        switch_interval.wake_promptly()
        self.core = self.build()
        self.ready.give(self.core)
        bell = asyncio.Event()
        yielded = perf_counter()

        def wake() -> None:
            loop.call_soon_threadsafe(bell.set)

        while not self.closing:
            self._take_messages()
            if not self.core.has_work():
                self._idle, self.mailbox.blocked = 0.0, None
            again = None  # seconds until it looks whether anything can run; None: when there is a message
            if self.core.has_work() and self.mailbox.stalled is None and not self.closing:
                again = self._look_again_in(self._step())
            if again == 0:
                self._work(True)
                if perf_counter() > yielded + YIELD:  # each time costs a turn of the loop, and the interpreter where a cell is busy
                    with switch_interval.urgent():
                        await asyncio.sleep(0)
                    yielded = perf_counter()
            elif not self.closing and self.mailbox.sleep(wake):
                self._work(False)
                timer = None if again is None else loop.call_later(again, bell.set)
                await bell.wait()
                self.mailbox.awake()
                bell.clear()
                if timer is not None:
                    timer.cancel()

    def _work(self, working: bool) -> None:
        """Let the interpreter know whether this engine works."""
        if working != self._working:
            self._working = working
            (switch_interval.begin if working else switch_interval.end)()
            (collector.put_off if working else collector.allow)()

    def _let_go(self, reason: NBEngineError) -> None:
        """Tell everybody who waits, and release what the thread holds."""
        self._work(False)
        self.mailbox.close(reason)
        now = perf_counter()
        for request in self.requests.values():
            request.fail(type(reason)(*reason.args), now)
        self.requests.clear()
        core = self.__dict__.pop("core", None)
        if core is None:
            empty_device_cache()  # of what a load that failed or was interrupted had already brought
        else:
            with contextlib.suppress(Exception):  # a loop that met an error may have left anything behind
                for request_id in list(core.requests):
                    core.end(request_id)
            if not self._lost:
                try:
                    core.runner.close()
                except DeviceLostError as error:  # through somebody else's work on that card, perhaps
                    log.warning("%s", str(error))  # as text: a record keeps no frames
                    self._lost = True
            if self._lost:  # nothing comes back from there, and to free a part of it would end the process
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(core.runner))

    def _take_messages(self) -> None:
        while (message := self.mailbox.take()) is not None:
            name, args, kwargs, reply = message
            handler = getattr(self, f"_on_{name}")
            if name not in _IN_FLIGHT:
                handler = partial(self._landed, handler)
            if reply is None:
                handler(*args, **kwargs)
            else:
                self._answer(reply, handler, args, kwargs)
            if self.fatal is not None:
                raise self.fatal
        self._deliver(self.core.rejected())
        self.core.flush()

    def _landed(self, handler: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a handler gives that wants no step in flight."""
        try:
            self._deliver(self.core.drain())
        except BaseException as error:
            self.fatal = error  # whoever asks for what, what goes wrong in a step ends the engine
            raise
        return handler(*args, **kwargs)

    def _answer(self, reply: Reply[Any], handler: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            result = handler(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - the caller's to see
            if isinstance(error, DeviceLostError):
                self.fatal = error
            reply.fail(_dead(error) if error is self.fatal else without_frames(error))
        else:
            reply.give(result)

    # ── a step and what it brought ──────────────────────────────────────────────────────────────────────────────────

    def _step(self) -> bool:
        """One step; False if nobody could run."""
        began, steps = perf_counter(), self.core.scheduler.steps
        flying = self.core.in_flight
        updates = self.core.step()
        for sequence in self.core.entered:
            request = self.requests.get(sequence.request_id)
            if request is not None and request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = began
        self._deliver(updates)
        return self.core.scheduler.steps > steps or self.core.in_flight < flying

    def _look_again_in(self, moved: bool) -> float:
        """Seconds until the next step: none after one that ran, more and more while a policy lets nobody run, who are told of it."""
        if moved or not self.core.has_work():
            self._idle, self.mailbox.blocked = 0.0, None
            return 0.0
        pause = min(max(LOOK_AGAIN[0], self._idle), LOOK_AGAIN[1])
        self._idle += pause
        if self._idle >= PATIENCE and self.mailbox.blocked is None:
            policy = type(self.core.scheduler.policy).__qualname__
            self.mailbox.blocked = f"the policy {policy} lets nobody run: exchange it with engine.use(policy=...)"
            self._wake_all()
        return pause

    def _deliver(self, updates: list[Update]) -> None:
        now = perf_counter()
        for update in updates:
            sequence = update.sequence
            request = self.requests.get(sequence.request_id)
            if request is None:
                continue
            if update.prompt_logprobs is not None:
                request.scored(update.prompt_logprobs)
            completion, ended = request.completions[sequence.index], update.last
            if completion.finish_reason is not None:
                continue  # a stop string ended it, and a step that was in flight brought more
            if ended and sequence.finish_reason is not None:
                completion.finish(sequence.finish_reason, sequence.stop_reason)
            if update.tokens:
                metrics = request.metrics
                if metrics.first_token_time is None:
                    self._first_token(request, sequence, now)
                metrics.last_token_time = now
                stop = completion.put(update.tokens, update.logprobs)
                if stop is not None:
                    self.core.end(sequence.request_id, "stop", sequence.index, stop)
                    completion.finish("stop", stop)
                    ended = True
            if ended:
                completion.complete()
                self._ended(request, sequence, now)
            elif request.waited_for:
                request.progressed()

    def _first_token(self, request: Request, sequence: Any, now: float) -> None:
        request.metrics.first_token_time = now
        request.num_cached_tokens = sequence.cached

    def _ended(self, request: Request, sequence: Any, now: float) -> None:
        request.metrics.num_preemptions += sequence.preemptions
        if sequence.finish_reason == "error":
            del self.requests[request.id]
            self.core.end(request.id)
            request.fail_alone(sequence.error or "for a reason it did not give", now)
        elif all(c.finish_reason is not None for c in request.completions):
            del self.requests[request.id]
            request.end(now)
        else:
            request.progressed()

    # ── messages ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_add(self, requests: list[Request]) -> None:
        self.requests.update((request.id, request) for request in requests)  # all of them first: who is in here is told of an error
        for request in requests:
            if self.mailbox.stalled is not None:
                request.wake()  # it may have begun to wait before the engine stalled
            self.core.add(
                NewRequest(
                    request_id=request.id,
                    prompt_token_ids=request.prompt_token_ids,
                    params=request.params,
                    limit=request.limit,
                    priority=request.priority,
                    arrival=request.metrics.arrival_time,
                )
            )

    def _on_request_ids(self) -> list[str]:
        return list(self.requests)

    def _on_cancel(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self._deliver(self.core.end(request_id))

    def _on_cancel_all(self) -> int:
        ids = list(self.requests)
        self._on_cancel(*ids)
        return len(ids)

    def _on_pause(self) -> None:
        self.paused = True
        self._stall()

    def _on_resume(self) -> None:
        self.paused = False
        self._stall()

    def _on_step(self) -> list[StepRecord] | None:
        """One step by hand; None if nobody could run."""
        if self.asleep:
            raise EnginePausedError("the engine is asleep: call engine.wake_up() first")
        if not self.paused:
            raise EnginePausedError("engine.step() moves a paused engine by hand: call engine.pause() first")
        try:
            moved = self._step()
            self._deliver(self.core.drain())
        except BaseException as error:
            self.fatal = error  # whoever asked for the step, what goes wrong in it ends the engine
            raise
        last = self.core.trace.last
        return None if not moved else [] if last is None else [last]

    def _on_use(self, policy: Policy | None, ops: dict[str, Any] | None) -> None:
        self._idle, self.mailbox.blocked = 0.0, None
        before = self.core.scheduler.policy
        if policy is not None:
            self.core.scheduler.use(policy)
        try:
            self.core.runner.use(ops or {})
        except BaseException:
            self.core.scheduler.use(before)  # both or neither
            raise

    def _on_set_limits(self, max_num_batched_tokens: int | None, max_num_seqs: int | None) -> None:
        self.core.limit(max_num_batched_tokens, max_num_seqs)

    def _on_reset_prefix_cache(self) -> None:
        self.core.scheduler.pool.forget()

    def _on_sleep(self, level: int) -> None:
        self.core.suspend()
        self.core.runner.sleep(level)
        self.asleep = True
        self._stall()

    def _on_resize(self, num_blocks: int) -> None:
        if self.asleep:
            raise EnginePausedError("the engine is asleep: call engine.wake_up() first")
        self.core.resize(num_blocks)

    def _on_wake_up(self) -> None:
        self.core.runner.wake_up()
        self.asleep = False
        self._stall()

    def _on_update_weights(self, weights: Any) -> None:
        self.core.runner.update_weights(weights)
        self.core.suspend()

    def _on_close(self) -> None:
        self.closing = True

    def _stall(self) -> None:
        """Say what the engine waits for, if for anything, and let those who wait for it look."""
        self.mailbox.stalled = "asleep" if self.asleep else "paused" if self.paused else None
        self.mailbox.blocked = None
        self._wake_all()

    def _wake_all(self) -> None:
        for request in self.requests.values():
            request.wake()


def _dead(error: BaseException) -> EngineDeadError:
    if isinstance(error, DeviceLostError):
        return EngineDeadError(str(error))
    return EngineDeadError(f"the engine stopped at an error: {type(error).__name__}: {error}. Close it and make a new one")

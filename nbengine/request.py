"""A request as its submitter holds it: iterate it, await it, wait for it, cancel it, from any thread or loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from numbers import Real
from typing import TYPE_CHECKING, Self

from nbengine.bell import Bell
from nbengine.checks import callers_level
from nbengine.completion import Completion, named
from nbengine.errors import EnginePausedWarning, NBEngineError, RequestError
from nbengine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nbengine.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from nbengine.batch import TokenLogprobs
    from nbengine.mailbox import Mailbox
    from nbengine.sampling_params import SamplingParams
    from nbengine.tokenizer import Tokenizer

Progress = tuple[int, bool, str | None]  # tokens so far, whether it has ended, what its engine waits for
LOOK_UP = 0.2  # seconds
_OF_THE_ENGINE = {
    "arrive",
    "end",
    "fail",
    "fail_alone",
    "listen",
    "progressed",
    "prompt_entries",
    "scored",
    "unlisten",
    "waited_for",
    "wake",
}


class _ForItsHolder(type):
    """Leaves the engine's side out of what completion and help() show; IPython asks the class as well as the object."""

    def __dir__(cls) -> list[str]:
        return [name for name in super().__dir__() if name not in _OF_THE_ENGINE]


class Request(metaclass=_ForItsHolder):
    """What `Engine.submit` returns. It holds no tensors and does not keep its engine alive.

    >>> request = engine.submit("Once upon a time", SamplingParams(max_tokens=64))   # doctest: +SKIP
    >>> for text in request: print(text, end="")                                     # doctest: +SKIP
    >>> request.result().outputs[0].finish_reason                                    # doctest: +SKIP
    'length'
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        mailbox: Mailbox,
        tokenizer: Tokenizer | None,
        limit: int,
        priority: int = 0,
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.limit = limit  # length of prompt and output together at which it ends
        self.priority = priority
        self.metrics = RequestMetrics(arrival_time=time.perf_counter(), num_prompt_tokens=len(prompt_token_ids))
        self.num_cached_tokens = 0
        self.completions = [Completion(i, tokenizer, prompt_token_ids, params) for i in range(params.n)]
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._tokenizer = tokenizer
        self._mailbox = mailbox
        self._error: NBEngineError | None = None
        self._done = False
        self._waiters: list[Callable[[], None]] = []  # rung whenever anything is new
        self._enders: list[Callable[[], None]] = []  # rung when it ends, or its engine stalls

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def status(self) -> str:
        """`waiting`, `running`, `finished`, `aborted` or `failed`; while it waits or runs, `paused` or `asleep` if its engine is."""
        if self._error is not None:
            return "failed"
        if self._done:
            return "aborted" if any(c.finish_reason == "abort" for c in self.completions) else "finished"
        return self._mailbox.stalled or ("waiting" if self.metrics.first_scheduled_time is None else "running")

    @property
    def finished(self) -> bool:
        """Whether nothing more will come, for whatever reason."""
        return self._done

    @property
    def text(self) -> str:
        """The first output's text so far."""
        return self.completions[0].read_text()

    @property
    def prompt_entries(self) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt's tokens but the first, where they were asked for."""
        return self._prompt_logprobs

    def output(self) -> RequestOutput:
        """Everything there is so far, without waiting."""
        return self._output([completion.output() for completion in self.completions])

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait until it ends. A cancelled request gives what it had, with finish_reason "abort".

        Raises RequestError if it failed, EngineClosedError or EngineDeadError if its engine is gone, and TimeoutError
        after `timeout` seconds; the request goes on then.
        """
        if not self.wait(timeout):
            state = f" (the engine is {self._mailbox.stalled})" if self._mailbox.stalled else ""
            raise TimeoutError(f"request {self.id} is still {self.status}{state}; it goes on, or call .cancel()")
        self.raise_error()
        return self.output()

    def arrive(self) -> Self:
        """It is about to be queued: its times count from now."""
        self.metrics.arrival_time = time.perf_counter()
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it ends, however it does; False if `timeout` seconds were not enough."""
        if timeout is not None and (not isinstance(timeout, Real) or timeout != timeout):  # noqa: PLR0124 - NaN
            raise TypeError(f"timeout must be a number of seconds, or None to wait for as long as it takes, not {timeout!r}")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (seen := self._progress())[1]:
            if not self._wait(seen, self._enders, deadline):
                return self._done
        return True

    def listen(self, ring: Callable[[], None], *, at_end: bool = False) -> None:
        """Have `ring` called in the engine's thread whenever anything is new (or only at the end) for as long as it runs.

        It must return at once. Whoever listens looks once by itself, since this may have begun before.
        """
        (self._enders if at_end else self._waiters).append(ring)

    def unlisten(self, *rings: Callable[[], None]) -> None:
        """Call these no more."""
        for bells in (self._waiters, self._enders):
            for ring in rings:
                if ring in bells:
                    bells.remove(ring)

    def raise_error(self) -> None:
        """Raise what it failed with, if it did."""
        if self._error is not None:
            raise type(self._error)(*self._error.args)  # a fresh one each time: no traceback is kept alive

    def __iter__(self) -> Iterator[str]:
        """Text as it comes. Leaving the loop early leaves the request running; `Engine.stream` cancels it then."""
        self._check_single()
        while True:
            seen = self._progress()
            if delta := self.completions[0].read_delta():
                yield delta
            elif seen[1]:
                self.raise_error()
                return
            else:
                self._wait(seen, self._waiters)

    async def __aiter__(self) -> AsyncIterator[str]:
        self._check_single()
        while True:
            seen = self._progress()
            if delta := self.completions[0].read_delta():
                yield delta
            elif seen[1]:
                self.raise_error()
                return
            else:
                await self._wait_async(seen, self._waiters)

    def __await__(self) -> Generator[None, None, RequestOutput]:
        return self._result_async().__await__()

    def outputs(self) -> Iterator[RequestOutput]:
        """RequestOutputs as `params.output_kind` says: everything so far, what is new, or the last one only."""
        reader = _OutputReader(self)
        while not reader.ended:
            seen = self._progress()
            if (output := reader.next()) is not None:
                yield output
            else:
                self._wait(seen, self._waiters)
        self.raise_error()

    async def aoutputs(self) -> AsyncIterator[RequestOutput]:
        """`outputs()` for a running loop."""
        reader = _OutputReader(self)
        while not reader.ended:
            seen = self._progress()
            if (output := reader.next()) is not None:
                yield output
            else:
                await self._wait_async(seen, self._waiters)
        self.raise_error()

    def cancel(self) -> None:
        """End it between two steps: its blocks go back, what it has stays. Harmless when it has ended."""
        if not self._done:
            self._mailbox.cancel(self.id)

    def __repr__(self) -> str:
        tokens = sum(len(c.token_ids) for c in self.completions)
        return f"<Request {self.id} {self.status}, {len(self.prompt_token_ids)} prompt tokens, {tokens} generated>"

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _progress(self) -> Progress:
        """What a waiter waits to see change: it looks at this, then at what it wants, and then waits unless this has changed."""
        return sum(len(c.token_ids) for c in self.completions), self._done, self._mailbox.hindered

    def _wait(self, seen: Progress, bells: list[Callable[[], None]], deadline: float | None = None) -> bool:
        """Sleep until one of these bells rings; False if the deadline came first. An interrupt comes through."""
        self._mailbox.check_wait()
        bell = Bell()
        bells.append(bell.ring)  # first hang up the bell, then look: what comes in between is not missed
        try:
            if self._progress() != seen:
                return True
            self._say_if_hindered()
            return bell.wait(None if deadline is None else deadline - time.monotonic())
        finally:
            bells.remove(bell.ring)

    async def _wait_async(self, seen: Progress, bells: list[Callable[[], None]]) -> None:
        """`_wait` for a running loop, any loop."""
        loop = asyncio.get_running_loop()
        rung = loop.create_future()
        timer: asyncio.TimerHandle

        def ring() -> None:
            if not rung.done():
                rung.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, and whoever waited in it is gone
                loop.call_soon_threadsafe(ring)

        def look_up() -> None:  # now and then, which lets an interrupt through where a kernel cannot wake its own loop
            nonlocal timer
            timer = loop.call_later(LOOK_UP, look_up)

        timer = loop.call_later(LOOK_UP, look_up)
        bells.append(wake)
        try:
            if self._progress() == seen:
                self._say_if_hindered()
                await rung
        finally:
            timer.cancel()
            bells.remove(wake)

    async def _result_async(self) -> RequestOutput:
        while not (seen := self._progress())[1]:
            await self._wait_async(seen, self._enders)
        self.raise_error()
        return self.output()

    def _say_if_hindered(self) -> None:
        why = self._mailbox.hindered
        if why is not None:
            warnings.warn(f"request {self.id} waits, but {why}", EnginePausedWarning, stacklevel=callers_level())

    def _check_single(self) -> None:
        if len(self.completions) > 1:
            raise ValueError(f"this request has n={len(self.completions)} outputs, so its text has no one order: iterate request.outputs()")

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        lengths = [len(completion.token_ids) for completion in self.completions]
        self.metrics.num_generation_tokens, self.metrics.num_steps = sum(lengths), max(lengths)
        logprobs = None
        if self.params.prompt_logprobs is not None and self._prompt_logprobs:
            logprobs = [None, *(named(entry, self._tokenizer) for entry in self._prompt_logprobs)]
        elif self.params.prompt_logprobs is not None:
            logprobs = [None]
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=logprobs,
            outputs=outputs,
            finished=self._done,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
        )

    # ── called by the engine's thread ───────────────────────────────────────────────────────────────────────────────

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in _OF_THE_ENGINE]

    def wake(self) -> None:
        """Let everybody who waits look again."""
        for ring in self._waiters + self._enders:
            ring()

    @property
    def waited_for(self) -> bool:
        return bool(self._waiters)

    def progressed(self) -> None:
        for ring in self._waiters.copy():
            ring()

    def scored(self, entries: list[TokenLogprobs]) -> None:
        self._prompt_logprobs += entries

    def end(self, now: float) -> None:
        self.metrics.finished_time = now
        self._done = True
        self.wake()

    def fail(self, error: NBEngineError, now: float) -> None:
        """End it with an error; what it had stays readable through `output()`."""
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.finish("error", None)
                completion.complete()
        self._error = error
        self.end(now)

    def fail_alone(self, message: str, now: float) -> None:
        self.fail(RequestError(f"request {self.id} failed: {message}"), now)


class _OutputReader:
    """Where one reader of `Request.outputs()` stands."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ended = False
        self._tokens = [0] * len(request.completions)
        self._chars = [0] * len(request.completions)
        self._yielded = False

    def next(self) -> RequestOutput | None:
        """The next output, or None when there is nothing new to tell."""
        request, kind = self.request, self.request.params.output_kind
        done = request.finished
        if kind is RequestOutputKind.FINAL_ONLY and not done:
            return None
        fresh = any(len(c.token_ids) > seen for c, seen in zip(request.completions, self._tokens, strict=True))
        if not fresh and not done:
            return None
        self.ended = done
        if kind is not RequestOutputKind.DELTA:
            output = request.output()
            self._tokens = [len(c.token_ids) for c in output.outputs]
            return _as_seen(output, done)
        parts = []
        for i, completion in enumerate(request.completions):
            part = completion.output(self._tokens[i])
            self._tokens[i] += len(part.token_ids)
            part.text, self._chars[i] = part.text[self._chars[i] :], len(part.text)
            parts.append(part)
        return _as_seen(request._output(parts), done)  # noqa: SLF001 - one noun in two classes


def _as_seen(output: RequestOutput, done: bool) -> RequestOutput:
    """An output that was put together while its request ended does not tell so: the one after it does, with all that came."""
    if not done and all(part.finish_reason is not None for part in output.outputs):
        for part in output.outputs:
            part.finish_reason = part.stop_reason = None
    output.finished = done
    return output

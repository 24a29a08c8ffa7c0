"""An answer by server-sent events: whatever the engine brought since the last write goes out in one."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from nbengine.errors import NBEngineError
from nbengine.serve.answers import Heading, prompt_entries, prompt_tokens, usage
from nbengine.serve.logprobs import TokenNames, chat_logprobs, completion_logprobs
from nbengine.serve.pacer import serve
from nbengine.serve.refusal import refusal_of

if TYPE_CHECKING:
    from nbengine.completion import Completion
    from nbengine.request import Request
    from nbengine.serve.asks import Asked
    from nbengine.serve.latency import Latency
    from nbengine.serve.refusal import Refusal
    from nbengine.serve.traffic import Traffic
    from nbengine.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
encode = msgspec.json.Encoder().encode


class Connection(Protocol):
    """Tornado's, of which only this is used."""

    def write(self, chunk: bytes) -> asyncio.Future[None]:
        """The future is done when the client has taken it all."""


class Stream:
    """One client's events. Lives in the front's thread; only its bell is rung from the engine's.

    There is at most one write that the client has not taken, and what comes meanwhile stays where the engine put it, as token
    ids: a slow client costs a list of ints.
    """

    def __init__(self, asked: Asked, heading: Heading, tokenizer: Tokenizer, latency: Latency, traffic: Traffic) -> None:
        self.asked = asked
        self.fresh = False
        self.begun = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.written = monotonic()  # when something was last written
        self.waits = False  # for the client to take what was written
        self.stalled = False
        self.opened = False  # the headers have been written, and what comes before any token
        self._heading = heading
        self._latency = latency
        self._traffic = traffic
        self._connection: Connection | None = None
        self._missed = False
        self._said_all = False
        self._to_end = {request.id: request for request in asked.requests}
        names = TokenNames(tokenizer, as_ids=bool(asked.body.return_tokens_as_token_ids))
        options = asked.body.stream_options
        self._tells_usage = options is not None and bool(options.include_usage)
        self._tells_usage_always = self._tells_usage and options is not None and bool(options.continuous_usage_stats)
        self._choices = [
            _Choice(self, request, completion, place, names)
            for place, request in enumerate(asked.requests)
            for completion in request.completions
        ]

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, connection: Connection) -> None:
        """From now on events may be written, the headers going out with the first of them."""
        self._connection = connection
        self.pump()

    def open(self) -> None:
        """Let the client have the headers, if no event has come for so long that it might wonder."""
        if self._connection is not None and not self.opened and not self.done.done():
            self._write(b"".join(self._first()), 0)

    def pump(self) -> None:
        """Write what is there, unless the client has still to take what was written before."""
        if self._connection is None or self._said_all or self.done.done():
            return
        if self.waits:
            self._missed = True
            return
        finished = [request for request in self._to_end.values() if request.finished]  # seen first: all they brought is there
        parts: list[bytes] = []
        tokens = 0
        for choice in self._choices:
            tokens += choice.take(parts)
        if tokens:
            self.begun = True
        if not self.opened and (parts or finished):
            parts[:0] = self._first()
        if self._choices and any(choice.ended for choice in self._choices):
            self._choices = [choice for choice in self._choices if not choice.ended]
        for request in finished:
            if not self._end(request, parts):
                break
        if not self._to_end:
            self._close(parts)
        if parts:
            self._write(b"".join(parts), tokens)
        if self._said_all and not self.waits:
            self._finish()

    def ping(self) -> None:
        """A comment, for proxies that give up on silent connections."""
        if self._connection is not None and self.opened and not self.waits and not self.done.done():
            self._write(PING, 0)

    def gone(self) -> None:
        """The client left."""
        self._connection = None
        self._finish()

    def stall(self) -> None:
        """The client has taken nothing for too long: let go of it."""
        self.stalled = True
        self.gone()

    def fail(self, error: Refusal) -> None:
        """It cannot go on: say why and end. Where nothing has been written yet, whoever waits until it is done is told."""
        if not self.opened and not self.done.done():
            self.done.set_exception(error)
            return
        if self._connection is not None and not self.done.done() and not self.waits:
            self._write(b"data: " + encode(error.body()) + b"\n\n" + DONE, 0)
        self._finish()

    def timed(self, seconds: float, tokens: int) -> None:
        """So many tokens of an output came in that time."""
        self._latency.between(seconds, tokens)

    def _first(self) -> list[bytes]:
        return [choice.first() for choice in self._choices]

    def _end(self, request: Request, parts: list[bytes]) -> bool:
        """One of the requests has ended; False if nothing else is to come, because it failed."""
        del self._to_end[request.id]
        self._latency.ended(request, between_told=True)
        try:
            request.raise_error()
        except NBEngineError as error:
            parts.append(b"data: " + encode(refusal_of(error).body()) + b"\n\n")
            self._choices = []
            self._to_end.clear()
            self._tells_usage = False
            return False
        return True

    def _close(self, parts: list[bytes]) -> None:
        if self._tells_usage:
            parts.append(b"data: " + encode({**self._heading.fields(chunk=True), "choices": [], "usage": usage(self.asked)}) + b"\n\n")
        parts.append(DONE)
        self._said_all = True

    def _write(self, data: bytes, tokens: int) -> None:
        assert self._connection is not None
        self.opened = True
        self.written = monotonic()
        self._traffic.sent(len(data), tokens)
        written = self._connection.write(data)
        if written.done():
            if written.cancelled() or written.exception() is not None:
                self.gone()
        else:
            self.waits = True
            written.add_done_callback(self._taken)

    def _taken(self, written: asyncio.Future[None]) -> None:
        self.waits = False
        if written.cancelled() or written.exception() is not None:
            self.gone()
        elif self._said_all:
            self._finish()
        elif self._missed:
            self._missed = False
            serve(self)

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    # ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def frame(self, choice: dict[str, Any], **beside: Any) -> bytes:
        """An event with one choice, for what does not fit into the usual one."""
        event = {**self._heading.fields(chunk=True), "choices": [choice], **beside}
        if self._tells_usage:
            event["usage"] = usage(self.asked) if self._tells_usage_always else None
        return b"data: " + encode(event) + b"\n\n"

    def template(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text of an event that holds nothing else."""
        mark = "\ue0c5text\ue0c5"
        content = {"delta": {"content": mark}} if self.asked.chat else {"text": mark}
        before, _, after = self.frame({"index": index, **content, "logprobs": None, "finish_reason": None}).rpartition(encode(mark))
        return before, after

    @property
    def plain(self) -> bool:
        """Whether the usual event is enough: text, and nothing beside it that changes."""
        return not (self._tells_usage_always or self.asked.body.return_token_ids)


class _Choice:
    """One output on its way to the client."""

    def __init__(self, stream: Stream, request: Request, completion: Completion, place: int, names: TokenNames) -> None:
        self.request = request
        self.index = place * stream.asked.n + completion.index
        self.ended = False
        self._stream = stream
        self._completion = completion
        self._before = stream.asked.before[place] if stream.asked.before else ""
        self._names = names
        self._tokens = 0  # told so far
        self._told_at: float | None = None  # the engine's clock at the last of them
        self._begins = stream.asked.chat or bool(self._before and request.params.logprobs is None)  # with an event before any text
        self._offset = len(self._before)
        self._plain = stream.plain and completion.logprobs is None
        self._template = stream.template(self.index)

    def first(self) -> bytes:
        """The event that comes before any text: whose answer it is, and what it goes on from."""
        asked = self._stream.asked
        if not self._begins:
            return b""
        ids = {"prompt_token_ids": self.request.prompt_token_ids} if asked.body.return_token_ids else {}
        told: dict[str, Any] = {"index": self.index, "logprobs": None, "finish_reason": None}
        if not asked.chat:
            return self._stream.frame({**told, "text": self._before, **ids})
        told["delta"] = {"role": "assistant", "content": self._before}
        return self._stream.frame(told, **({} if self.index else ids))

    def take(self, parts: list[bytes]) -> int:
        """Add the events of what is new, and tell how many tokens that is."""
        completion = self._completion
        complete = completion.complete_now  # first this, then the tokens: they were put before it
        count = len(completion.token_ids)
        new = count - self._tokens
        if not new and not complete:
            return 0
        if new:
            self._time(new)
        silent = self._stream.asked.silent
        delta = "" if silent else completion.read_delta()
        if self._plain and not complete:
            self._tokens = count
            if delta:
                parts += (self._template[0], encode(delta), self._template[1])
            return new
        told = self._told(delta, count, silent=silent)
        self._tokens = count
        if complete:
            self.ended = True
            told["finish_reason"] = "length" if silent else completion.finish_reason
            told["stop_reason"] = None if silent else completion.stop_reason
        if completion.finish_reason != "error":
            parts.append(self._stream.frame(told))
        return 0 if silent else new

    def _told(self, delta: str, count: int, *, silent: bool) -> dict[str, Any]:
        asked, completion, params = self._stream.asked, self._completion, self.request.params
        ids = [] if silent else completion.token_ids[self._tokens : count]
        logprobs: dict[str, Any] | None = None
        if completion.logprobs is not None:
            entries: list[Any] = completion.logprobs[self._tokens : self._tokens + len(ids)]
            if asked.chat:
                logprobs = chat_logprobs(ids, entries, params.logprobs or 0, self._names)
            else:
                offset = self._offset
                if self._tokens == 0 and self._before:
                    delta, offset = self._before + delta, 0
                    entries, ids_told = [*prompt_entries(asked, self.request), *entries], [*prompt_tokens(asked, self.request), *ids]
                else:
                    ids_told = ids
                logprobs = completion_logprobs(ids_told, entries, params.logprobs or 0, self._names, offset)
                self._offset += sum(len(self._names.text(token)) for token in ids)
        told: dict[str, Any] = {"index": self.index, **({"delta": {"content": delta}} if asked.chat else {"text": delta})}
        told["logprobs"] = logprobs
        told["finish_reason"] = None
        if asked.body.return_token_ids:
            told["token_ids"] = ids
            if not self._begins and not self._tokens:
                told["prompt_token_ids"] = self.request.prompt_token_ids
        return told

    def _time(self, new: int) -> None:
        """Put the time between its tokens into the histogram, as the engine's thread noted it."""
        at = self.request.metrics.last_token_time
        if at is None:
            return
        if self._told_at is None:
            self._told_at = self.request.metrics.first_token_time
            new -= 1
        if self._told_at is not None and new > 0 and self._completion.index == 0:
            self._stream.timed(at - self._told_at, new)
        self._told_at = at

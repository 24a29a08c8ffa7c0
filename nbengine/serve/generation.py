"""Completions and chat completions: ask the engine, answer whole or by events, and end what a client that left had asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from nbengine.serve import asks
from nbengine.serve.answers import Heading, answer
from nbengine.serve.handlers import Handler
from nbengine.serve.protocol import ChatRequest, CompletionRequest
from nbengine.serve.stream import Stream
from nbengine.waiting import cancel_all

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.serve.asks import Asked
    from nbengine.serve.listener import Listener
    from nbengine.serve.protocol import Sampled
    from nbengine.serve.refusal import Refusal


class Whole:
    """Waits until requests have ended; told by the pacer as a stream is."""

    begun = False

    def __init__(self, asked: Asked) -> None:
        self.fresh = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left = asked.requests

    def pump(self) -> None:
        self._left = [request for request in self._left if not request.finished]
        if not self._left:
            self.gone()

    def gone(self) -> None:
        """The client left."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, refusal: Refusal) -> None:
        """It cannot go on."""
        if not self.done.done():
            self.done.set_exception(refusal)


class Generation(Handler):
    """What both have in common."""

    decoder: msgspec.json.Decoder[Any]
    ask: Callable[[Engine, Any], Asked]

    def initialize(self, listener: Listener) -> None:
        super().initialize(listener)
        self.user: str | None = None
        self.left = False  # the client has
        self.waiting: Stream | Whole | None = None

    async def on_post(self) -> None:
        body: Sampled = self.read(self.decoder)
        self.user = body.user
        name = self.listener.name_of(body.model)
        count = self._count(body)
        listener, traffic = self.listener, self.listener.traffic
        listener.check_queue(
            count, most=listener.engine().info.max_num_seqs + listener.options.max_queue, param="n" if (body.n or 1) > 1 else "prompt"
        )
        began = monotonic()
        traffic.active_requests += 1
        traffic.open_sequences += count
        listener.running.add(self)
        asked: Asked | None = None
        try:
            asked = await self._asked(body)
            if not self.left:
                await (self._stream if body.stream else self._answer)(asked, Heading(asked, name))
        finally:
            traffic.active_requests -= 1
            traffic.open_sequences -= count
            listener.running.discard(self)
            if asked is not None:
                traffic.cancelled += any(not request.finished for request in asked.requests)
                listener.intake.take_back(asked.requests)
                cancel_all(asked.requests)
                traffic.took(monotonic() - began)
            self.waiting = None  # it holds this: what is in no cycle needs no collector

    @staticmethod
    def _count(body: Any) -> int:
        """Outputs that it asks for; whether it may is checked elsewhere."""
        prompt: Any = getattr(body, "prompt", None)
        several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        return (len(prompt) if several else 1) * max(1, body.n or 1)

    async def _asked(self, body: Sampled) -> Asked:
        ask = type(self).ask
        return await self.worked_on(lambda engine: ask(engine, body), awake=True)

    async def _answer(self, asked: Asked, heading: Heading) -> None:
        self.waiting = whole = Whole(asked)
        with self.listener.listening(whole, asked.requests, at_end=True):
            self.listener.intake.put(asked.requests, whole.fail)
            await whole.done
        if self.left:
            return
        for request in asked.requests:
            self.listener.latency.ended(request)
        for request in asked.requests:
            request.raise_error()
        told = answer(asked, heading, self.listener.engine(awake=False).get_tokenizer())
        self.listener.traffic.sent(0, told["usage"]["completion_tokens"])
        await self.tell_all(told)

    async def _stream(self, asked: Asked, heading: Heading) -> None:
        listener = self.listener
        tokenizer = listener.engine(awake=False).get_tokenizer()
        self.waiting = stream = Stream(asked, heading, tokenizer, listener.latency, listener.traffic)
        listener.traffic.active_streams += 1
        try:
            listener.watch(stream)
            with listener.listening(stream, asked.requests, at_end=False):
                stream.begin(_Events(self))
                listener.intake.put(asked.requests, stream.fail)
                await stream.done
            if stream.stalled:
                self.detach().close()
                self.left = True
        finally:
            listener.traffic.active_streams -= 1
            listener.watched.discard(stream)
        if not self.left:
            self.finish()

    def end(self, refusal: Refusal) -> None:
        """The server is being closed: say so to the client."""
        if self.waiting is not None:
            self.waiting.fail(refusal)

    def on_connection_close(self) -> None:
        self.left = True
        if self.waiting is not None:
            self.waiting.gone()
        super().on_connection_close()


class _Events:
    """A handler's connection, with the headers in front of what is written first."""

    def __init__(self, handler: Generation) -> None:
        self._handler = handler
        self._begun = False

    def write(self, chunk: bytes) -> asyncio.Future[None]:
        handler = self._handler
        if self._begun:
            return handler.request.connection.write(chunk)  # type: ignore[union-attr]
        self._begun = True
        handler.set_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.set_header("Cache-Control", "no-cache")
        handler.set_header("X-Accel-Buffering", "no")  # nginx
        handler.write(chunk)
        return handler.flush()


class Completions(Generation):
    endpoint = "/v1/completions"
    decoder = msgspec.json.Decoder(CompletionRequest)
    ask = staticmethod(asks.ask_completion)


class ChatCompletions(Generation):
    endpoint = "/v1/chat/completions"
    decoder = msgspec.json.Decoder(ChatRequest)
    ask = staticmethod(asks.ask_chat)

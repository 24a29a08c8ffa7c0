"""What every endpoint has in common, and the small ones."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec
from tornado.iostream import StreamClosedError
from tornado.web import HTTPError, RequestHandler, stream_request_body

import nbengine
from nbengine.errors import NBEngineError
from nbengine.serve import asks
from nbengine.serve.protocol import DetokenizeRequest, TokenizeRequest
from nbengine.serve.refusal import Refusal, own_fault, refusal_of

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.serve.listener import Listener

log = logging.getLogger("nbengine.serve")
JSON = "application/json"
DRAINED, DRAINED_AT_LEAST = 8, 64 << 20  # times the largest body, bytes: as much of one that is too large is read, and dropped
PIECE = 64 << 10  # bytes of an answer that are written at a time
LONG = 20_000  # bytes of a body that is worked on in a thread of its own


@stream_request_body
class Handler(RequestHandler):
    """Checks the key before the body is read, bounds the body, and says what is wrong in OpenAI's shape."""

    endpoint: str | None = None  # as counted; the path where it is one
    body = b""

    def initialize(self, listener: Listener) -> None:
        self.listener = listener
        self._parts: list[bytes] = []
        self._size = 0
        self._refusal: Refusal | None = None

    def set_default_headers(self) -> None:
        self.set_header("Server", f"nbengine/{nbengine.__version__}")
        self.set_header("Content-Type", JSON)
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Content-Type-Options", "nosniff")

    # ── coming in ───────────────────────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Look at the headers. What is refused by them is refused when the body has come and been dropped: a client reads no
        answer before it has sent its request, and finds only a broken connection if nobody reads that.
        """
        self.listener.intake.stir()
        self._refusal = self._refused_by_headers()
        drained = max(DRAINED * self.listener.options.max_body_size, DRAINED_AT_LEAST)
        self.request.connection.set_max_body_size(drained)  # type: ignore[union-attr]
        waits = self.request.headers.get("Expect", "").lower() == "100-continue"
        if self._refusal is not None and (waits or self._length() > drained):
            self._refusal.headers["Connection"] = "close"  # which tornado does to whoever is answered before the body came
            raise self._refusal

    def _refused_by_headers(self) -> Refusal | None:
        scheme, _, key = self.request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self.listener.check_key(key.strip()):
            return Refusal(
                401,
                "the key is missing or wrong: send it as 'Authorization: Bearer KEY' (api_key=... of an OpenAI client)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return self._too_large() if self._length() > self.listener.options.max_body_size else None

    def _length(self) -> int:
        length = self.request.headers.get("Content-Length", "")
        return int(length) if length.isascii() and length.isdecimal() else 0

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        self._size += len(chunk)
        if self._refusal is None and self._size > self.listener.options.max_body_size:
            self._refusal = self._too_large()
        if self._refusal is None:
            self._parts.append(chunk)
        else:
            self._parts.clear()
        return None

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body has more than {self.listener.options.max_body_size} bytes, which is the most", code="body_too_large")

    def read(self, decoder: msgspec.json.Decoder[Any]) -> Any:
        """The body, checked."""
        kind = self.request.headers.get("Content-Type", JSON).partition(";")[0].strip().lower()
        if kind != JSON:
            raise Refusal(415, f"send the body as {JSON}, not {kind[:80]!r}", code="unsupported_media_type")
        self.body = b"".join(self._parts)
        self._parts.clear()
        return asks.decode(decoder, self.body)

    # ── going out ───────────────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, what: Any, status: int = 200) -> None:
        """Answer with JSON."""
        data = msgspec.json.encode(what)
        self.set_status(status)
        self.listener.traffic.sent(len(data))
        self.finish(data)

    async def tell_all(self, what: Any) -> None:
        """Answer with JSON of any size, a piece at a time: a client that takes nothing of it is let go."""
        data = msgspec.json.encode(what)
        if len(data) <= PIECE:
            self.listener.traffic.sent(len(data))
            self.finish(data)
            return
        self.set_header("Content-Length", len(data))
        sending = _Sending(self)
        self.listener.watch(sending)
        try:
            for begin in range(0, len(data), PIECE):
                piece = data[begin : begin + PIECE]
                self.write(piece)
                await self.flush()
                self.listener.traffic.sent(len(piece))
                sending.written = monotonic()
        except StreamClosedError:
            return  # the client left, or was let go
        finally:
            self.listener.watched.discard(sending)

    async def worked_on(self, function: Callable[[Engine], Any], *, awake: bool = False) -> Any:
        """What it gives for the engine, in a thread of its own when there is much to do."""
        listener = self.listener
        if len(self.body) <= LONG:
            return function(listener.engine(awake=awake))
        return await listener.front.loop.run_in_executor(listener.preparing, lambda: function(listener.engine(awake=awake)))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = (kwargs.get("exc_info") or (None, None, None))[1]
        refusal = refusal_of(error) if isinstance(error, NBEngineError) else error
        if not isinstance(refusal, Refusal):
            refusal = _of_tornado(status_code, error)
        for name, value in refusal.headers.items():
            self.set_header(name, value)
        self.tell(refusal.body(), refusal.status_code)

    def log_exception(self, typ: Any, value: BaseException | None, tb: Any) -> None:
        if not isinstance(value, HTTPError | NBEngineError | StreamClosedError):
            log.error("%s %s failed:\n%s", self.request.method, self.request.path, "".join(traceback.format_exception(typ, value, tb)))

    def on_finish(self) -> None:
        self.listener.traffic.answered(self.endpoint or self.request.path, self.get_status())

    def _refuse_or(self, method: str, *args: str) -> Any:
        """Every method comes by here: without the key there is nothing."""
        self.listener.intake.heard(self.request.connection.stream)  # type: ignore[union-attr]
        if self._refusal is not None:
            raise self._refusal
        found = getattr(self, method, None)
        if found is None:
            allowed = [name for name, own in (("GET", "on_get"), ("POST", "on_post")) if hasattr(self, own)]
            raise Refusal(
                405,
                f"{self.request.method} is not taken here: send {allowed[0]}",
                code="method_not_allowed",
                headers={"Allow": ", ".join(allowed)},
            )
        return found(*args)

    def get(self, *args: str) -> Any:
        return self._refuse_or("on_get", *args)

    def post(self, *args: str) -> Any:
        return self._refuse_or("on_post", *args)

    def _other(self, *_: str) -> Any:
        return self._refuse_or("on_other")

    head = put = patch = delete = options = _other

    def compute_etag(self) -> str | None:
        return None


class _Sending:
    """A whole answer on its way, watched as a stream is."""

    waits = True  # for the client, from the first piece to the last

    def __init__(self, handler: Handler) -> None:
        self.written = monotonic()
        self._handler = handler

    def open(self) -> None:
        """Its headers have gone out."""

    def ping(self) -> None:
        """It is not silent."""

    def stall(self) -> None:
        """The client has taken nothing for too long: let go of it."""
        self._handler.request.connection.stream.close()  # type: ignore[union-attr]


def _of_tornado(status: int, error: BaseException | None) -> Refusal:
    """What tornado found wrong, or we did."""
    if status == 405:
        return Refusal(405, "this method is not taken here: send GET or POST", code="method_not_allowed", headers={"Allow": "GET, POST"})
    if isinstance(error, HTTPError) and status < 500:
        return Refusal(status, error.log_message or "the request is wrong")
    return own_fault(status)


class NotFound(Handler):
    endpoint = "other"

    def on_get(self, *_: str) -> None:
        raise Refusal(404, f"there is nothing at {self.request.path[:200]}; /openapi.json lists what there is", code="not_found")

    on_post = on_other = on_get


# ── about the server ────────────────────────────────────────────────────────────────────────────────────────────────────


class Models(Handler):
    def on_get(self) -> None:
        self.tell({"object": "list", "data": [model_card(self.listener, name) for name in self.listener.names]})


class Model(Handler):
    endpoint = "/v1/models/{model}"

    def on_get(self, name: str) -> None:
        self.tell(model_card(self.listener, self.listener.name_of(name)))


def model_card(listener: Listener, name: str) -> dict[str, Any]:
    engine = listener.engine_of()
    return {
        "id": name,
        "object": "model",
        "created": int(listener.created),
        "owned_by": "nbengine",
        "root": listener.names[0],
        "parent": None,
        "max_model_len": None if engine is None else engine.info.max_model_len,
        "state": listener.state,
    }


class Health(Handler):
    def on_get(self) -> None:
        self.listener.engine()
        self.tell({"status": "ok"})


class Version(Handler):
    def on_get(self) -> None:
        self.tell({"version": nbengine.__version__})


class Load(Handler):
    def on_get(self) -> None:
        self.tell({"server_load": self.listener.traffic.active_requests})


class Metrics(Handler):
    def on_get(self) -> None:
        from nbengine.serve.metrics import CONTENT_TYPE, exposition

        data = exposition(self.listener)
        self.set_header("Content-Type", CONTENT_TYPE)
        self.listener.traffic.sent(len(data))
        self.finish(data)


class OpenAPI(Handler):
    def on_get(self) -> None:
        from nbengine.serve.openapi import description

        self.tell(description(self.listener.names))


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tokenize(Handler):
    decoder = msgspec.json.Decoder(TokenizeRequest)

    async def on_post(self) -> None:
        body: TokenizeRequest = self.read(self.decoder)
        self.listener.name_of(body.model)
        asks.refuse_unbuilt(body)

        def work(engine: Engine) -> dict[str, Any]:
            tokens = asks.tokens_of(engine, body)
            texts = [engine.get_tokenizer().token_text(token) for token in tokens] if body.return_token_strs else None
            return {"count": len(tokens), "max_model_len": engine.info.max_model_len, "tokens": tokens, "token_strs": texts}

        await self.tell_all(await self.worked_on(work))


class Detokenize(Handler):
    decoder = msgspec.json.Decoder(DetokenizeRequest)

    async def on_post(self) -> None:
        body: DetokenizeRequest = self.read(self.decoder)
        self.listener.name_of(body.model)
        await self.tell_all({"prompt": await self.worked_on(lambda engine: asks.text_of(engine, body))})

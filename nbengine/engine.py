"""The engine as its users hold it: thread-safe, the same in a script, in IPython, in a notebook and inside a running loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from nbengine.checks import as_int, as_keywords, checks_keywords
from nbengine.config import EngineConfig
from nbengine.errors import EngineClosedError, NBEngineError
from nbengine.front import Front
from nbengine.mailbox import Mailbox
from nbengine.policy import Policy, policy_named
from nbengine.prompts import Prompt, read_prompt
from nbengine.request import Request
from nbengine.sampling_params import SamplingParams
from nbengine.serve.served import Served
from nbengine.startup import EngineInfo, start
from nbengine.waiting import gather, wait_all

if TYPE_CHECKING:
    from nbengine.outputs import RequestOutput
    from nbengine.serve.server import Server
    from nbengine.tokenizer import Tokenizer
    from nbengine.trace import StepRecord, Trace

_numbers = itertools.count()  # for the names of threads only
HOTTEST = 1e30  # temperatures above this are drawn as this: all tokens are equally likely, and float32 can hold it
PATIENCE = 10.0  # seconds that the collector, or the end of the process, waits for a step that may never end


class Engine:
    """A model, its KV cache and the thread that runs them.

    Every method may be called from any thread. Nothing but `close()`, the end of a `with` block or `del` ends it, and
    any of these gives everything back.

    >>> with Engine("tales") as engine:                                                     # doctest: +SKIP
    ...     request = engine.submit("Once upon a time", SamplingParams(max_tokens=40))
    ...     for text in request: print(text, end="")
    """

    def __init__(self, model: str | Path, *, progress: Callable[[str, int, int], None] | None = None, **config: Any) -> None:
        """Load a model; `config` takes the names of EngineConfig.

        `progress(phase, bytes_done, bytes_total)` is told how it goes, in place of the bar that is shown otherwise; what it
        raises ends the load, as an interrupt does.
        """
        self.config = EngineConfig.of(model, **config)
        self._mailbox = Mailbox()
        self._ids = itertools.count()
        name = f"nbengine-{next(_numbers)}"
        started = start(self.config, self._mailbox, name, progress)
        self.info: EngineInfo = started.info
        self.trace: Trace = started.trace
        self.sleep_level = 0  # 1: the KV cache was given back; 2: the weights too
        self._scheduler = started.scheduler
        self._tokenizer = started.tokenizer
        self.trace.name = str(self.config.model)
        self.trace.token_text = None if started.tokenizer is None else started.tokenizer.token_text
        self.front = Front(f"{name}-front")
        self._served = Served()
        self._close = weakref.finalize(self, _shut_down, self._mailbox, started.thread, self.front, self._served)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    @checks_keywords()
    def submit(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Request:
        """Queue one prompt (text, token ids, or a dict with either) as it is, without a chat template, and return its handle at once.

        Bad input raises here, before anything is queued. The smallest priority value goes first, under a priority policy.
        """
        return self.submit_all([prompt], params, priority=priority)[0]

    @checks_keywords()
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Run prompts together and wait for all; an interrupt, or an error in one, cancels the others of this call."""
        return wait_all(self.submit_all(as_list(prompts), params, priority=priority), show=use_tqdm)

    @checks_keywords()
    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """`generate` for a running loop, any loop."""
        return await gather(self.submit_all(as_list(prompts), params, priority=priority))

    @checks_keywords()
    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> Iterator[str]:
        """Text as it comes; leaving the loop early, or an interrupt, cancels the request.

        Bad input raises here; the prompt is queued when the first text is asked for.
        """
        return self._stream(*self.prepare([prompt], params, priority))

    def _stream(self, request: Request) -> Iterator[str]:
        """Queues the request when it is first asked for text: one that never is leaves nothing running."""
        self._mailbox.submit([request.arrive()])
        try:
            yield from request
        finally:
            request.cancel()

    @checks_keywords()
    def astream(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> AsyncIterator[str]:
        """`stream` for a running loop."""
        return self._astream(*self.prepare([prompt], params, priority))

    async def _astream(self, request: Request) -> AsyncIterator[str]:
        self._mailbox.submit([request.arrive()])
        try:
            async for text in request:
                yield text
        finally:
            request.cancel()

    def request_ids(self) -> list[str]:
        """Whoever waits or runs now."""
        return self._mailbox.ask("request_ids")

    def cancel(self, request_id: str) -> None:
        """End one request by its id; `Request.cancel()` does it for whoever holds the request."""
        running = self.request_ids()
        if request_id not in running:
            raise ValueError(
                f"no request {request_id!r} is waiting or running; there {'are ' + ', '.join(running) if running else 'is none'}"
            )
        self._mailbox.cancel(request_id)

    def cancel_all(self) -> int:
        """End every request; how many there were."""
        return self._mailbox.ask("cancel_all")

    def default_params(self) -> SamplingParams:
        """What a request without params gets: the model's own generation config, or neutral values."""
        return self.info.default_params.clone()

    def submit_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] | None = 0,
    ) -> list[Request]:
        """Queue many prompts at once. Everything is checked before anything is queued: a bad one leaves nothing behind."""
        requests = self.prepare(prompts, params, priority)
        self.queue(requests)
        return requests

    def prepare(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, priority: int | Sequence[int] | None
    ) -> list[Request]:
        """Requests that have been checked, for `queue`: what `submit_all` does first."""
        self._mailbox.check_open()
        given = spread("params", params, len(prompts), SamplingParams)
        priorities = spread("priority", priority, len(prompts), int)
        texts, ids = read_prompt(prompts, self._tokenizer, self.info.vocab_size)
        requests = []
        for text, tokens, param, urgency in zip(texts, ids, given, priorities, strict=True):
            resolved = self._resolve(param)
            limit = self._limit(tokens, resolved)
            requests.append(Request(f"r{next(self._ids)}", text, tokens, resolved, self._mailbox, self._tokenizer, limit, urgency or 0))
        return requests

    def queue(self, requests: list[Request]) -> None:
        """Queue what was prepared, by one call or several, in this order: what `submit_all` does then."""
        self._mailbox.submit(requests)

    def _resolve(self, params: SamplingParams | None) -> SamplingParams:
        resolved = (self.info.default_params if params is None else params).resolve(self.info.eos_token_ids, self._tokenizer)
        if self._tokenizer is None:
            if resolved.stop:
                raise ValueError("stop strings need a tokenizer, and this engine has none (skip_tokenizer_init=True): use stop_token_ids")
            resolved.detokenize = False
        resolved.validate_for(self.info.vocab_size, self.config.max_logprobs)
        resolved.temperature = min(resolved.temperature, HOTTEST)
        return resolved

    def _limit(self, tokens: list[int], params: SamplingParams) -> int:
        room = self.info.max_model_len - len(tokens)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and max_model_len is {self.info.max_model_len}, which leaves no room for output: "
                "shorten the prompt or raise max_model_len"
            )
        if not self.config.enable_chunked_prefill and len(tokens) > self.info.max_num_batched_tokens:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, more than max_num_batched_tokens={self.info.max_num_batched_tokens} takes in one step: "
                "set enable_chunked_prefill=True or raise max_num_batched_tokens"
            )
        if params.min_tokens > room:
            raise ValueError(
                f"min_tokens={params.min_tokens}, and beside the {len(tokens)} tokens of the prompt max_model_len={self.info.max_model_len} "
                f"has room for {room}: lower min_tokens or raise max_model_len"
            )
        return len(tokens) + (room if params.max_tokens is None else min(params.max_tokens, room))

    # ── control ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def status(self) -> str:
        """`running`, `idle`, `paused`, `asleep`, `closed` or `dead`."""
        if self._mailbox.closed is not None:
            return "closed" if isinstance(self._mailbox.closed, EngineClosedError) else "dead"
        return self._mailbox.stalled or ("running" if self._scheduler.has_work() else "idle")

    def pause(self) -> None:
        """Stop between two steps. Whoever waits is told so; requests can still be submitted and cancelled."""
        self._mailbox.ask("pause")

    def step(self, n: int = 1) -> list[StepRecord]:
        """Move a paused engine by up to n steps; their records, fewer when there is no more to do."""
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number of steps, at least 1, not {n!r}")
        records: list[StepRecord] = []
        for _ in range(n):  # one message each: others get in between, and so does an interrupt
            record = self._mailbox.ask("step")
            if record is None:
                break
            records += record
        return records

    def resume(self) -> None:
        """Go on after `pause()`."""
        self._mailbox.ask("resume")

    @property
    def policy(self) -> Policy:
        """What decides who runs next."""
        return self._scheduler.policy

    def use(self, *, policy: str | Policy | type[Policy] | None = None, ops: Mapping[str, str | Callable[..., Any]] | None = None) -> None:
        """Exchange the scheduling policy or implementations of ops while it runs; an op is checked against its reference first."""
        if ops is not None and not isinstance(ops, Mapping):
            raise TypeError(f"ops must be a dict from an op's name to an implementation, such as {{'linear': 'reference'}}, not {ops!r}")
        self._mailbox.ask("use", None if policy is None else policy_named(policy), None if ops is None else dict(ops))

    @checks_keywords()
    def set_limits(self, *, max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None) -> None:
        """Change how many sequences run together, and how many tokens a step takes, while it runs: at most what it was made with.

        Who runs already runs to its end. `stats()` has the present limits, `info` those it was made with.
        """
        given = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        for name, value in given.items():
            if value is not None and as_int(value) is None:
                raise TypeError(f"{name} must be a whole number, not {value!r}")
        self._mailbox.ask("set_limits", as_int(max_num_batched_tokens), as_int(max_num_seqs))

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; running requests keep their blocks."""
        self._mailbox.ask("reset_prefix_cache")

    def sleep(self, level: int = 1) -> None:
        """Give the GPU back: the weights go to main memory (level 1) or altogether (level 2), and the KV cache is freed.

        On a CPU level 1 frees the cache alone. Requests wait until `wake_up()`.
        """
        if level not in {1, 2}:
            raise ValueError(f"level must be 1 (give back the KV cache) or 2 (the weights too), not {level!r}")
        self._mailbox.ask("sleep", level)
        self.sleep_level = level
        self._served.tell("asleep")

    def wake_up(self) -> None:
        """Undo `sleep()`; what was running is computed again and goes on."""
        self._mailbox.ask("wake_up")
        self.sleep_level = 0
        self._served.tell("ready")

    def resize_kv_cache(self, num_blocks: int) -> None:
        """Another number of KV blocks while it runs; whoever runs is computed again and goes on.

        MemoryError where there is no room for so many: then the engine keeps what it had.
        """
        if as_int(num_blocks) is None:
            raise TypeError(f"num_blocks must be a whole number, not {num_blocks!r}")
        self._mailbox.ask("resize", num_blocks)
        memory = self.info.memory
        resized = dataclasses.replace(memory, num_blocks=num_blocks, kv_cache=num_blocks * memory.block_bytes)
        self.info = dataclasses.replace(self.info, memory=resized)

    def update_weights(self, weights: Mapping[str, Any]) -> None:
        """Put new values into weights, by their names in the checkpoint; what is running is computed again under them."""
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"weights must be a dict from names in the checkpoint to tensors, as of state_dict(), not {type(weights).__name__}"
            )
        self._mailbox.ask("update_weights", weights)

    def stats(self) -> dict[str, Any]:
        """Counters of this moment: plain numbers, safe to keep."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        last = self.trace.last
        return {
            "status": self.status,
            "steps": scheduler.steps,
            "num_waiting": len(scheduler.waiting),
            "num_running": len(scheduler.running),
            "blocks_total": pool.num_blocks,
            "blocks_used": pool.num_used,
            "blocks_cached": len(pool.cached),
            "kv_cache_usage": pool.num_used / pool.num_blocks,
            "prefix_cache_queries": scheduler.prefix_queries,
            "prefix_cache_hits": scheduler.prefix_hits,
            "num_preemptions": scheduler.preemptions,
            "prompt_tokens": scheduler.prompt_tokens,
            "generation_tokens": scheduler.generation_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "last_step_ms": None if last is None else round(1e3 * last.duration, 3),
        }

    # ── serving ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def serve(self, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None, **options: Any) -> Server:
        """Answer OpenAI clients at an address of this machine until the server, or the engine, is closed.

        `options` are those of `nbengine.serve.serve_options.ServeOptions`. Without an api_key only this machine can reach it,
        and clients send the random key that the server has.

        >>> server = engine.serve()                                                            # doctest: +SKIP
        >>> client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)           # doctest: +SKIP
        """
        return self._served.open(self, host=host, port=port, api_key=api_key, **options)

    def unserve(self) -> int:
        """Close every server of this engine; how many there were."""
        return self._served.close()

    def http_stats(self) -> dict[str, Any]:
        """What goes over this engine's servers at this moment: plain values, safe to keep; zeros when there is no server."""
        return self._served.stats()

    def get_tokenizer(self) -> Tokenizer:
        """The engine's own tokenizer; its `.hf` is the transformers object."""
        if self._tokenizer is None:
            raise ValueError("this engine has no tokenizer: it was made with skip_tokenizer_init=True")
        return self._tokenizer

    def close(self) -> None:
        """End every request, the thread, and give all memory back. Harmless when it is closed.

        It waits for the step that runs; when that takes long, a warning says what the engine's thread does.
        """
        with contextlib.suppress(NBEngineError):
            self._mailbox.call("close")
        self._mailbox.wait_for_end()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info
        return (
            f"<Engine {self.config.model} {self.status}: {info.implementation} {info.architecture}, {info.dtype} on {info.device}, "
            f"{info.memory.num_blocks} blocks of {self.config.block_size} tokens, max_model_len {info.max_model_len}>"
        )

    def _repr_html_(self) -> str:
        from nbengine.notebook.status import Status

        return Status({self.config.model: self}, None)._repr_html_()


def as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many, as a list: a string, a dict and a flat list of token ids are one prompt."""
    if isinstance(prompts, str | Mapping) or (isinstance(prompts, Sequence) and prompts and all(isinstance(p, Number) for p in prompts)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a string, token ids, a dict with prompt or prompt_token_ids, or a list of these, not {prompts!r}")
    return list(prompts)


def spread(name: str, given: Any, count: int, kind: type) -> list[Any]:
    """One value for each prompt: the same for all, or a list."""

    def fits(value: Any) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    def advice(value: Any) -> str:
        return f"; pass {kind.__name__}({as_keywords(value)})" if isinstance(value, Mapping) and value else ""

    if given is None or fits(given):
        return [given] * count
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} must be {kind.__name__}, or a list with one for each prompt, not {given!r}{advice(given)}")
    if len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} prompts: give one for all, or one for each")
    for value in given:
        if not fits(value):
            raise TypeError(f"{name} must hold {kind.__name__}, not {value!r}{advice(value)}")
    return list(given)


def _shut_down(mailbox: Mailbox, thread: threading.Thread, front: Front, served: Served) -> None:
    """Runs once, when an engine is closed or collected, or at exit; holds nothing of the engine."""
    served.close()
    front.close()
    with contextlib.suppress(NBEngineError):
        mailbox.call("close")
    if thread is not threading.current_thread():
        thread.join(PATIENCE)  # not for ever: the collector may run in somebody who holds what the thread waits for

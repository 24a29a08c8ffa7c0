"""What a request gives back: vLLM's names, plain Python values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """One token at one position: its log-probability, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds on one clock, and what follows from it. None: not yet."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0  # of all outputs together
    num_steps: int = 0  # of the longest output: how often it got a token
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def time_to_first_token(self) -> float | None:
        return _between(self.arrival_time, self.first_token_time)

    @property
    def prefill_time(self) -> float | None:
        return _between(self.first_scheduled_time, self.first_token_time)

    @property
    def decode_time(self) -> float | None:
        return _between(self.first_token_time, self.last_token_time)

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds between two tokens of an output; None while it has fewer than two."""
        decode = self.decode_time
        return None if decode is None or self.num_steps < 2 else decode / (self.num_steps - 1)

    @property
    def e2e_latency(self) -> float | None:
        return _between(self.arrival_time, self.finished_time)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all outputs over the whole time from arrival to end."""
        return self.num_generation_tokens / self.e2e_latency if self.e2e_latency else None

    def __repr__(self) -> str:
        shown = ("time_in_queue", "time_to_first_token", "inter_token_latency", "e2e_latency")
        times = [f"{name}={value:.4g}" for name in shown if (value := getattr(self, name)) is not None]
        counts = [f"{name}={getattr(self, name)}" for name in ("num_prompt_tokens", "num_generation_tokens", "num_preemptions")]
        return f"RequestMetrics({', '.join(times + counts)})"


@dataclass(slots=True)
class CompletionOutput:
    """One of the n outputs of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # of the tokens so far, where logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # one dict a token: the chosen one first, then the most likely
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it; None for the model's own end

    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        ending = f"finish_reason={self.finish_reason!r}" + (f", stop_reason={self.stop_reason!r}" if self.stop_reason is not None else "")
        return f"CompletionOutput(index={self.index}, text={_short(self.text)}, token_ids=[{len(self.token_ids)} ids], {ending})"


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt, its outputs so far and its timings."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # one entry a token; the first has none before it
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache

    def __repr__(self) -> str:
        prompt = "" if self.prompt is None else f"prompt={_short(self.prompt)}, "
        sizes = f"prompt_token_ids=[{len(self.prompt_token_ids)} ids], num_cached_tokens={self.num_cached_tokens}"
        return f"RequestOutput(request_id={self.request_id!r}, {prompt}{sizes}, outputs={self.outputs!r}, finished={self.finished})"

    def _repr_html_(self) -> str:
        from nbengine.notebook.render import output_html

        return output_html(self)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "\N{HORIZONTAL ELLIPSIS}")

"""Opening an engine as the yardstick opens one, and running jobs through it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch

from nbengine import LLM, SamplingParams
from nbengine.bench.results import say
from nbengine.bench.shapes import load_format, model_folder, shape
from nbengine.bench.workloads import REPEATS, Job, workload

WARM_UP = 32  # tokens of the request that comes before what is timed
TURNS = 3  # of ways that are measured beside one another: one may meet something else that keeps the machine busy


@dataclass
class Settings:
    """What holds for a whole run."""

    device: torch.device
    folder: Path  # for models' files, on the disk that is measured
    quick: bool = False
    repeats: int | None = None  # None: as each workload usually has
    minutes: float | None = None  # nothing new begins after this long
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.85
    config: dict[str, Any] = field(default_factory=dict)  # further options of the engine
    began: float = field(default_factory=monotonic)

    def allows(self, what: str) -> bool:
        """Whether there is time for one more measurement; says what is left out."""
        if self.minutes is None or monotonic() - self.began < 60 * self.minutes:
            return True
        say(f"left out, {self.minutes:g} minutes are over: {what}")
        return False

    def repeats_of(self, name: str) -> int:
        return self.repeats or (1 if self.quick else REPEATS[name])

    @property
    def turns(self) -> int:
        """How often each of several ways is measured, in turns; the best of each counts."""
        return self.repeats or (1 if self.quick else TURNS)


@dataclass(frozen=True, slots=True)
class Opening:
    """Seconds from constructing `LLM` until it was ready, and from the first request to its first token."""

    ready: float
    first_token: float


@dataclass(frozen=True, slots=True)
class Run:
    """One workload once."""

    seconds: float
    tokens: int
    requests: int
    steps: int = 0
    preemptions: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def engine_options(model: str, settings: Settings, **config: Any) -> dict[str, Any]:
    """How the yardstick makes an engine, with what is given in addition."""
    longest = int(shape(model)["max_position_embeddings"])
    return {
        "load_format": load_format(model),
        "skip_tokenizer_init": True,
        "max_model_len": min(settings.max_model_len, longest),
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "device": str(settings.device),
        **settings.config,
        **config,
    }


@contextmanager
def opened(model: str, settings: Settings, folder: Path | None = None, **config: Any) -> Iterator[tuple[LLM, Opening]]:
    """An engine that has answered one request; it is closed and its memory given back at the end."""
    path = folder or model_folder(model, settings.folder)
    options = engine_options(model, settings, **config)
    began = perf_counter()
    llm = LLM(str(path), **options)
    try:
        ready = perf_counter() - began
        yield llm, Opening(ready, warm_up(llm))
    finally:
        llm.close()
        del llm
        give_back(settings.device)


def warm_up(llm: LLM) -> float:
    """One request of 128 tokens, as the yardstick has it; seconds to its first token."""
    jobs = workload("single", fresh="warm-up", vocab_size=llm.engine.info.vocab_size)
    prompts, params = asked([(jobs[0][0], WARM_UP)])
    [output] = llm.generate(prompts, params, use_tqdm=False)
    assert output.metrics.time_to_first_token is not None
    return output.metrics.time_to_first_token


def give_back(device: torch.device) -> None:
    """Let the next engine find what this one had."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def asked(jobs: list[Job], **changed: Any) -> tuple[list[Any], list[SamplingParams]]:
    """Prompts and params of jobs: temperature 1, the end of a sequence ignored."""
    params = [SamplingParams(**{"temperature": 1.0, "max_tokens": new, "ignore_eos": True, **changed}) for _, new in jobs]
    return [{"prompt_token_ids": prompt} for prompt, _ in jobs], params


def jobs_of(name: str, llm: LLM, settings: Settings, fresh: object) -> list[Job]:
    """A workload for this engine, which must have room for it."""
    info = llm.engine.info
    jobs = workload(name, fresh=fresh, vocab_size=info.vocab_size, quick=settings.quick)
    longest = max(len(prompt) + new for prompt, new in jobs)
    if longest > info.max_model_len:
        raise SystemExit(f"{name} has requests of {longest} tokens and the engine takes {info.max_model_len}: raise --max-model-len")
    return jobs


def run(llm: LLM, jobs: list[Job]) -> Run:
    """All jobs at once through `LLM.generate`."""
    prompts, params = asked(jobs)
    before = llm.engine.stats()
    began = perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = perf_counter() - began
    after = llm.engine.stats()
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert tokens == sum(new for _, new in jobs), "an output is shorter or longer than what was asked for"
    return Run(seconds, tokens, len(jobs), after["steps"] - before["steps"], after["num_preemptions"] - before["num_preemptions"])


def best(llm: LLM, name: str, settings: Settings) -> tuple[Run, list[Run]]:
    """The fastest of a workload's repeats, and all of them; each has fresh prompts."""
    runs: list[Run] = []
    for turn in range(settings.repeats_of(name)):
        if runs and not settings.allows(f"repeat {turn + 1} of {name}"):
            break
        runs.append(run(llm, jobs_of(name, llm, settings, turn)))
    return max(runs, key=lambda one: one.rate), runs

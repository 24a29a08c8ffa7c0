"""Synthetic load for a running engine: many requests of a chosen shape at once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbengine.bench.workloads import Lengths, lengths
from nbengine.checks import as_int, checks_keywords
from nbengine.errors import nearest
from nbengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.request import Request

SHAPES = ("sharegpt", "nano", "fixed")
MOST = 10_000  # requests


@dataclass(slots=True, repr=False)
class Burst:
    """The requests of a burst; `told` says how they were made."""

    requests: list[Request]
    told: str

    def cancel(self) -> None:
        """End those that have not ended."""
        for request in self.requests:
            request.cancel()

    def __repr__(self) -> str:
        return f"<Burst: {self.told}>"


@checks_keywords()
def burst(
    engine: Engine, shape: str = "sharegpt", *, count: int = 32, prompt: int = 128, output: int = 128, seed: int | None = None
) -> Burst:
    """Queue `count` requests of random tokens at once, each of which runs to its full length.

    `sharegpt` has the lengths of conversations, heavy-tailed; `nano` 100 to 1024 tokens in and out; `fixed` as many as `prompt` and
    `output` say. Lengths that the engine's max_model_len leaves no room for are shortened, and `told` says how many. The same seed
    gives the same prompts, which then share their prefixes; None draws fresh ones.

    >>> burst(engine, "sharegpt", count=100)                                                    # doctest: +SKIP
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}{nearest(str(shape), SHAPES)}")
    given = {"count": count, "prompt": prompt, "output": output}
    for name, value in given.items():
        if (as_int(value) or 0) < 1:
            raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")
    if count > MOST:
        raise ValueError(f"count must be at most {MOST:,}, not {count:,}")
    rng = random.Random(seed)  # noqa: S311 - load, not secrets
    wanted: Lengths = [(prompt, output)] * count if shape == "fixed" else lengths(shape, count, seed=rng.randrange(1 << 30))
    room = engine.info.max_model_len
    if not engine.config.enable_chunked_prefill:
        room = min(room, engine.info.max_num_batched_tokens + 1)
    jobs = [_fitted(*job, room) for job in wanted]
    tokens = range(min(10, engine.info.vocab_size - 1), engine.info.vocab_size)
    prompts = [rng.choices(tokens, k=size) for size, _ in jobs]
    params = [SamplingParams(max_tokens=new, ignore_eos=True, detokenize=False) for _, new in jobs]
    requests = engine.submit_all(prompts, params)
    shortened = sum(1 for job, asked in zip(jobs, wanted, strict=True) if job != asked)
    told = f"{count} requests of shape {shape}: {sum(s for s, _ in jobs):,} tokens in, {sum(n for _, n in jobs):,} out"
    return Burst(requests, told + (f"; {shortened} shortened to fit into max_model_len={engine.info.max_model_len}" if shortened else ""))


def _fitted(prompt: int, output: int, room: int) -> tuple[int, int]:
    """The same lengths where there is room for both, else at least one token of output, and the prompt at most three quarters of it."""
    if prompt + output <= room:
        return prompt, output
    prompt = max(1, min(prompt, room * 3 // 4, room - 1))
    return prompt, max(1, min(output, room - prompt))

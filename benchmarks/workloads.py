"""The requests that engines are measured on. They are the same on every machine: lengths and tokens come from a seed."""

from __future__ import annotations

import math
import random

Job = tuple[list[int], int]  # a prompt's token ids, and how many tokens to generate


def sharegpt(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """ShareGPT's mean lengths (161 in, 338 out: PagedAttention paper, figure 11), heavy-tailed, at most 1024 each."""
    return [(_lognormal(rng, 161, 1.0, 4, 1024), _lognormal(rng, 338, 0.9, 4, 1024)) for _ in range(count)]


def nano(rng: random.Random, count: int) -> list[tuple[int, int]]:
    """nano-vllm's benchmark: 100 to 1024 in, 100 to 1024 out."""
    return [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(count)]


def notebook(rng: random.Random, count: int) -> list[tuple[int, int]]:  # noqa: ARG001
    """What a cell asks for: 128 in, 256 out."""
    return [(128, 256)] * count


WORKLOADS = {"sharegpt": (sharegpt, 1000), "nano": (nano, 256), "single": (notebook, 1), "fifty": (notebook, 50)}


def workload(name: str, count: int | None = None, *, seed: int = 0, vocab_size: int = 100_000) -> list[Job]:
    """The jobs of a workload by its name, `count` of them or as many as it usually has."""
    shapes, usual = WORKLOADS[name]
    rng = random.Random(seed)
    return [([rng.randrange(10, vocab_size) for _ in range(prompt)], output) for prompt, output in shapes(rng, count or usual)]


def _lognormal(rng: random.Random, mean: float, sigma: float, low: int, high: int) -> int:
    mu = math.log(mean) - sigma * sigma / 2
    return max(low, min(high, round(rng.lognormvariate(mu, sigma))))

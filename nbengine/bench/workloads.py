"""The requests that engines are measured on. Their lengths are the same everywhere; their tokens are fresh in every repeat."""

from __future__ import annotations

import math
import random

Job = tuple[list[int], int]  # a prompt's token ids, and how many tokens to generate
Lengths = list[tuple[int, int]]


def sharegpt(rng: random.Random, count: int) -> Lengths:
    """ShareGPT's mean lengths (161 in, 338 out: PagedAttention paper, figure 11), heavy-tailed, at most 1024 each."""
    return [(_lognormal(rng, 161, 1.0, 4, 1024), _lognormal(rng, 338, 0.9, 4, 1024)) for _ in range(count)]


def nano(rng: random.Random, count: int) -> Lengths:
    """nano-vllm's benchmark: 100 to 1024 in, 100 to 1024 out."""
    return [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(count)]


def notebook(rng: random.Random, count: int) -> Lengths:  # noqa: ARG001
    """What a cell asks for: 128 in, 256 out."""
    return [(128, 256)] * count


WORKLOADS = {"single": (notebook, 1), "fifty": (notebook, 50), "nano": (nano, 256), "sharegpt": (sharegpt, 1000)}
REPEATS = {"single": 3, "fifty": 3, "nano": 1, "sharegpt": 1}  # of which the best counts
QUICK = 24  # tokens in and out at most, where it only matters that it runs


def lengths(name: str, count: int | None = None, *, seed: int = 0, quick: bool = False) -> Lengths:
    """Tokens in and out of each request of a workload, of as many requests as it usually has, or a tenth of them."""
    shapes, usual = WORKLOADS[name]
    found = shapes(random.Random(seed), count or (max(1, usual // 10) if quick else usual))
    return [(min(tokens, QUICK), min(new, QUICK)) for tokens, new in found] if quick else found


def workload(
    name: str, count: int | None = None, *, seed: int = 0, fresh: object = 0, vocab_size: int = 100_000, quick: bool = False
) -> list[Job]:
    """The jobs of a workload by its name. Another `fresh` gives prompts of the same lengths that share nothing with these."""
    rng = random.Random(f"{name}/{seed}/{fresh}")
    tokens = range(10, min(vocab_size, 100_000))
    return [(rng.choices(tokens, k=prompt), new) for prompt, new in lengths(name, count, seed=seed, quick=quick)]


def _lognormal(rng: random.Random, mean: float, sigma: float, low: int, high: int) -> int:
    mu = math.log(mean) - sigma * sigma / 2
    return max(low, min(high, round(rng.lognormvariate(mu, sigma))))

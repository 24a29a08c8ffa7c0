"""Inputs for the Triton kernels and the check of their results, for the interpreter and for a GPU alike."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import torch

from nbengine.kernels.penalise import IN_PROMPT
from nbengine.step_inputs import LayerCache, StepInputs

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # relative RMS error
MIXES = {
    "one decode": [(1, 63)],
    "one token": [(1, 1)],
    "decodes": [(1, 100), (1, 1), (1, 63), (1, 64), (1, 1000)],
    "a prompt": [(63, 63)],
    "a chunk after a prefix": [(17, 180)],
    "mixed": [(1, 63), (30, 30), (1, 700), (5, 64), (1, 1), (2, 130)],
}


class Random:
    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def order(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)


def step(rows: list[tuple[int, int]], block_size: int, random: Random) -> tuple[StepInputs, int]:
    """Rows of (queries, context) in shuffled blocks, and how many blocks the cache has; past its context a row names an unused one."""
    device = random.device
    needed = [-(-context // block_size) for _, context in rows]
    order = random.order(sum(needed) + 3).int()
    tables = order[-1].repeat(len(rows), max(needed) + 1)
    slots = []
    for row, ((count, context), own) in enumerate(zip(rows, order[: sum(needed)].split(needed), strict=True)):
        tables[row, : len(own)] = own
        positions = torch.arange(context - count, context, device=device)
        slots.append(own.long()[positions // block_size] * block_size + positions % block_size)
    counts, contexts = [count for count, _ in rows], [context for _, context in rows]
    total = sum(counts)
    inputs = StepInputs(
        tokens=torch.zeros(total, dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(context - count, context, device=device) for count, context in rows]),
        slots=torch.cat(slots),
        block_tables=tables.int(),
        query_starts=torch.tensor([0, *counts], device=device).cumsum(0).int(),
        context_lens=torch.tensor(contexts, device=device).int(),
        block_size=block_size,
        query_lens_host=counts,
        context_lens_host=contexts,
    )
    return inputs, sum(needed) + 3


def attention(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, block_size: int, random: Random, *, window: int | None = None
) -> tuple[torch.Tensor, LayerCache, StepInputs]:
    """Queries, a cache with NaN wherever no row may look, and the step."""
    inputs, blocks = step(rows, block_size, random)
    cache = LayerCache(
        *(torch.full((blocks, block_size, kv_heads, head_dim), float("nan"), dtype=random.dtype, device=random.device) for _ in "kv")
    )
    for row, (count, context) in enumerate(rows):
        seen = torch.arange(max(0, context - count + 1 - window) if window else 0, context, device=random.device)
        slots = inputs.block_tables[row].long()[seen // block_size] * block_size + seen % block_size
        for tensor in (cache.keys, cache.values):
            tensor.view(-1, kv_heads, head_dim)[slots] = random(len(seen), kv_heads, head_dim)
    return random(len(inputs.tokens), heads, head_dim) * 2, cache, inputs


def as_a_decode(inputs: StepInputs, token: int) -> StepInputs:
    """The step of one of a step's tokens alone, all before it being in the cache."""
    row = int(torch.searchsorted(inputs.query_starts, token, right=True)) - 1
    context = int(inputs.positions[token]) + 1
    return StepInputs(
        tokens=inputs.tokens[token : token + 1],
        positions=inputs.positions[token : token + 1],
        slots=inputs.slots[token : token + 1],
        block_tables=inputs.block_tables[row : row + 1],
        query_starts=torch.tensor([0, 1], device=inputs.query_starts.device).int(),
        context_lens=torch.tensor([context], device=inputs.context_lens.device).int(),
        block_size=inputs.block_size,
        query_lens_host=[1],
        context_lens_host=[context],
    )


def rope_store(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, random: Random, *, normed: bool, offset: float = 0.0
) -> tuple[Any, ...]:
    inputs, blocks = step([(tokens, tokens + 5)], 16, random)
    cache = LayerCache(
        *(torch.full((blocks, 16, kv_heads, head_dim), float("nan"), dtype=random.dtype, device=random.device) for _ in "kv")
    )
    angles = random(tokens, 1, rotary_dim // 2).float() * 3
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    norms = (random(head_dim), random(head_dim), 1e-2, offset) if normed else ()
    return (random(tokens, (heads + 2 * kv_heads) * head_dim), cache, inputs, cos, sin, *norms)


def broken_rows(random: Random, rows: int) -> list[torch.Tensor]:
    """What sampling is given when rows hold NaN, infinities, nothing allowed, two tokens, one token."""
    args = list(sampling(rows, 5000, random))
    args[0][0, 17] = float("nan")
    args[0][1, 4999] = float("inf")
    args[0][2] = float("-inf")
    args[0][3, :4998] = float("-inf")
    args[0][4, 1:] = float("-inf")
    args[2][3] = 50
    return args


def sampling(rows: int, vocab: int, random: Random, *, spread: float = 4.0, rounded: bool = False) -> tuple[torch.Tensor, ...]:
    """Rows with every kind of cut, greedy ones among them; rounded logits tie often."""
    logits = random(rows, vocab).float() * spread
    if rounded:
        logits = logits.round()

    def uniform() -> torch.Tensor:
        return torch.rand(rows, generator=random.generator, device=random.device)

    top_k = torch.randint(-30, 60, (rows,), generator=random.generator, device=random.device).clamp(min=0)
    top_p = (uniform() * 2).clamp(0.05, 1).double()
    min_p = ((uniform() - 0.7) * 0.5).clamp(min=0).double()
    seeds, positions = torch.randint(0, 1 << 40, (2, rows), generator=random.generator, device=random.device)
    return logits, (uniform() * 1.5 - 0.2).clamp(min=0), top_k, top_p, min_p, seeds - (1 << 39), positions


def penalties(rows: int, vocab: int, slots: int, random: Random) -> tuple[torch.Tensor, ...]:
    """Logits, counts of which some are of the prompt, the rows' slots (the first row has none, the others take turns), and rates."""
    counts = (random(slots, vocab).float() * 3).int().clamp(min=0)
    counts += IN_PROMPT * (random(slots, vocab) > 1).int()
    return random(rows, vocab).float() * 4, counts, torch.arange(rows, device=random.device) % (slots + 1) - 1, random(slots, 3).abs() + 0.5


def widened(value: Any) -> Any:
    """A copy with floating tensors in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, list | tuple):
        return type(value)(map(widened, value))
    if is_dataclass(value):
        return type(value)(**{f.name: widened(getattr(value, f.name)) for f in fields(value)})
    return copy.copy(value)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return [value.keys, value.values] if isinstance(value, LayerCache) else []


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Infinite where one is NaN and the other is not."""
    if got.shape != expected.shape or not torch.equal(got.isnan(), expected.isnan()):
        return float("inf")
    got, expected = got.double().nan_to_num(), expected.double().nan_to_num()
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30)) if got.numel() else 0.0


def error(op: str, args: tuple[Any, ...], kernel: Any = None) -> float:
    """Of what the kernel returns and of every argument afterwards, against the reference in float64."""
    module = import_module(f"nbengine.kernels.{op}")
    wide = widened(args)
    if op == "rope_store":  # rotations are float32 whatever the dtype
        wide = (*wide[:3], *args[3:5], *wide[5:])
    expected = tensors([getattr(module, f"{op}_reference")(*wide), *wide])
    with poisoned():
        result = (kernel or getattr(module, op))(*args)
    got = tensors([result, *args])
    assert len(got) == len(expected)
    assert all(tensor.is_contiguous() for tensor in tensors(result))
    return max(relative_rms(*pair) for pair in zip(got, expected, strict=True))


@contextmanager
def poisoned() -> Any:
    """New tensors are full of NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)

"""The cases that ops.py times: inputs in the shapes of an 8B and of a 0.6B model, and what must be moved or multiplied for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from nbengine.kernels.prepare_step import SampleInputs, packed_size
from nbengine.state_tables import StateTables
from nbengine.step_inputs import LayerCache, StepInputs

DTYPE = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else torch.float16
COLD = 300 << 20  # bytes of inputs that are gone through before any is met again
INVARIANT = "_invariant"


@dataclass
class Case:
    """Arguments are made as they are needed: a case that is not asked for costs nothing."""

    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]
    size: int  # bytes that the arguments take
    work: float  # bytes that must be moved, or operations
    unit: str = "B/s"

    def arguments(self) -> list[tuple[Any, ...]]:
        """Enough of them, as many as the calls go through in turn, that the card's cache does not help."""
        return [self.make() for _ in range(max(2, min(-(-COLD // self.size), 64)))]

    @property
    def kernel(self) -> Callable[..., Any]:
        return self.named(self.op)

    @property
    def usual(self) -> Callable[..., Any] | None:
        """What the engine runs instead unless deterministic=True, where the case is of a kernel for that."""
        return self.named(self.op.removesuffix(INVARIANT)) if self.op.endswith(INVARIANT) else None

    @property
    def reference(self) -> Callable[..., Any]:
        return self.named(self.op.removesuffix(INVARIANT) + "_reference")

    def named(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(f"nbengine.kernels.{self.op.removesuffix(INVARIANT)}"), name)
        return found


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def norms_and_gates() -> Iterator[Case]:
    for rows, width in ((1, 4096), (256, 4096), (8192, 1024), (8192, 4096)):
        size = rows * width * 2
        yield Case("rms_norm", f"{rows} x {width}", lambda: (random(rows, width), random(width), 1e-6), size, 2 * size)  # noqa: B023
        with_residual = lambda: (random(rows, width), random(width), 1e-6, 0.0, random(rows, width))  # noqa: B023, E731
        yield Case("rms_norm", f"{rows} x {width} + residual", with_residual, 2 * size, 4 * size)
    for rows, width in ((1, 14336), (256, 14336), (8192, 3072), (8192, 14336)):
        size = rows * width * 2
        yield Case("gated", f"{rows} x {width} silu", lambda: (random(rows, 2 * width), "silu"), 2 * size, 3 * size)  # noqa: B023


def products() -> Iterator[Case]:
    shapes = {"8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate and up": (28672, 4096), "8B down": (4096, 14336)}
    shapes |= {"8B head": (128256, 4096), "0.6B qkv": (4096, 1024), "0.6B gate and up": (6144, 1024), "0.6B down": (1024, 3072)}
    for name, (outs, width) in shapes.items():
        size = outs * width * 2
        for rows in (1, 2, 4, 8, 16, 32, 64):
            work = size + rows * (width + outs) * 2
            make = lambda: (random(rows, width), random(outs, width))  # noqa: B023, E731
            yield Case("linear", f"{rows} x {width} -> {outs} ({name})", make, size, work)
            if rows in {1, 64}:
                yield Case("linear_invariant", f"{rows} x {width} -> {outs} ({name})", make, size, work)
        if name in {"8B qkv", "8B gate and up"}:
            rows = 4096
            make = lambda: (random(rows, width), random(outs, width))  # noqa: B023, E731
            yield Case("linear_invariant", f"{rows} x {width} -> {outs} ({name})", make, size, 2 * rows * width * outs, "FLOP/s")


def step(rows: list[tuple[int, int]], block_size: int = 16) -> tuple[StepInputs, int]:
    """Rows of (queries, context) whose blocks lie in random order."""
    needed = [-(-context // block_size) for _, context in rows]
    order = torch.randperm(sum(needed), device="cuda").int()
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32, device="cuda")
    for row, own in enumerate(order.split(needed)):
        tables[row, : len(own)] = own
    counts, contexts = [count for count, _ in rows], [context for _, context in rows]
    positions = torch.cat([torch.arange(context - count, context, device="cuda") for count, context in rows])
    owners = torch.repeat_interleave(torch.arange(len(rows), device="cuda"), torch.tensor(counts, device="cuda"))
    inputs = StepInputs(
        tokens=torch.zeros(sum(counts), dtype=torch.int64, device="cuda"),
        positions=positions,
        slots=tables[owners, positions // block_size].long() * block_size + positions % block_size,
        block_tables=tables,
        query_starts=torch.tensor([0, *counts], device="cuda").cumsum(0).int(),
        context_lens=torch.tensor(contexts, device="cuda").int(),
        block_size=block_size,
        query_lens_host=counts,
        context_lens_host=contexts,
    )
    return inputs, sum(needed)


def rotations() -> Iterator[Case]:
    for tokens in (1, 256, 8192):
        inputs, blocks = step([(tokens, tokens)])
        cos, sin = torch.randn(2, tokens, 1, 128, device="cuda")
        norms = random(128), random(128)
        size = tokens * 48 * 128 * 2
        make = lambda: (random(tokens, 6144), LayerCache(*random(2, blocks, 16, 8, 128)), inputs, cos, sin, *norms)  # noqa: B023, E731
        yield Case("rope_store", f"{tokens} tokens, 32 + 8 heads of 128", make, size, 2 * size + 2 * tokens * 128 * 4)


def attention() -> Iterator[Case]:
    decodes = {
        "1 x 500": [500], "1 x 2,000": [2000], "1 x 30,000": [30000], "8 x 2,000": [2000] * 8, "8 x 16,000": [16000] * 8,
        "32 x 2,000": [2000] * 32, "64 x 200 to 4,000": [200 + 60 * i for i in range(64)], "256 x 700": [700] * 256, "256 x 2,000": [2000] * 256,
    }  # fmt: skip
    for name, contexts in decodes.items():
        inputs, blocks = step([(1, context) for context in contexts])
        size = sum(contexts) * 2 * 8 * 128 * 2
        make = lambda: (random(len(contexts), 32, 128), LayerCache(*random(2, blocks, 16, 8, 128)), inputs, 0.09)  # noqa: B023, E731
        for op in ("paged_attention", "paged_attention_invariant"):
            yield Case(op, f"decode {name}, 32 / 8 heads of 128", make, size, size + len(contexts) * 2 * 32 * 128 * 2)
    prefills = {
        "8,192": [(8192, 8192)],
        "16 x 512": [(512, 512)] * 16,
        "2 x 1,000 after 3,000": [(1000, 4000)] * 2,
        "2,048": [(2048, 2048)],
    }
    for head_dim, heads in ((128, 32), (64, 32), (256, 8)):
        for name, rows in prefills.items():
            if head_dim != 128 and name != "8,192":
                continue
            inputs, blocks = step(rows)
            shapes = (len(inputs.tokens), heads, head_dim), (2, blocks, 16, 8, head_dim)
            make = lambda: (random(*shapes[0]), LayerCache(*random(*shapes[1])), inputs, head_dim**-0.5)  # noqa: B023, E731
            pairs = sum(count * (context - count) + count * (count + 1) / 2 for count, context in rows)
            work = 4 * heads * head_dim * pairs
            for op in ("paged_attention", "paged_attention_invariant"):
                yield Case(op, f"prefill {name}, {heads} / 8 heads of {head_dim}", make, COLD, work, "FLOP/s")


def draws() -> Iterator[Case]:
    for rows in (1, 32, 256):
        for name, (temperature, top_k, top_p, min_p) in {
            "greedy": (0, 0, 1, 0), "plain": (1, 0, 1, 0), "top-p 0.9": (1, 0, 0.9, 0), "top-k 20, top-p 0.95": (0.6, 20, 0.95, 0),
            "min-p 0.1": (1, 0, 1, 0.1),
        }.items():  # fmt: skip
            numbers = (
                torch.full((rows,), temperature, dtype=torch.float32, device="cuda"),
                torch.full((rows,), top_k, dtype=torch.int64, device="cuda"),
                torch.full((rows,), top_p, dtype=torch.float64, device="cuda"),
                torch.full((rows,), min_p, dtype=torch.float64, device="cuda"),
            )
            seeds = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda")
            size = rows * 151936 * 4
            make = lambda: (torch.randn(rows, 151936, device="cuda") * 3, *numbers, *seeds)  # noqa: B023, E731
            yield Case("sample", f"{rows} x 151,936 {name}", make, size, size)


def penalties() -> Iterator[Case]:
    for rows in (1, 32, 256):
        size = rows * 151936 * 8

        def make(rows: int = rows) -> tuple[Any, ...]:
            counts = torch.randint(-8, 3, (rows, 151936), device="cuda").clamp_(min=0).int()
            rates = torch.tensor([[1.2, 0.1, 0.1]], device="cuda").expand(rows, 3).contiguous()
            return torch.randn(rows, 151936, device="cuda") * 3, counts, torch.arange(rows, device="cuda"), rates

        yield Case("penalise", f"{rows} x 151,936", make, size, size + size // 2)


def around_a_step() -> Iterator[Case]:
    """What a step of 2,000 tokens' context begins and ends with; so little is moved that a launch takes longer than that."""
    blocks = 125
    for rows, count in ((1, 1), (256, 1), (4, 2000)):
        tokens, size = rows * count, packed_size(rows, rows * count, rows)

        def make(rows: int = rows, count: int = count, tokens: int = tokens, size: int = size) -> tuple[Any, ...]:
            part = torch.arange(rows, dtype=torch.int32)
            packed = torch.zeros(size, dtype=torch.int32)
            packed[:3] = torch.tensor([rows, tokens, rows])
            places = part, torch.full((rows,), 16 * blocks - count), torch.arange(rows + 1) * count, part, part, torch.full((tokens,), -1)
            packed[8:] = torch.cat(places)
            tables = StateTables(rows, 2 * blocks, torch.device("cuda"))
            for table in (tables.blocks, tables.newest, tables.parameters):
                table.random_(1 << 16)
            ids, of_rows = (
                torch.zeros(3, tokens, dtype=torch.int64, device="cuda"),
                torch.zeros(2, rows + 1, dtype=torch.int32, device="cuda"),
            )
            inputs = StepInputs(
                tokens=ids[0], positions=ids[1], slots=ids[2], block_tables=torch.zeros(rows, blocks, dtype=torch.int32, device="cuda"),
                query_starts=of_rows[0], context_lens=of_rows[1, :rows], block_size=16, query_lens_host=[], context_lens_host=[],
            )  # fmt: skip
            return packed.cuda(), tables, inputs, SampleInputs.empty(rows, torch.device("cuda"))

        moved = 4 * size + rows * (8 * blocks + 112) + 24 * tokens
        yield Case("prepare_step", f"{rows} rows of {count} tokens, {blocks} blocks each", make, moved, moved)
    for rows, writes in ((0, 16), (64, 2048)):

        def update(rows: int = rows, writes: int = writes) -> tuple[Any, ...]:
            packed = torch.randint(1 << 20, (10 * rows + 3 * writes,), dtype=torch.int32)
            packed[: 10 * rows].view(rows, 10)[:, 0] = torch.arange(rows)
            written = packed[10 * rows :].view(writes, 3)
            written[:, 0], written[:, 1] = torch.arange(writes) % 256, torch.arange(writes) // 256
            step = torch.tensor([0, 0, 0, rows, writes, 0, 0, 0], dtype=torch.int32, device="cuda")
            return step, packed.cuda(), StateTables(256, 2 * blocks, torch.device("cuda")), max(rows, writes)

        moved = 80 * rows + 16 * writes
        yield Case("update_tables", f"{rows} new rows, {writes} blocks", update, moved, moved)
    for rows in (1, 256):

        def keep(rows: int = rows) -> tuple[Any, ...]:
            some = torch.arange(rows, device="cuda")
            return torch.randint(151936, (rows,), device="cuda"), some, some.clone(), torch.zeros(rows, 151936, device="cuda").int(), some

        yield Case("keep_drawn", f"{rows} rows, counted", keep, 4 * 151936 * rows, 40 * rows)


def copies() -> Iterator[Case]:
    for layers, count in ((32, 1), (32, 64)):

        def make(layers: int = layers, count: int = count) -> tuple[Any, ...]:
            caches = [LayerCache(*random(2, 2 * count, 16, 8, 128)) for _ in range(layers)]
            return caches, torch.randperm(2 * count, device="cuda").view(count, 2).int()

        block = layers * count * 2 * 16 * 8 * 128 * 2
        yield Case("copy_blocks", f"{count} blocks of {layers} layers", make, 2 * block, 2 * block)


CASES: dict[Callable[[], Iterator[Case]], tuple[str, ...]] = {  # with the ops that they are of
    norms_and_gates: ("rms_norm", "gated"),
    products: ("linear", "linear_invariant"),
    rotations: ("rope_store",),
    attention: ("paged_attention", "paged_attention_invariant"),
    penalties: ("penalise",),
    draws: ("sample",),
    around_a_step: ("prepare_step", "update_tables", "keep_drawn"),
    copies: ("copy_blocks",),
}
OPS = [op for ops in CASES.values() for op in ops]

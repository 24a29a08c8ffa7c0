"""What the Triton kernels reach of the card they run on: `python benchmarks/ops.py [--only linear,sample] [--out FILE]`.

The card's copy bandwidth and matrix rate are measured first, in the same process. A case is timed only after the kernel agreed
with its reference on the case's own inputs. Calls are timed as replays of a CUDA graph, over as many different inputs as it takes
to have nothing left in the card's cache. Each run is added to benchmarks/results/kernels.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton

from nbengine.ops import OP_NAMES
from nbengine.step_inputs import LayerCache, StepInputs

RESULTS = Path(__file__).parent / "results" / "kernels.json"
DTYPE = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) else torch.float16
BOUND = 1.5e-2  # relative RMS difference from the reference, in 16 bits
WARM = 0.1  # seconds
ROUNDS = 15  # of which the median is taken
COLD = 300 << 20  # bytes of inputs that are gone through before any is met again


@dataclass
class Case:
    op: str
    name: str
    args: list[tuple[Any, ...]]  # what the calls go through in turn; they differ in what takes memory
    work: float  # bytes that must be moved, or operations
    unit: str = "B/s"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def several(size: int, make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Enough arguments of `size` bytes each that the card's cache does not help."""
    return [make() for _ in range(max(2, min(-(-COLD // size), 64)))]


def norms_and_gates() -> Iterator[Case]:
    for rows, width in ((1, 4096), (256, 4096), (8192, 1024), (8192, 4096)):
        size, weight = rows * width * 2, random(width)
        yield Case("rms_norm", f"{rows} x {width}", several(size, lambda: (random(rows, width), weight, 1e-6)), 2 * size)  # noqa: B023
        arguments = several(2 * size, lambda: (random(rows, width), weight, 1e-6, 0.0, random(rows, width)))  # noqa: B023
        yield Case("rms_norm", f"{rows} x {width} + residual", arguments, 4 * size)
    for rows, width in ((1, 14336), (256, 14336), (8192, 3072), (8192, 14336)):
        size = rows * width * 2
        yield Case("gated", f"{rows} x {width} silu", several(2 * size, lambda: (random(rows, 2 * width), "silu")), 3 * size)  # noqa: B023


def products() -> Iterator[Case]:
    shapes = {"8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate and up": (28672, 4096), "8B down": (4096, 14336)}
    shapes |= {"8B head": (128256, 4096), "0.6B qkv": (4096, 1024), "0.6B gate and up": (6144, 1024), "0.6B down": (1024, 3072)}
    for name, (outs, width) in shapes.items():
        for rows in (1, 2, 4, 8, 16, 32, 64):
            size = outs * width * 2
            arguments = several(size, lambda: (random(rows, width), random(outs, width)))  # noqa: B023
            yield Case("linear", f"{rows} x {width} -> {outs} ({name})", arguments, size + rows * (width + outs) * 2)


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
        arguments = several(
            size,
            lambda: (random(tokens, 6144), LayerCache(random(blocks, 16, 8, 128), random(blocks, 16, 8, 128)), inputs, cos, sin, *norms),  # noqa: B023
        )
        yield Case("rope_store", f"{tokens} tokens, 32 + 8 heads of 128", arguments, 2 * size + 2 * tokens * 128 * 4)


def attention() -> Iterator[Case]:
    decodes = {
        "1 x 500": [500], "1 x 2,000": [2000], "1 x 30,000": [30000], "8 x 2,000": [2000] * 8, "8 x 16,000": [16000] * 8,
        "32 x 2,000": [2000] * 32, "64 x 200 to 4,000": [200 + 60 * i for i in range(64)], "256 x 700": [700] * 256, "256 x 2,000": [2000] * 256,
    }  # fmt: skip
    for name, contexts in decodes.items():
        inputs, blocks = step([(1, context) for context in contexts])
        size = sum(contexts) * 2 * 8 * 128 * 2
        arguments = several(
            size,
            lambda: (random(len(contexts), 32, 128), LayerCache(random(blocks, 16, 8, 128), random(blocks, 16, 8, 128)), inputs, 0.09),  # noqa: B023
        )
        yield Case("paged_attention", f"decode {name}, 32 / 8 heads of 128", arguments, size + len(contexts) * 2 * 32 * 128 * 2)
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
            args = random(len(inputs.tokens), heads, head_dim), LayerCache(*random(2, blocks, 16, 8, head_dim)), inputs, head_dim**-0.5
            pairs = sum(count * (context - count) + count * (count + 1) / 2 for count, context in rows)
            yield Case(
                "paged_attention", f"prefill {name}, {heads} / 8 heads of {head_dim}", [args], 4 * heads * head_dim * pairs, "FLOP/s"
            )


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
            arguments = several(size, lambda: (torch.randn(rows, 151936, device="cuda") * 3, *numbers, *seeds))  # noqa: B023
            yield Case("sample", f"{rows} x 151,936 {name}", arguments, size)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "norms": norms_and_gates, "products": products, "rotations": rotations, "attention": attention, "draws": draws,
}  # fmt: skip


def seconds(calls: list[Callable[[], Any]]) -> float:
    """The median time of a call in replays of a graph of them all, once the card has been at it for a tenth of a second."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    taken = [0.0]
    while sum(taken) < WARM or len(taken) < ROUNDS:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken[-ROUNDS:]) / len(calls)


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, counted as read and as written, and operations a second of a large product."""
    a, b = random(8192, 8192), random(8192, 8192)
    product = 2 * 8192**3 / seconds([lambda: a @ b] * 8)
    source = torch.randn(1 << 30, device="cuda", dtype=DTYPE)
    target = torch.empty_like(source)
    return {"B/s": 2 * source.nbytes / seconds([lambda: torch.add(source, 1, out=target)] * 8), "FLOP/s": product}


def difference(case: Case) -> float:
    """Largest relative RMS difference between the kernel's and the reference's result, and between what they wrote."""
    module = import_module(f"nbengine.kernels.{case.op}")
    args = case.args[0]
    others = tuple(copy.deepcopy(arg) if isinstance(arg, torch.Tensor | LayerCache) else arg for arg in args)
    pairs = list(
        zip(
            tensors([getattr(module, case.op)(*args), *args]),
            tensors([getattr(module, f"{case.op}_reference")(*others), *others]),
            strict=True,
        )
    )
    if case.op == "sample":
        got, expected = pairs[0]
        return float((got != expected).double().mean())
    return max(float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)) for got, expected in pairs)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return [value.keys, value.values] if isinstance(value, LayerCache) else []


def measure(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    error = difference(case)
    if not error <= BOUND:
        raise SystemExit(f"{case.op}, {case.name}: differs from its reference by {error:.3g}, allowed {BOUND:g}; nothing is reported")
    op = getattr(import_module(f"nbengine.kernels.{case.op}"), case.op)
    repeat = max(1, 8 // len(case.args))
    taken = seconds([lambda args=args: op(*args) for args in case.args] * repeat)
    rate = case.work / taken
    row = {
        "op": case.op,
        "case": case.name,
        "us": round(taken * 1e6, 2),
        "rate": f"{rate / 1e12:.3f} T{case.unit}",
        "share": round(rate / limits[case.unit], 3),
    }
    print(f"{row['op']:16} {row['case']:52} {row['us']:>9} us {row['rate']:>18} {row['share']:>7.1%}", flush=True)
    return row


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(CASES), help=f"some of {', '.join(CASES)}; an op's name stands for its own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=commit(), help="where git cannot say")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/ops.py needs an NVIDIA GPU; this torch sees none")
    wanted = options.only.split(",")
    unknown = [name for name in wanted if name not in {*CASES, *OP_NAMES}]
    if unknown:
        sys.exit(f"no cases are called {', '.join(unknown)}; choose among {', '.join((*CASES, *OP_NAMES))}")
    limits = ceilings()
    torch.cuda.empty_cache()
    machine = {
        "card": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(DTYPE)[6:],
        "commit": options.commit,
        "copy_TB_s": round(limits["B/s"] / 1e12, 3),
        "matmul_TFLOP_s": round(limits["FLOP/s"] / 1e12, 1),
    }
    print(machine)
    rows = []
    for name, make in CASES.items():
        for case in make():
            if name in wanted or case.op in wanted:
                rows.append(measure(case, limits))
            del case
            torch.cuda.empty_cache()  # the next case's memory is laid out anew
    runs = json.loads(options.out.read_text()) if options.out.exists() else []
    options.out.write_text(json.dumps([*runs, {"machine": machine, "rows": rows}], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the Triton kernels reach of the card they run on: `python benchmarks/ops.py [--only linear,sample] [--cases "8B o"] [--out FILE]`.

The card's copy bandwidth and matrix rate are measured first, in the same process. A case is timed only after the kernel agreed
with its reference on the case's own inputs. Calls are timed as replays of a CUDA graph, over as many different inputs as it takes
to have nothing left in the card's cache. A kernel of deterministic=True is timed beside the usual one on the same inputs. Each run
is added to benchmarks/results/kernels.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from ops_cases import CASES, DTYPE, OPS, Case, random

from nbengine.state_tables import StateTables

RESULTS = Path(__file__).parent / "results" / "kernels.json"
BOUND = 1.5e-2  # relative RMS difference from the reference, in 16 bits
WARM = 0.1  # seconds
ROUNDS = 15  # of which the median is taken
LONG = 1e-3  # seconds that a graph takes at least: its own start is not to count


def seconds(calls: list[Callable[[], Any]]) -> float:
    """The median time of a call in replays of a graph of them all, once the card has been at it for a tenth of a second."""
    for call in calls[:2]:
        call()
    calls = calls * math.ceil(LONG / max(_replay(_captured(calls)), LONG / 1000))
    graph = _captured(calls)
    taken = [0.0]
    while sum(taken) < WARM or len(taken) < ROUNDS:
        taken.append(_replay(graph))
    return statistics.median(taken[-ROUNDS:]) / len(calls)


def _captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, counted as read and as written, and operations a second of a large product."""
    a, b = random(8192, 8192), random(8192, 8192)
    product = 2 * 8192**3 / seconds([lambda: a @ b] * 8)
    source = torch.randn(1 << 30, device="cuda", dtype=DTYPE)
    target = torch.empty_like(source)
    return {"B/s": 2 * source.nbytes / seconds([lambda: torch.add(source, 1, out=target)] * 8), "FLOP/s": product}


def difference(case: Case, args: tuple[Any, ...]) -> float:
    """Largest relative RMS difference between the kernel's and the reference's result, and between what they wrote.

    Of whole numbers, which must be the same, infinite if they are not; but of draws, which a last bit may decide, the share that differs.
    """
    others = copy.deepcopy(args)
    pairs = list(zip(tensors([case.kernel(*args), *args]), tensors([case.reference(*others), *others]), strict=True))
    if case.op == "sample":
        got, expected = pairs[0]
        return float((got != expected).double().mean())
    return float(torch.tensor([_unlike(got, expected) for got, expected in pairs]).max())  # NaN if one is


def _unlike(got: torch.Tensor, expected: torch.Tensor) -> float:
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, expected) else math.inf
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors(part)]
    if isinstance(value, StateTables):
        return tensors(list(vars(value).values()))
    return tensors([getattr(value, field.name) for field in fields(value)]) if is_dataclass(value) else []


def measure(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    arguments = case.arguments()
    error = difference(case, arguments[0])
    if not error <= BOUND:
        raise SystemExit(f"{case.op}, {case.name}: differs from its reference by {error:.3g}, allowed {BOUND:g}; nothing is reported")
    taken = seconds([lambda args=args: case.kernel(*args) for args in arguments])
    rate = case.work / taken
    row = {
        "op": case.op,
        "case": case.name,
        "us": round(taken * 1e6, 2),
        "rate": f"{rate / 1e12:.3f} T{case.unit}",
        "share": round(rate / limits[case.unit], 3),
    }
    beside = ""
    if (usual := case.usual) is not None:
        row["usual_us"] = round(seconds([lambda args=args: usual(*args) for args in arguments]) * 1e6, 2)
        row["of_usual"] = round(row["us"] / row["usual_us"], 3)
        beside = f"   {row['of_usual']:.2f} times the usual {row['usual_us']} us"
    print(f"{row['op']:26} {row['case']:52} {row['us']:>9} us {row['rate']:>18} {row['share']:>7.1%}{beside}", flush=True)
    return row


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(OPS), help=f"some of {', '.join(OPS)}")
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=commit(), help="where git cannot say")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/ops.py needs an NVIDIA GPU; this torch sees none")
    wanted = options.only.split(",")
    unknown = [name for name in wanted if name not in OPS]
    if unknown:
        sys.exit(f"no cases are of {', '.join(unknown)}; choose among {', '.join(OPS)}")
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
    for make, ops in CASES.items():
        for case in make() if {*ops} & {*wanted} else ():
            if case.op in wanted and options.cases in case.name:
                rows.append(measure(case, limits))
                torch.cuda.empty_cache()  # the next case's memory is laid out anew
    if not rows:
        sys.exit(f"no case of {', '.join(wanted)} has {options.cases!r} in its name")
    runs = json.loads(options.out.read_text()) if options.out.exists() else []
    options.out.write_text(json.dumps([*runs, {"machine": machine, "rows": rows}], indent=1) + "\n")


if __name__ == "__main__":
    main()

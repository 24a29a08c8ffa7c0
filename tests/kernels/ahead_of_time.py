"""Compiles every launch that the wrappers make of given calls, for cards that are not there, and reports what the code needs.

Run as a program (`python ahead_of_time.py 80 90`), since Triton's interpreter and its compiler cannot share a process; one JSON
object a line. Registers and stack come from cuobjdump, which Triton brings.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nbengine.kernels import _triton
from nbengine.kernels.prepare_step import SampleInputs
from nbengine.ops import OP_NAMES
from nbengine.state_tables import StateTables
from nbengine.step_inputs import LayerCache, StepInputs

SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Recorder:
    """Stands where a kernel does, and keeps what it is launched with."""

    def __init__(self, kernel: _triton.Kernel) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def compiled(kernel: _triton.Kernel, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> dict[str, Any]:
    """What a launch would compile on a card of this capability."""
    jitted = kernel.jitted
    options = {key: kwargs[key] for key in ("num_warps", "num_stages", "launch_pdl") if key in kwargs}
    values = dict(zip([p.name for p in jitted.params], args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(jitted.params):
        value = values.get(parameter.name, parameter.default)
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(jitted, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    before, waits, _ = done.asm["ptx"].partition("griddepcontrol.wait")
    holds = {"wgmma": "wgmma" in done.asm["ptx"], "follows": bool(waits), "loads_before": before.count("ld.global")}
    return {"kernel": jitted.__name__, "sm": capability, **found, "shared": done.metadata.shared, **holds}


def attention_step(rows: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Any, ...]:
    counts, contexts = [count for count, _ in rows], [context for _, context in rows]
    cache = LayerCache(*torch.zeros(2, 8, 16, kv_heads, head_dim, dtype=dtype))
    total = sum(counts)
    inputs = StepInputs(
        tokens=torch.zeros(total, dtype=torch.int64),
        positions=torch.zeros(total, dtype=torch.int64),
        slots=torch.zeros(total, dtype=torch.int64),
        block_tables=torch.zeros(len(rows), 8, dtype=torch.int32),
        query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
        context_lens=torch.tensor(contexts).int(),
        block_size=16,
        query_lens_host=counts,
        context_lens_host=contexts,
    )
    return torch.zeros(total, heads, head_dim, dtype=dtype), cache, inputs


def calls(dtype: torch.dtype, *, every: bool) -> list[tuple[str, tuple[Any, ...]]]:
    """Op and arguments, in the shapes of an 8B model and of smaller ones."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    found: list[tuple[str, tuple[Any, ...]]] = [
        ("rms_norm", (zeros(2, 4096), zeros(4096), 1e-6, 0.0, zeros(2, 4096))),
        ("rms_norm", (zeros(200, 1024), zeros(1024), 1e-6)),
        *(("gated", (zeros(2, 28672), activation)) for activation in ("silu", "gelu", "gelu_tanh")),
    ]
    for head_dim in (64, 80, 96, 128, 256) if every else (128,):
        step = attention_step([(1, 50), (40, 60)], 32, 8, head_dim, dtype)
        cos = torch.zeros(41, 1, head_dim)
        norms = (zeros(head_dim), zeros(head_dim)) if head_dim == 128 else ()
        found.append(("rope_store", (zeros(41, 48 * head_dim), step[1], step[2], cos, cos, *norms)))
        found.extend((op, (*step, 0.1)) for op in ("paged_attention", "paged_attention_invariant"))
        if every:
            step = attention_step([(1, 50), (40, 60)], 14, 2, head_dim, dtype)
            found.extend((op, (*step, 0.1, 40, 30.0)) for op in ("paged_attention", "paged_attention_invariant"))
    alone = [(1, width, 1024) for width in (1000, 1536, 2048, 14336, 20000)]
    for rows, width, outs in ((1, 4096, 6144), (2, 4096, 4096), (7, 4096, 1024), (16, 14336, 4096), *alone):
        found.extend((op, (zeros(rows, width), zeros(outs, width), zeros(outs))) for op in ("linear", "linear_invariant"))
    ones = torch.ones(4)
    found.append(("sample", (torch.zeros(4, 150000), ones, ones.long(), ones, ones, ones.long(), ones.long())))
    found.append(("copy_blocks", ([step[1]], torch.zeros(3, 2, dtype=torch.int32))))
    return found + around_a_step()


def around_a_step() -> list[tuple[str, tuple[Any, ...]]]:
    """What is launched before and after the layers, which no dtype of the model decides."""
    tables = StateTables(256, 2560, torch.device("cpu"))
    packed = torch.zeros(10_000, dtype=torch.int32)
    found: list[tuple[str, tuple[Any, ...]]] = [("update_tables", (packed, packed, tables, 300))]
    for rows, tokens, lengths in ((256, 256, False), (5, 900, True)):
        ids, of_rows = torch.zeros(tokens, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
        inputs = StepInputs(
            tokens=ids, positions=ids, slots=ids, block_tables=torch.zeros(rows, 2560, dtype=torch.int32), query_starts=of_rows,
            context_lens=of_rows, block_size=16, query_lens_host=[], context_lens_host=[], lengths=ids if lengths else None,
        )  # fmt: skip
        found.append(("prepare_step", (packed, tables, inputs, SampleInputs.empty(rows, torch.device("cpu")))))
    ids, counts = torch.zeros(63, dtype=torch.int64), torch.zeros(8, 150000, dtype=torch.int32)
    found.append(("penalise", (torch.zeros(63, 150000), counts, ids, torch.zeros(8, 3))))
    found.extend(("keep_drawn", (ids, ids, ids, *counted)) for counted in ((), (counts, ids)))
    return found


def main(capabilities: list[int], dtypes: list[torch.dtype], *, every: bool, only: list[str]) -> None:
    modules = {name: import_module(f"nbengine.kernels.{name}") for name in OP_NAMES}
    recorders = []
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if isinstance(value, _triton.Kernel) and name.endswith("_kernel"):
                setattr(module, name, recorder := Recorder(value))
                recorders.append(recorder)
    for capability in capabilities:
        for name in ("paged_attention", "linear"):
            setattr(modules[name], "shared_memory", lambda device, capability=capability: SHARED_MEMORY[capability])  # noqa: B010 - of a module
        for module in modules.values():
            if hasattr(module, "chained"):
                module.chained = lambda device, capability=capability: {"following": True, "launch_pdl": True} if capability >= 90 else {}
        for dtype in dtypes:
            if dtype is torch.bfloat16 and capability < 80:
                continue
            for op, args in calls(dtype, every=every):
                if only and op not in only:
                    continue
                getattr(modules[op.removesuffix("_invariant")], op)(*args)
                for recorder in recorders:
                    for launch in recorder.launches:
                        report = compiled(recorder.kernel, *launch, capability) | {"op": op, "dtype": str(dtype)[6:]}
                        report["head_dim"] = launch[1].get("head_dim")
                        print(json.dumps(report), flush=True)
                    recorder.launches.clear()


if __name__ == "__main__":
    names = {str(dtype)[6:]: dtype for dtype in TYPES}
    words = sys.argv[1:]
    main(
        [int(word) for word in words if word.isdigit()],
        [names[word] for word in words if word in names] or [torch.float16],
        every="every" in words,
        only=[word for word in words if word.removesuffix("_invariant") in OP_NAMES],
    )

"""What each optimisation is worth, and what determinism costs: the same cells with one option changed at a time."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nbengine.bench.measure import Settings, best, opened
from nbengine.bench.results import Results, say, table
from nbengine.config import EngineConfig
from nbengine.ops import Ops

OFF: dict[str, Any] = {  # option: value
    "overlap": False,
    "cuda_graphs": False,
    "run_ahead_ms": 0.0,
    "enable_prefix_caching": False,
    "trace_steps": 0,
}
COSTS: dict[str, Any] = {"deterministic": True}  # what is off otherwise, for it makes slower
ALL_ON = "all on"


def switches(settings: Settings, ops: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Engine options by what they turn off: whatever this engine has an option for, each kernel, and everything together; then what costs."""
    known = {field.name for field in fields(EngineConfig)}
    options = {name: value for name, value in OFF.items() if name in known}
    kernels = [name for name, kind in Ops.default(settings.device).in_use().items() if kind == "triton"]
    chosen = kernels if ops is None else [name for name in ops if name in kernels]
    together: dict[str, Any] = {**options, **({"ops": dict.fromkeys(kernels, "reference")} if kernels else {})}
    return {
        **{f"{name}={value}": {name: value} for name, value in options.items()},
        **{f"{name} by its reference": {"ops": {name: "reference"}} for name in chosen},
        "all off": together,
        **({f"{name}={value}, a cost": {name: value} for name, value in COSTS.items()} if settings.device.type == "cuda" else {}),
    }


def measure(
    models: list[str], workloads: list[str], settings: Settings, results: Results, ops: list[str] | None = None, only: str = ""
) -> list[dict[str, Any]]:
    """Everything on first and, to see how much two equal runs differ, last; in between what has `only` in its label."""
    changed = {label: options for label, options in switches(settings, ops).items() if only in label}
    rows: list[dict[str, Any]] = []
    for model in models:
        base: dict[str, float] = {}
        for label, options in [(ALL_ON, {}), *changed.items(), (f"{ALL_ON}, again", {})]:
            if not settings.allows(f"{label} on {model}"):
                continue
            try:
                reached = _reached(model, workloads, settings, options)
            except Exception as error:  # noqa: BLE001 - a reference may need more memory than there is; the others are still worth measuring
                say(f"{model}, {label}: failed with {type(error).__name__}: {error}")
                rows.append(results.add("switch", {"model": model, "switch": label, "error": f"{type(error).__name__}: {error}"}))
                continue
            for name, rate in reached.items():
                if label == ALL_ON:
                    base[name] = rate
                faster = base[name] / rate if name in base else None  # everything on may have failed
                row = {"model": model, "workload": name, "switch": label, "tok_s": rate, "all_on_is_faster_by": faster}
                rows.append(results.add("switch", row))
                say(f"{model} {name}, {label}: {rate:,.0f} tok/s")
    shown = [
        (f"{row['model']} {row.get('workload', '')}", row["switch"], row.get("tok_s", "failed"), row.get("all_on_is_faster_by"))
        for row in rows
    ]
    table("one option changed at a time", ("cell", "changed", "tok/s", "all on is faster by"), shown)
    return rows


def _reached(model: str, workloads: list[str], settings: Settings, options: dict[str, Any]) -> dict[str, float]:
    with opened(model, settings, **{**settings.config, **options}) as (llm, _):
        return {name: best(llm, name, settings)[0].rate for name in workloads}

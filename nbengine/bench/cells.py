"""The twelve cells: each model and workload through `LLM.generate`, beside vLLM's recorded figure and the hardware's limit."""

from __future__ import annotations

from typing import Any

from nbengine.bench.limits import Card, limit
from nbengine.bench.measure import Opening, Run, Settings, best, opened
from nbengine.bench.peers import Peer
from nbengine.bench.recorded import PROVENANCE, RECORDED
from nbengine.bench.results import Results, say, table
from nbengine.bench.shapes import shape
from nbengine.bench.workloads import lengths

COLUMNS = ("cell", "tok/s", "vLLM", "ratio", "scaled", "of limit", "here", "goal", "reached", "steps", "ready s", "first s")


def measure(
    models: list[str], workloads: list[str], settings: Settings, results: Results, card: Card, peers: list[Peer] | None = None
) -> list[dict[str, Any]]:
    """Every cell, then every peer on the same cells; an engine serves all cells of its model."""
    rows = []
    for model in models:
        if settings.allows(model):
            with opened(model, settings) as (llm, opening):
                for name in workloads:
                    if settings.allows(f"{model} {name}"):
                        run, runs = best(llm, name, settings)
                        row = results.add("cell", cell(model, name, run, runs, opening, card, quick=settings.quick))
                        say(f"{model} {name}: {run.rate:,.0f} tok/s in {run.seconds:.2f} s, {run.steps} steps")
                        rows.append(row)
        for peer in peers or []:
            if settings.allows(f"{peer.name} on {model}"):
                peer.measure(model, workloads, settings, results)
    show(rows)
    show_peers([row for row in results.rows if row["kind"] == "peer"], rows)
    return rows


def cell(model: str, name: str, run: Run, runs: list[Run], opening: Opening, card: Card, *, quick: bool) -> dict[str, Any]:
    """A cell's row: what was reached, and how that stands to the limit, on the recorded card and on this one."""
    config, sizes = shape(model), lengths(name, quick=quick)
    known = None if quick else RECORDED.get((model, name))
    there, here = limit(config, sizes), limit(config, sizes, card)
    return {
        "model": model,
        "workload": name,
        "requests": run.requests,
        "tok_s": run.rate,
        "runs_tok_s": [one.rate for one in runs],
        "seconds": run.seconds,
        "steps": run.steps,
        "preemptions": run.preemptions,
        "limit_tok_s": there,
        "of_limit": run.rate / there,
        "limit_here_tok_s": here,
        "of_limit_here": run.rate / here,
        "vllm_tok_s": known and known.vllm,
        "of_vllm": known and run.rate / known.vllm,
        "of_vllm_scaled": known and (run.rate / here) / (known.vllm / there),  # each by the limit of the card that it ran on
        "goal_tok_s": known and known.goal,
        "of_goal": known and run.rate / known.goal,
        "ready_s": opening.ready,
        "first_token_s": opening.first_token,
    }


def show(rows: list[dict[str, Any]]) -> None:
    shown = [
        (
            f"{row['model']} {row['workload']}", row["tok_s"], row["vllm_tok_s"], row["of_vllm"], row["of_vllm_scaled"], row["of_limit"], row["of_limit_here"],
            row["goal_tok_s"], row["of_goal"], row["steps"], row["ready_s"], row["first_token_s"],
        )
        for row in rows
    ]  # fmt: skip
    table(
        f"output tokens a second; vLLM, limit and goal are of an {PROVENANCE['card']}, `here` is the share of the limit at the "
        "bandwidth and rate measured in this run, `scaled` the ratio to vLLM by that",
        COLUMNS,
        shown,
    )


def show_peers(peers: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    if not peers:
        return
    ours = {(row["model"], row["workload"]): row["tok_s"] for row in rows}
    shown = []
    for row in peers:
        own, rate = ours.get((row["model"], row["workload"])), row.get("tok_s")
        faster = own / rate if own and rate else None
        shown.append((f"{row['model']} {row['workload']}", row["peer"], row.get("requests"), rate or "failed", faster))
    table("peers in the same run", ("cell", "peer", "requests", "tok/s", "nbengine is faster by"), shown)

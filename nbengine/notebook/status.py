"""What `%engine` shows: engines, models and steps, as small tables of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from nbengine.notebook.render import CELL, QUIET

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.local_models import LocalModel
    from nbengine.trace import StepRecord


class Table:
    """Rows of text under a head, in HTML and in plain columns."""

    def __init__(self, head: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "", titles: Sequence[int] = ()) -> None:
        self.titles = set(titles)  # rows in bold
        self.head = list(head)
        self.rows = [list(row) for row in rows]
        self.empty = empty

    def __repr__(self) -> str:
        if not self.rows:
            return self.empty
        lines = [self.head, *self.rows] if any(self.head) else self.rows
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        if not self.rows:
            return f'<div style="{QUIET}">{escape(self.empty)}</div>'
        head = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in self.head) if any(self.head) else ""
        body = "".join(self._row(row, "th" if i in self.titles else "td") for i, row in enumerate(self.rows))
        return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"

    @staticmethod
    def _row(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} style="{CELL}">{escape(cell)}</{tag}>' for cell in row) + "</tr>"


class Status(Table):
    """Every engine of a session at one moment."""

    def __init__(self, engines: Mapping[str, Engine], current: str | None) -> None:
        rows: list[list[str]] = []
        titles: list[int] = []
        self.engines = {name: engine_dict(engine) for name, engine in engines.items()}
        for name, engine in engines.items():
            told = _told(engine)
            titles.append(len(rows))
            rows += [[f"{name}{' (current)' if name == current and len(engines) > 1 else ''}", engine.status]]
            rows += [[key, value] for key, value in told.items()]
        super().__init__(["", ""], rows, empty="no engine is loaded: `%engine load tales`", titles=titles)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by engine."""
        return self.engines


class ModelList(Table):
    """Models on this machine."""

    def __init__(self, models: Sequence[LocalModel], loaded: Mapping[str, str]) -> None:
        from nbengine.memory import size

        self.models = list(models)
        rows = []
        for model in models:
            names = [name for name, source in loaded.items() if source in {model.name, model.folder}]
            note = f"loaded as {', '.join(names)}" if names else "" if model.complete else "incomplete: loading it downloads the rest"
            rows.append([model.name, size(model.nbytes), model.architecture, note])
        known = {source for model in models for source in (model.name, model.folder)}
        rows += [[source, "", "", f"loaded as {name}"] for name, source in loaded.items() if source not in known]
        rows += [[line, "", "", "could not be read"] for line in getattr(models, "skipped", ())]
        super().__init__(["model", "on disk", "architecture", ""], rows, empty="no models on this machine")


class Steps(Table):
    """What steps by hand did."""

    def __init__(self, records: Sequence[StepRecord], *, kept: bool = True) -> None:
        self.records = list(records)
        rows = [
            [
                str(r.step),
                str(len(r.uids)),
                str(sum(count for count in r.counts if count > 1)),
                str(sum(count for count in r.counts if count == 1)),
                str(len(r.sampled)),
                str(r.num_waiting),
                f"{r.blocks_used}",
                f"{1e3 * r.duration:.1f} ms",
            ]
            for r in records
        ]
        head = ["step", "sequences", "prefill tokens", "decode tokens", "sampled", "waiting", "blocks used", "took"]
        nothing = (
            "there is nothing to do: no request is waiting or running" if kept else "this engine keeps no record of steps (trace_steps=0)"
        )
        super().__init__(head, rows, empty=nothing)


def engine_dict(engine: Engine) -> dict[str, Any]:
    """An engine as plain values."""
    info, stats = engine.info, engine.stats()
    names = ("architecture", "implementation", "parameters", "device", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    return {"model": engine.config.model, **{name: getattr(info, name) for name in names}, **stats}


def _told(engine: Engine) -> dict[str, str]:
    from nbengine.memory import size

    info, stats, memory = engine.info, engine.stats(), engine.info.memory
    hits, asked = stats["prefix_cache_hits"], stats["prefix_cache_queries"]
    return {
        "model": f"{engine.config.model}: {info.architecture}, {info.parameters / 1e6:,.1f} M parameters, {info.dtype}, run by {info.implementation}",
        "device": f"{info.device}, loaded in {info.load_seconds:.1f} s",
        "memory": f"weights {size(memory.weights)}, KV cache {size(memory.kv_cache)}",
        "pool": (
            f"{stats['blocks_used']:,} of {stats['blocks_total']:,} blocks of {engine.config.block_size} tokens used, "
            f"{stats['blocks_cached']:,} cached"
        ),
        "requests": f"{stats['num_running']} running, {stats['num_waiting']} waiting, {stats['num_preemptions']} preemptions",
        "so far": (
            f"{stats['generation_tokens']:,} tokens generated, {stats['prompt_tokens']:,} prompt tokens"
            + (f", {hits:,} of {asked:,} found in the prefix cache" if asked else "")
        ),
        "limits": (
            f"{info.max_model_len:,} tokens a sequence, {stats['max_num_seqs']} sequences, {stats['max_num_batched_tokens']:,} tokens a step"
        ),
    }

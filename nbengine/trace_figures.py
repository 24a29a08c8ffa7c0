"""Plotly figures of a trace, for papers and for a look afterwards: `trace.figure("occupancy")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nbengine import trace_series
from nbengine.checks import checks_keywords
from nbengine.errors import nearest
from nbengine.trace_columns import Columns
from nbengine.trace_lanes import lanes
from nbengine.trace_series import SERIES, Groups, Panel, Series

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nbengine.trace import StepRecord, Trace

# Okabe and Ito's colours: told apart by the colour-blind and in grey, seen on white and on black.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999"
CYCLE = [BLUE, ORANGE, GREEN, PINK, SKY, RED]
COLOURS = {
    "used": BLUE, "cached": SKY, "free": GREY,
    "prefill": ORANGE, "decode": BLUE,
    "running": BLUE, "waiting": ORANGE, "preempted": RED,
    "generated": BLUE, "prefilled": ORANGE,
    "found": GREEN, "computed": ORANGE,
    "plan": PINK, "launch": ORANGE, "GPU": BLUE, "commit": GREEN,
    "queued": GREY,
}  # fmt: skip
FAINT = {"free", "queued"}
LATENCY = ("first_token", "token_gap")
MOST_LANES = 200


@checks_keywords()
def figure(
    trace: Trace,
    kind: str | Panel = "overview",
    *,
    at: StepRecord | int | None = None,
    points: int = 2000,
    template: str = "simple_white",
    width: int | None = None,
    height: int | None = None,
) -> go.Figure:
    """A figure of one kind; see `Trace.figure`."""
    if callable(kind):
        name = getattr(kind, "__name__", "panel")
        made = _stack([trace_series.users_series(name, kind, trace, Columns.of(trace), points)])
    elif kind not in KINDS:
        raise ValueError(
            f"a trace has no figure {kind!r}{nearest(str(kind), KINDS)}; there are {', '.join(KINDS)}, and functions of a trace"
        )
    elif at is not None and kind != "blocks":
        raise ValueError("at= chooses the step that figure('blocks', at=...) shows; the other figures are of all steps")
    else:
        made = _blocks(trace, at) if kind == "blocks" else _timeline(trace) if kind == "timeline" else _series(trace, KINDS[kind], points)
    made.update_layout(template=template, width=width, height=height or made.layout.height, font_size=12)
    return made


KINDS: dict[str, tuple[str, ...]] = {
    "overview": ("occupancy", "batch", "queue", "throughput", "first_token", "token_gap", "prefix_hits", "step_time"),
    **{name: (name,) for name in SERIES},
    "latency": LATENCY,
    "timeline": (),
    "blocks": (),
}


def _series(trace: Trace, names: tuple[str, ...], points: int) -> go.Figure:
    columns = Columns.of(trace)
    groups = Groups.of(columns, points)
    return _stack([SERIES[name](groups) for name in names])


def _stack(series: list[Series]) -> go.Figure:
    """Charts one above the other over the same time."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = [one.title for one in series]
    made = make_subplots(rows=len(series), shared_xaxes=True, vertical_spacing=0.25 / max(4, len(series)), subplot_titles=titles)
    for row, one in enumerate(series, 1):
        times, lines = one.steps()
        for i, (label, values) in enumerate(lines.items()):
            made.add_trace(
                go.Scatter(x=times, y=values, name=label, legendgroup=one.title, legendgrouptitle_text=one.title, **drawn(one, label, i)),
                row=row,
                col=1,
            )
        made.update_yaxes(title_text=one.unit, rangemode="tozero", row=row, col=1)
    made.update_xaxes(title_text="seconds", row=len(series), col=1)
    return made.update_layout(height=max(320, 190 * len(series)), legend_tracegroupgap=8, hovermode="x unified")


def drawn(series: Series, label: str, place: int) -> dict[str, Any]:
    """How plotly draws a line: its style, as plain values."""
    colour = COLOURS.get(label, CYCLE[place % len(CYCLE)])
    if series.style == "points":
        return {"mode": "markers", "marker": {"color": colour, "size": 5}}
    line = {"color": colour, "width": 1.5, "shape": "hv"}
    if series.style == "line":
        return {"mode": "lines", "line": line}
    return {
        "mode": "lines",
        "line": line | {"width": 0.5},
        "stackgroup": "one",
        "fillcolor": _faded(colour, 0.15 if label in FAINT else 0.75),
    }


def _faded(colour: str, alpha: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _timeline(trace: Trace) -> go.Figure:
    """A bar for each thing that each sequence did, on a lane of its own."""
    import plotly.graph_objects as go

    found = lanes(trace)
    shown = found[:MOST_LANES]
    origin = min((lane.spans[0].begin for lane in found), default=0.0)
    made = go.Figure()
    for doing in ("queued", "prefill", "decode", "preempted"):
        spans = [(lane, span) for lane in shown for span in lane.spans if span.doing == doing and span.end > span.begin]
        made.add_bar(
            y=[lane.label for lane, _ in spans],
            base=[span.begin - origin for _, span in spans],
            x=[span.end - span.begin for _, span in spans],
            orientation="h",
            name=doing,
            marker={"color": COLOURS[doing], "opacity": 0.35 if doing in FAINT else 1, "line_width": 0},
            hovertemplate="%{y}: " + doing + " for %{x:.3f} s from %{base:.3f} s<extra></extra>",
        )
    made.update_yaxes(
        autorange="reversed",
        type="category",
        dtick=max(1, len(shown) // 60),
        categoryorder="array",
        categoryarray=[lane.label for lane in shown],
    )
    made.update_xaxes(title_text="seconds")
    title = "Requests" if len(found) == len(shown) else f"Requests: the first {len(shown)} of {len(found)}"
    return made.update_layout(barmode="overlay", bargap=0.2, title_text=title, height=160 + 14 * max(8, min(60, len(shown))))


def _blocks(trace: Trace, at: StepRecord | int | None) -> go.Figure:
    """Every block as a cell at one moment: whose it is, cached, or free."""
    import plotly.graph_objects as go

    record = trace.last if at is None else at
    if record is None:
        raise ValueError("there is no step in this trace yet: run a request first")
    pool = trace.at(record)
    step = record if isinstance(record, int) else record.step
    owners: dict[int, list[int]] = {}
    for uid, table in pool.tables.items():
        for block in table:
            owners.setdefault(block, []).append(uid)
    count = len(pool.references)
    across = max(1, min(160, int(np.ceil(np.sqrt(4 * count)))))
    cell = max(6, min(24, 840 // across))  # pixels, in a figure of usual width
    rows = -(-count // across)
    # 0: no such block, 1: free, 2: cached, 3: shared, 4 and more: one owner's, in its colour
    colours = ["rgba(0,0,0,0)", "#e6e6e6", "#b8dcf2", "#333333", *CYCLE]
    values, texts = np.zeros(rows * across), [""] * (rows * across)
    for block in range(count):
        held = owners.get(block, [])
        values[block] = 4 + held[0] % len(CYCLE) if len(held) == 1 else 3 if held else 2 if block in pool.cached else 1
        what = ", ".join(_name(trace, uid) for uid in held) or ("cached, free" if block in pool.cached else "free")
        texts[block] = f"block {block}: {what}"
    edges = [edge for i, colour in enumerate(colours) for edge in ((i / len(colours), colour), ((i + 1) / len(colours), colour))]
    made = go.Figure(
        go.Heatmap(
            z=values.reshape(rows, across),
            text=np.array(texts, object).reshape(rows, across),
            hovertemplate="%{text}<extra></extra>",
            colorscale=edges,
            zmin=0,
            zmax=len(colours),
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    made.update_yaxes(autorange="reversed", visible=False, scaleanchor="x")
    made.update_xaxes(visible=False)
    for label, colour in (
        ("free", colours[1]),
        ("cached, free", colours[2]),
        ("held by several", colours[3]),
        ("held by one: its colour", BLUE),
    ):
        made.add_scatter(x=[None], y=[None], mode="markers", name=label, marker={"color": colour, "symbol": "square", "size": 10})
    used = sum(1 for references in pool.references if references)
    title = f"KV blocks after step {step}: {used} of {count} held, {len(pool.cached)} cached"
    return made.update_layout(title_text=title, height=160 + cell * rows, plot_bgcolor="rgba(0,0,0,0)", legend_orientation="h")


def _name(trace: Trace, uid: int) -> str:
    info = trace.sequences.get(uid)
    return f"#{uid}" if info is None else f"{info.request_id}" + (f"/{info.index}" if info.index else "")

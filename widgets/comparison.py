"""Two traces beside each other on one clock: static and continuous batching, reserved and paged memory, cache on and off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import traitlets
from IPython.core.getipython import get_ipython
from IPython.display import SVG, display

from nbengine.checks import checks_keywords
from nbengine.trace import Trace
from nbengine.trace_columns import Columns
from nbengine.trace_lanes import Lane, lanes
from nbengine.trace_series import Groups, Series, occupancy, queue, summary, throughput
from nbengine.widgets.chart_picture import draw_charts
from nbengine.widgets.still import Still
from nbengine.widgets.view import module, style

if TYPE_CHECKING:
    from nbengine.engine import Engine

POINTS = 400  # of a curve
MOST = 160  # lanes of a trace
DOING = ("queued", "prefill", "decode", "preempted")
ROWS = {  # of the table: what, and how it is told
    "steps": ("steps", "{:,.0f}"),
    "finished": ("finished after", "{:.2f} s"),
    "tokens": ("tokens", "{:,.0f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "first_token_median": ("time to first token, median", "{:.3f} s"),
    "first_token_most": ("time to first token, longest", "{:.3f} s"),
    "token_gap": ("between tokens, mean", "{:.4f} s"),
    "kv_mean": ("KV cache used, mean", "{:.0%}"),
    "kv_peak": ("KV cache used, most", "{:.0%}"),
    "running": ("sequences running, mean", "{:.1f}"),
    "prefix_hit_rate": ("prompt tokens from the prefix cache", "{:.0%}"),
    "preempted": ("preemptions", "{:.0f}"),
}


class Side:
    """One of the two: a trace as it is now, its times counted from its first arrival."""

    def __init__(self, trace: Trace, label: str) -> None:
        if not len(trace):
            why = "run its requests first" if trace.capacity else "its engine keeps no trace (trace_steps=0)"
            raise ValueError(f"there is no step in the trace {label!r} yet: {why}")
        self.label = label
        self.truncated = trace.first > 0
        self.lanes: list[Lane] = lanes(trace)
        self.columns = Columns.of(trace)
        self.columns.origin = self.origin = min([lane.spans[0].begin for lane in self.lanes] + [float(self.columns["time"][0])])
        self.groups = Groups.of(self.columns, POINTS)
        self.end = float(self.columns["end"].max()) - self.origin
        numbers = summary(self.columns)
        steps = self.columns["steps"] > 0
        running = self.columns["running"][steps] if steps.any() else np.zeros(1)
        self.numbers = {
            **numbers,
            "finished": self.end,
            "tokens_per_second": numbers["tokens"] / self.end if self.end > 0 else math.nan,
            "running": float(running.mean()),
        }

    def series(self) -> list[Series]:
        made = [occupancy(self.groups), queue(self.groups), throughput(self.groups)]
        for one in made:
            one.title = f"{self.label}: {one.title}"
        return made

    def packed(self) -> dict[str, Any]:
        """As it is sent: [doing, begin, end] of each span by lane, and curves over `times`."""
        groups = self.groups
        used, blocks = groups.at_most("used", "blocks")
        curves = {
            "used": used / blocks,
            "running": groups.most("running"),
            "waiting": groups.most("waiting"),
            "tokens": np.cumsum(groups.sum("sampled")),
        }
        return {
            "label": self.label,
            "end": self.end,
            "truncated": self.truncated,
            "lanes": [
                [lane.label, [round(x, 5) for s in lane.spans for x in (DOING.index(s.doing), s.begin - self.origin, s.end - self.origin)]]
                for lane in self.lanes[:MOST]
            ],
            "left_out": max(0, len(self.lanes) - MOST),
            "times": groups.times.astype(np.float32).tobytes(),
            "curves": {name: values.astype(np.float32).tobytes() for name, values in curves.items()},
        }


class Comparison(Still):
    """What `compare` shows; `numbers` has the summary of each as a dict. It needs no kernel once it is shown."""

    _esm = module("comparison.js")
    _css = style("comparison.css")

    sides: Any = traitlets.List().tag(sync=True)
    table: Any = traitlets.List().tag(sync=True)

    def __init__(self, one: Side, two: Side) -> None:
        self.numbers = {side.label: side.numbers for side in (one, two)}
        self._both = (one, two)
        rows = [[what, *_told_both(one.numbers[key], two.numbers[key], form)] for key, (what, form) in ROWS.items()]
        super().__init__(sides=[one.packed(), two.packed()], table=rows)

    def snapshot(self) -> SVG:
        """Both as a picture that needs neither a kernel nor a script."""
        return SVG(data=self._picture())

    def _picture(self) -> str:
        end = max(side.end for side in self._both)
        charts = [chart for pair in zip(*(side.series() for side in self._both), strict=True) for chart in pair]
        return draw_charts(charts, repr(self)[1:-1], span=(0.0, end), pairs=True)

    def __repr__(self) -> str:
        told = [f"{label} {n['finished']:.2f} s, {n['tokens_per_second']:,.0f} tokens/s" for label, n in self.numbers.items()]
        return f"<{' · '.join(told)}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> Any:  # noqa: ARG002 - IPython's protocol
        made = super()._repr_mimebundle_(**kwargs)
        bundle: dict[str, Any] = dict(made[0] if isinstance(made, tuple) else made or {})
        return {**bundle, **self._still()}

    def _ipython_display_(self) -> None:
        """The live view and, hidden where that shows, its picture."""
        if getattr(get_ipython(), "kernel", None) is None:
            print(repr(self))  # noqa: T201 - a terminal has nothing else to show it on
            return
        if self.comm is None:  # it was closed: only the picture is left of it
            display(self._still(), raw=True)
            return
        bundle = self._repr_mimebundle_()
        picture = bundle.pop("image/svg+xml")
        display(bundle, raw=True)
        display({"text/plain": "", "image/svg+xml": picture}, raw=True)

    def _still(self) -> dict[str, str]:
        return {"text/plain": repr(self), "image/svg+xml": self.named(self._picture())}


@checks_keywords()
def compare(one: Trace | Engine, two: Trace | Engine, *, labels: Sequence[str] = ("A", "B")) -> Comparison:
    """Two traces (or engines, as they are now) on one clock that begins with the first arrival of each, under one scrubber.

    >>> compare(static.trace, continuous.trace, labels=("static", "continuous"))                # doctest: +SKIP
    """
    if isinstance(labels, str) or len(labels) != 2 or len({str(label) for label in labels}) != 2:
        raise ValueError(f"labels must be two different names, such as ('static', 'continuous'), not {labels!r}")
    traces = []
    for source in (one, two):
        trace = source if isinstance(source, Trace) else getattr(getattr(source, "engine", source), "trace", None)
        if not isinstance(trace, Trace):
            raise TypeError(f"compare() takes two traces or engines, not {type(source).__name__}: pass engine.trace or Trace.load(path)")
        traces.append(trace)
    return Comparison(*(Side(trace, str(label)) for trace, label in zip(traces, labels, strict=True)))


def _told_both(one: float, two: float, form: str) -> tuple[str, str, str]:
    """Both, and the second as a multiple of the first."""
    ratio = two / one if one > 0 else math.nan
    told = ["none" if math.isnan(number) else form.format(number) for number in (one, two)]
    return told[0], told[1], "" if math.isnan(ratio) else f"{ratio:.2f} times"

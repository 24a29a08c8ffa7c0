"""Charts as a static SVG: what a saved notebook shows, and a front end where plotly cannot be loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from nbengine.trace_figures import COLOURS, CYCLE, FAINT
from nbengine.trace_series import Series

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH, HIGH, GAP, SIDE = 640, 70, 34, 44  # of the picture; of a chart; above it; left of it
PAPER, INK, RULE = "#ffffff", "#333333", "#d9d9d9"


def draw_charts(
    series: Sequence[Series], text: str, cursor: float | None = None, span: tuple[float, float] | None = None, *, pairs: bool = False
) -> str:
    """Charts in two columns over one time axis (all there is, or `span`), under a line of text; `cursor` is a time marked in all of them.

    In pairs, the two of a row have one scale.
    """
    across = 2
    wide = (WIDTH - 16) / across
    times = (
        [time for one in series if len(one.times) for time in (float(one.times[0]), one.until or float(one.times[-1]))]
        if span is None
        else list(span)
    )
    first, last = (min(times), max(times)) if times else (0.0, 1.0)
    tops = [_top(one) for one in series]
    if pairs:
        tops = [max(tops[place - place % across : place - place % across + across]) for place in range(len(tops))]
    parts = [
        f'<g transform="translate({8 + place % across * wide:.1f} {30 + place // across * (HIGH + GAP)})">'
        f"{_chart(one, wide - SIDE - 12, cursor, first, last, top)}</g>"
        for place, (one, top) in enumerate(zip(series, tops, strict=True))
    ]
    height = 34 + -(-len(series) // across) * (HIGH + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" style="max-width:100%" '
        f'font-family="sans-serif" font-size="10" fill="{INK}"><title>{escape(text)}</title>'
        f'<rect width="100%" height="100%" fill="{PAPER}"/><text x="8" y="18" font-size="11">{escape(text)}</text>{"".join(parts)}</svg>'
    )


def _top(series: Series) -> float:
    """The greatest value of a chart."""
    lines = series.steps()[1]
    stacks = _stacked(lines) if series.style == "area" else lines
    tops = [np.nanmax(values) for values in stacks.values() if len(values) and not np.isnan(values).all()]
    return float(max([*tops, 1e-9]))


def _chart(series: Series, wide: float, cursor: float | None, first: float, last: float, top: float) -> str:
    times, lines = series.steps()
    across = wide / max(last - first, 1e-9)
    stacks = _stacked(lines) if series.style == "area" else lines
    names = "".join(
        f'<tspan fill="{_colour(label, i)}" font-weight="bold"> ■ </tspan><tspan>{escape(label)}</tspan>' for i, label in enumerate(lines)
    )
    drawn = f'<text x="0" y="10"><tspan font-weight="bold">{escape(series.title)}</tspan>{names}</text>'
    drawn += f'<g transform="translate({SIDE} 16)"><path d="M0 0H{wide:.1f}M0 {HIGH}H{wide:.1f}" stroke="{RULE}"/>'
    for i, (label, values) in reversed(list(enumerate(stacks.items()))):  # the highest of a stack first, the others over it
        xs, ys = np.clip((times - first) * across, 0, wide), HIGH * (1 - values / top)
        if series.style == "points":
            drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="{_colour(label, i)}"/>' for x, y in zip(xs, ys, strict=True))
        elif series.style == "area":
            faint = ' fill-opacity=".25"' if label in FAINT else ""
            path = _path(xs, ys)
            drawn += f'<path d="{path}V{HIGH}H{xs[0] if len(xs) else 0:.1f}z" fill="{PAPER}"/>' if path and faint else ""
            drawn += f'<path d="{path}V{HIGH}H{xs[0]:.1f}z" fill="{_colour(label, i)}"{faint}/>' if path else ""
        else:
            drawn += f'<path d="{_path(xs, ys)}" fill="none" stroke="{_colour(label, i)}" stroke-width="1.2"/>'
    if cursor is not None and first <= cursor <= last:
        drawn += f'<path d="M{(cursor - first) * across:.1f} 0v{HIGH}" stroke="{INK}" stroke-dasharray="3 2"/>'
    drawn += f'<g font-size="8"><text x="-3" y="7" text-anchor="end">{_short(top)}</text><text x="-3" y="{HIGH}" text-anchor="end">0</text>'
    drawn += f'<text x="0" y="{HIGH + 9}">{first:.2f} s</text><text x="{wide:.1f}" y="{HIGH + 9}" text-anchor="end">{last:.2f} s</text>'
    return drawn + f'<text x="-3" y="{HIGH / 2}" text-anchor="end">{escape(series.unit.split(" ")[0][:9])}</text></g></g>'


def _stacked(lines: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    below: NDArray[np.float64] | float = 0.0
    stacks = {}
    for label, values in lines.items():
        stacks[label] = below = below + np.nan_to_num(values)
    return stacks


def _path(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> str:
    """Level from each point to the next one; broken where there is no value. Points that would not be told apart are left out."""
    path, pen, last = [], False, (-1.0, -1.0)
    for x, y in zip(xs.round(1).tolist(), ys.round(1).tolist(), strict=True):
        if math.isnan(y):
            pen = False
        elif not pen:
            path.append(f"M{x:g} {y:g}")
            pen = True
        elif (x, y) != last:
            path.append(f"H{x:g}" + (f"V{y:g}" if y != last[1] else ""))
        last = (x, y)
    return "".join(path)


def _colour(label: str, place: int) -> str:
    return COLOURS.get(label, CYCLE[place % len(CYCLE)])


def _short(number: float) -> str:
    """A number that fits beside an axis."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"

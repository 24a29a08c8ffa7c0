"""Lines over time, drawn from a trace's columns: what a chart shows, before anything draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbengine.trace import Trace
    from nbengine.trace_columns import Columns

Style = Literal["area", "line", "points"]


@dataclass(slots=True)
class Series:
    """Named lines over one time axis. A value holds from its time on until the next one; NaN: there is none.

    `times` are seconds since the trace's origin (`Columns.origin`). Areas are stacked.
    """

    title: str
    unit: str
    times: NDArray[np.float64]
    lines: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    style: Style = "line"
    until: float | None = None  # how long the last value holds

    def steps(self) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
        """The same with the last value once more, where it ends."""
        if self.style == "points" or self.until is None or not len(self.times):
            return self.times, self.lines
        return np.append(self.times, self.until), {label: np.append(values, values[-1]) for label, values in self.lines.items()}


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows of columns put together: each alone where there are few, else those of one stretch of time."""

    columns: Columns
    starts: NDArray[np.intp]  # where each group begins, in the rows from `low` to `high`
    low: int
    high: int
    times: NDArray[np.float64]  # since the origin
    spans: NDArray[np.float64]  # seconds, up to the next group

    @classmethod
    def of(cls, columns: Columns, limit: int, span: tuple[float, float] | None = None) -> Groups:
        """At most `limit` groups (and one more), of the rows that speak of a stretch of time or of all."""
        time = columns["time"] - (columns.origin or 0.0)
        low, high = 0, len(time)
        if span is not None and len(time):
            low = max(0, int(np.searchsorted(time, span[0], "right")) - 1)
            high = max(low + 1, int(np.searchsorted(time, span[1], "right")))
            if span[1] < time[0] or span[0] > columns["end"][-1] - (columns.origin or 0.0):
                high = low  # before all of them, or after
        inside = time[low:high]
        if len(inside) <= limit:
            starts = np.arange(len(inside), dtype=np.intp)
        else:
            edges = np.linspace(inside[0], inside[-1], limit, endpoint=False)
            starts = np.unique(np.searchsorted(inside, edges, "left"))
            starts = starts[starts < len(inside)]
        times = inside[starts]
        after = time[high] if high < len(time) else columns["end"][-1] - (columns.origin or 0.0) if len(time) else 0.0
        return cls(columns, starts, low, high, times, np.diff(np.append(times, max(after, times[-1] if len(times) else 0.0))))

    @property
    def until(self) -> float | None:
        """When the last of them ends."""
        return float(self.times[-1] + self.spans[-1]) if len(self.times) else None

    def series(self, title: str, unit: str, lines: dict[str, NDArray[np.float64]], style: Style = "line") -> Series:
        """Lines with a value for each group."""
        return Series(title, unit, self.times, lines, style, self.until)

    def rows(self, name: str) -> NDArray[np.float64]:
        return self.columns[name][self.low : self.high]

    def sum(self, name: str) -> NDArray[np.float64]:
        return _reduce(np.add, self.rows(name), self.starts)

    def most(self, name: str) -> NDArray[np.float64]:
        return _reduce(np.maximum, self.rows(name), self.starts)

    def a_step(self, name: str) -> NDArray[np.float64]:
        """The mean over a group's steps; 0 where it has none."""
        steps = self.sum("steps")
        return np.divide(self.sum(name), steps, out=np.zeros_like(steps), where=steps > 0)

    def at_most(self, name: str, *others: str) -> list[NDArray[np.float64]]:
        """Of each group the row with the most of this: that, and others in the same row, so that they still add up."""
        rows = self.rows(name)
        peaks = _first_of(np.maximum, rows, self.starts)
        return [rows[peaks], *(self.rows(other)[peaks] for other in others)]


def occupancy(groups: Groups) -> Series:
    """KV blocks: held, cached but free, blank. Of steps drawn as one, the fullest."""
    used, cached, blocks = groups.at_most("used", "cached", "blocks")
    return groups.series("KV cache", "blocks", {"used": used, "cached": cached, "free": blocks - used - cached}, "area")


def batch(groups: Groups) -> Series:
    """Tokens computed in a step. Of steps drawn as one, the mean."""
    return groups.series("Batch", "tokens a step", {"prefill": groups.a_step("prefill"), "decode": groups.a_step("decode")}, "area")


def queue(groups: Groups) -> Series:
    """Sequences that run and wait (of steps drawn as one, the most), and how many were preempted."""
    lines = {"running": groups.most("running"), "waiting": groups.most("waiting"), "preempted": groups.sum("preempted")}
    return groups.series("Sequences", "", lines)


def throughput(groups: Groups) -> Series:
    """Tokens a second of wall time: drawn, and computed of prompts."""
    lines = {"generated": _rate(groups.sum("sampled"), groups.spans), "prefilled": _rate(groups.sum("prefill"), groups.spans)}
    return groups.series("Throughput", "tokens/s", lines)


def token_gap(groups: Groups) -> Series:
    """Milliseconds between two tokens of a sequence, the mean over all that were given one."""
    return groups.series("Between tokens", "ms", {"mean": 1e3 * _ratio(groups.sum("waited"), groups.sum("gaps"))})


def first_token(groups: Groups) -> Series:
    """Seconds from a request's arrival to its first token: a point for each (the longest and the shortest of those drawn as one)."""
    columns, times = groups.columns, groups.times
    points = columns.first_tokens[:2] - np.array([[columns.origin or 0.0], [0.0]])
    begins, ends = (times[0], times[-1] + groups.spans[-1] + 1e-9) if len(times) else (0.0, -1.0)
    points = points[:, (points[0] >= begins) & (points[0] <= ends)]
    limit = max(1, len(times))
    if points.shape[1] > 2 * limit:
        starts = np.unique(np.searchsorted(points[0], np.linspace(points[0, 0], points[0, -1], limit, endpoint=False)))
        points = points[:, np.union1d(*(_first_of(how, points[1], starts) for how in (np.minimum, np.maximum)))]
    return Series("Time to first token", "s", points[0], {"each request": points[1]}, "points")


def prefix_hits(groups: Groups) -> Series:
    """Prompt tokens of those admitted: found in the prefix cache, and computed."""
    asked, found = groups.sum("asked"), groups.sum("found")
    return groups.series("Prefix cache", "prompt tokens", {"found": found, "computed": asked - found}, "area")


def step_time(groups: Groups) -> Series:
    """Where a step's time goes, the mean over steps drawn as one."""
    lines = {label: 1e3 * groups.a_step(name) for label, name in STEP_PARTS.items()}
    return groups.series("Step time", "ms", lines, "area")


Panel = Callable[["Trace"], Any]
STEP_PARTS = {"plan": "plan", "launch": "launch", "GPU": "gpu", "commit": "commit"}
SERIES: dict[str, Callable[[Groups], Series]] = {
    "occupancy": occupancy,
    "batch": batch,
    "queue": queue,
    "throughput": throughput,
    "token_gap": token_gap,
    "first_token": first_token,
    "prefix_hits": prefix_hits,
    "step_time": step_time,
}


def summary(columns: Columns, span: tuple[float, float] | None = None) -> dict[str, float]:
    """The numbers of a stretch of time, or of all: plain, and NaN where there is nothing to count."""
    groups = Groups.of(columns, len(columns) + 1, span)
    origin = columns.origin or 0.0
    begins = groups.times[0] if len(groups.times) else 0.0
    ends = begins + float(groups.spans.sum())
    when, waited, _ = columns.first_tokens[:, : None if len(groups.times) else 0]
    firsts = waited[(when - origin >= begins) & (when - origin <= ends + 1e-9)]
    seconds, asked, gaps = ends - begins, groups.rows("asked").sum(), groups.rows("gaps").sum()
    used, weights = groups.rows("used") / groups.rows("blocks"), groups.spans
    return {
        "begins": float(begins),
        "seconds": float(seconds),
        "steps": float(groups.rows("steps").sum()),
        "tokens": float(groups.rows("sampled").sum()),
        "tokens_per_second": float(groups.rows("sampled").sum() / seconds) if seconds > 0 else float("nan"),
        "first_token_median": float(np.median(firsts)) if len(firsts) else float("nan"),
        "first_token_most": float(firsts.max()) if len(firsts) else float("nan"),
        "token_gap": float(groups.rows("waited").sum() / gaps) if gaps else float("nan"),
        "kv_mean": float((used * weights).sum() / weights.sum()) if weights.sum() > 0 else float("nan"),
        "kv_peak": float(used.max()) if len(used) else float("nan"),
        "preempted": float(groups.rows("preempted").sum()),
        "prefix_hit_rate": float(groups.rows("found").sum() / asked) if asked else float("nan"),
    }


def users_series(title: str, panel: Panel, trace: Trace, columns: Columns, limit: int = 1000) -> Series:
    """What a user's panel makes of a trace: a Series, or a dict from labels to values, one for each record of the trace."""
    for _ in range(3):  # records may come and go while it works
        first, fewest = trace.first, len(trace)
        answer = panel(trace)
        if trace.first == first:
            break
    if isinstance(answer, Series):
        return thinned(answer, limit)
    if not isinstance(answer, Mapping) or not answer:
        raise TypeError(f"the panel {title!r} must return a Series, or a dict from labels to values, not {type(answer).__name__}")
    lines = {str(label): np.asarray(values, np.float64) for label, values in answer.items()}
    records = trace.since(first)
    for label, values in lines.items():
        if values.ndim != 1 or not fewest <= len(values) <= len(records):
            given = f"{values.size} values" if values.ndim == 1 else f"an array of shape {values.shape}"
            raise ValueError(
                f"the panel {title!r} gives {given} as {label!r} for {len(records)} records: give one for each, as in "
                "{'label': [... for record in trace]}, or return a Series with times of its own"
            )
    shortest = min(len(values) for values in lines.values())
    times = np.array([record.time for record in records[:shortest]]) - (columns.origin or 0.0)
    return thinned(Series(title, "", times, {label: values[:shortest] for label, values in lines.items()}), limit)


def thinned(series: Series, limit: int) -> Series:
    """The same in at most `limit` points: of those that fall together, the least and the greatest value."""
    times = series.times
    if len(times) <= limit:
        return series
    starts = np.unique(np.searchsorted(times, np.linspace(times[0], times[-1], limit // 2, endpoint=False)))
    lines = {}
    for label, values in series.lines.items():
        pairs = [how.reduceat(values, starts) for how in (np.fmin, np.fmax)]
        lines[label] = np.stack(pairs, 1).ravel()
    return Series(series.title, series.unit, np.repeat(times[starts], 2), lines, series.style)


def _reduce(how: np.ufunc, rows: NDArray[np.float64], starts: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float64]:
    return how.reduceat(rows, starts) if len(starts) else np.zeros(0)


def _first_of(how: np.ufunc, rows: NDArray[np.float64], starts: NDArray[np.intp]) -> NDArray[np.intp]:
    """Where in each group its least or greatest value stands, the first of equal ones."""
    if not len(starts):
        return starts
    found = np.repeat(how.reduceat(rows, starts), np.diff(np.append(starts, len(rows))))
    places = np.flatnonzero(rows == found)
    first: NDArray[np.intp] = places[np.searchsorted(places, starts)]
    return first


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def _rate(counts: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(counts, seconds, out=np.zeros_like(counts), where=seconds > 0)

"""The dashboard: live charts of an engine over one time axis, its numbers, and what loads and limits it."""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nbengine.checks import checks_keywords, told
from nbengine.errors import nearest
from nbengine.trace_columns import Columns
from nbengine.trace_figures import COLOURS, CYCLE, FAINT
from nbengine.trace_rows import KnownRows
from nbengine.trace_series import SERIES, Groups, Panel, Series, summary, users_series
from nbengine.widgets.chart_picture import draw_charts
from nbengine.widgets.engine_controls import CONTROLS, control, settings
from nbengine.widgets.view import View, module, style

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.trace import Trace

POINTS = 200  # of a line: the whole state stays under 50 kB
OVERVIEW = 120  # of the strip under the charts
LATELY = 5.0  # seconds that the numbers are of, where no stretch of time is chosen
PACE = 0.2  # seconds between two updates while the engine runs: charts are read, not played


def columns_of(trace: Trace) -> Columns:
    """Shared by the dashboards of a trace; used under their playhead's lock."""
    return Columns(trace.num_blocks, max(trace.capacity, len(trace)) + 1024, trace.playhead.model(KnownRows))


class Dashboard(View):
    """KV occupancy, batches, throughput, latency, prefix hits and where a step's time goes, on plotly charts over one time axis.

    Drag over a chart, or in the strip below, to look at a stretch of time closely. Panels of your own are functions of a trace:

    >>> board = Dashboard(engine)                                                               # doctest: +SKIP
    >>> board.add_panel("batch size", lambda trace: {"sequences": [len(r.uids) for r in trace]})  # doctest: +SKIP

    `charts="pictures"` draws them as pictures, for a front end where plotly does not load; where there are no widgets at all,
    `board.watch()` brings the picture up to date while its cell runs.
    """

    title = "Dashboard"
    _esm = module("dashboard.js")
    _css = style("dashboard.css")

    @checks_keywords()
    def __init__(
        self, source: Engine | Trace, *, panels: Mapping[str, Panel] | None = None, charts: Literal["plotly", "pictures"] = "plotly"
    ) -> None:
        if charts not in {"plotly", "pictures"}:
            raise ValueError(f"charts must be 'plotly' or 'pictures', not {charts!r}")
        self._panels: dict[str, Panel] = {}
        self._changes = 0
        self._span: tuple[float, float] | None = None  # the stretch of time that is chosen
        self._pictures = charts == "pictures"
        self._refreshed = 0.0
        self._settings: dict[str, Any] | None = None
        super().__init__(source)
        for title, panel in (panels or {}).items():
            self.add_panel(title, panel)

    # ── panels and the stretch of time ──────────────────────────────────────────────────────────────────────────────

    def add_panel(self, title: str, panel: Panel) -> None:
        """Show one more chart in this dashboard: what a function makes of the trace, a dict from labels to values (one for each record)
        or a `nbengine.trace_series.Series`. It is called in the engine's front thread; what it raises is shown under the charts.
        """
        if not callable(panel):
            raise TypeError(
                f"a panel must be a function of a trace, such as lambda trace: {{'batch': [len(r.uids) for r in trace]}}, not {panel!r}"
            )
        with self.playhead.lock:
            self._panels[str(title)] = panel
        self._changed()

    def remove_panel(self, title: str) -> None:
        """Take away a panel of your own."""
        with self.playhead.lock:
            if title not in self._panels:
                raise ValueError(f"this dashboard has no panel {title!r}{nearest(title, self._panels)}; yours are {list(self._panels)}")
            del self._panels[title]
        self._changed()

    def select(self, begin: float | None = None, end: float | None = None) -> None:
        """Look at a stretch of time, in seconds of the time axis; without one, at all of it."""
        if (begin is None) != (end is None) or (begin is not None and end is not None and not -math.inf < begin < end < math.inf):
            raise ValueError(
                f"select(begin, end) takes two times in seconds, finite and the first the smaller, or nothing, not {begin!r} and {end!r}"
            )
        with self.playhead.lock:
            self._span = None if begin is None or end is None else (float(begin), float(end))
        self._changed()

    @property
    def selected(self) -> tuple[float, float] | None:
        """The stretch of time that is looked at, in seconds of the time axis; None: all of it."""
        return self._span

    def watch(self, seconds: float = 60.0) -> None:
        """Bring the picture up to date once a second while the engine works: for a front end without widgets. An interrupt ends it."""
        if self._picture is None:
            self._ipython_display_()
        until = monotonic() + seconds
        while monotonic() < until and self.playhead.status in {"running", "running slowly"}:
            sleep(1.0)
            self.settled()
        self.settled()

    def _changed(self) -> None:
        self._changes += 1
        self.playhead.look()

    # ── a View's ────────────────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self) -> None:
        now = monotonic()
        if self.playhead.status == "running" and now - self._refreshed < PACE:
            return  # the next look comes soon
        self._refreshed = now
        super().refresh()

    def stamp(self) -> tuple[Any, ...]:
        self._settings = settings(self.playhead.engine)
        return (*super().stamp(), self._changes, self._settings, self._http())

    def state(self) -> dict[str, Any]:
        columns = self._columns()
        charts, troubles = self._charts(columns)
        data = bytearray()
        packed = [_packed(name, one, data) for name, one in charts.items()] if not self._pictures else []
        overview = _packed("overview", _overview(Groups.of(columns, OVERVIEW)), data)
        drawn = {"picture": self._draw(list(charts.values()))} if self._pictures else {"charts": packed}
        trouble = "\n".join([self._trouble, *troubles] if self._trouble else troubles)
        return {
            **drawn,
            "overview": overview,
            "data": bytes(data),
            "span": self._span,
            "cursor": self._cursor(columns),
            "numbers": self._numbers(columns),
            "controls": self._settings,
            "http": self._http(),
            **({"trouble": trouble} if trouble else {}),
        }

    def picture(self) -> str:
        return self._draw(list(self._charts(self._columns())[0].values()))

    def summary(self) -> str:
        with self.playhead.lock:
            numbers = summary(self._columns(), self._span)
        return (
            f"{numbers['steps']:.0f} steps, {numbers['tokens']:,.0f} tokens in {numbers['seconds']:.2f} s ({_told(numbers['tokens_per_second'], '{:,.0f}')} "
            f"tokens/s), time to first token {_told(numbers['first_token_median'], '{:.3f} s')}, between tokens "
            f"{_told(1e3 * numbers['token_gap'], '{:.1f} ms')}, KV cache at most {_told(numbers['kv_peak'], '{:.0%}')} used"
        )

    def act(self, name: str, value: Any) -> None:
        match name:
            case "plotly":
                from plotly.offline import get_plotlyjs

                self.send({"plotly": True}, [gzip.compress(get_plotlyjs().encode(), 1)])
            case "pictures":
                self._pictures = True
                self._changed()
            case "brush":
                self.select(*(value or ()))
            case "seek_time":
                with self.playhead.lock:
                    origin = self._columns().origin or 0.0
                self.playhead.seek_time(origin + float(value))
            case name if name in CONTROLS:
                self._note = control(self.playhead.engine, name, value)
                self._changed()
            case _:
                super().act(name, value)

    # ── what is drawn ───────────────────────────────────────────────────────────────────────────────────────────────

    def _columns(self) -> Columns:
        columns = self.playhead.model(columns_of)
        columns.origin = self.playhead.origin
        columns.read(self.playhead.trace)
        return columns

    def _charts(self, columns: Columns) -> tuple[dict[str, Series], list[str]]:
        """By name, and what went wrong in the user's own."""
        groups = Groups.of(columns, POINTS, self._span)
        charts = {name: series(groups) for name, series in SERIES.items()}
        troubles = []
        for title, panel in self._panels.items():
            try:
                charts[f"panel {title}"] = _within(users_series(title, panel, self.playhead.trace, columns, POINTS), self._span)
            except Exception as error:  # noqa: BLE001 - a user's function
                troubles.append(f"the panel {title!r}: {told(error)}")
        return charts, troubles

    def _draw(self, charts: list[Series]) -> str:
        return draw_charts(charts, f"{self.summary()} · {self.playhead.trace.name}", self._cursor(self._columns()), self._span)

    def _cursor(self, columns: Columns) -> float | None:
        """The playhead's time, where it looks back."""
        record = None if self.playhead.live else self.playhead.record
        return None if record is None else record.time - (columns.origin or 0.0)

    def _numbers(self, columns: Columns) -> list[list[str]]:
        """[what, how much] of the stretch of time that is chosen, or of the last seconds up to the playhead."""
        span, cursor = self._span, self._cursor(columns)
        if span is None and len(columns):
            end = cursor if cursor is not None else float(columns["end"][-1]) - (columns.origin or 0.0)
            span = (max(0.0, end - LATELY), end)
        numbers = summary(columns, span)
        of = f"{span[0]:.2f} to {span[1]:.2f} s" if span is not None else "no step yet"
        return [
            ["", of],
            ["tokens/s", _told(numbers["tokens_per_second"], "{:,.0f}")],
            ["first token, median", _told(numbers["first_token_median"], "{:.3f} s")],
            ["between tokens", _told(1e3 * numbers["token_gap"], "{:.1f} ms")],
            ["KV cache, mean", _told(numbers["kv_mean"], "{:.0%}")],
            ["prefix hits", _told(numbers["prefix_hit_rate"], "{:.0%}")],
            ["preempted", f"{numbers['preempted']:.0f}"],
        ]

    def _http(self) -> dict[str, Any] | None:
        """What the engine's server counts, once it has served."""
        stats: dict[str, Any] = getattr(self.playhead.engine, "http_stats", dict)()
        if not any(stats.values()):
            return None
        servers = [str(one.get("url") or one.get("socket")) for one in stats.get("servers", [])]
        return {**stats, "servers": ", ".join(servers) or "closed"}


def _overview(groups: Groups) -> Series:
    """What the strip below the charts shows: how full the cache was."""
    used, _ = groups.at_most("used", "cached")
    return groups.series("KV cache", "blocks", {"used": used})


def _within(series: Series, span: tuple[float, float] | None) -> Series:
    """The part in a stretch of time, and the value that it begins with."""
    if span is None or not len(series.times):
        return series
    low = max(0, int(np.searchsorted(series.times, span[0], "right")) - 1)
    high = max(low + 1, int(np.searchsorted(series.times, span[1], "right")))
    lines = {label: values[low:high] for label, values in series.lines.items()}
    return Series(series.title, series.unit, series.times[low:high], lines, series.style, series.until)


def _packed(name: str, series: Series, data: bytearray) -> dict[str, Any]:
    """A chart as it is sent; its numbers go into `data` in single precision from `at` on: times (from `start` on), then each line."""
    times, lines = series.steps()
    start, at = float(times[0]) if len(times) else 0.0, len(data)
    for values in (times - start, *lines.values()):
        data += values.astype(np.float32).tobytes()
    return {
        "name": name,
        "title": series.title,
        "unit": series.unit,
        "style": series.style,
        "labels": list(lines),
        "colours": [COLOURS.get(label, CYCLE[i % len(CYCLE)]) for i, label in enumerate(lines)],
        "faint": [label in FAINT for label in lines],
        "start": start,
        "count": len(times),
        "at": at,
    }


def _told(number: float, form: str) -> str:
    return "none" if math.isnan(number) else form.format(number)

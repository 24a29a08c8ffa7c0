"""The timeline: a lane for each sequence, and the batch of one step in cross-section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nbengine.checks import as_int, checks_keywords
from nbengine.trace_rows import KnownRows
from nbengine.widgets.block_facts import sequence_name
from nbengine.widgets.lanes import KINDS, PREFILL, Lane, Lanes
from nbengine.widgets.timeline_picture import draw_lanes
from nbengine.widgets.view import View, module, style

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.trace import StepRecord, Trace

LANES, RUNS = 256, 1400  # of the newest lanes; a name counts as two runs, three steps as one: the whole stays under 50 kB
BATCH = 512  # sequences of a batch that are sent
STEPS = (20, 2000)  # that can be shown at once


def lanes_of(trace: Trace) -> Lanes:
    """Shared by the timelines of a trace; used under their playhead's lock."""
    return Lanes(trace, trace.playhead.model(KnownRows))


class Timeline(View):
    """A lane for each request: queued, prefill chunks, decode steps, preempted, finished; and the batch of a step in cross-section.

    It shows the last `steps` steps, or as many around the moment that is looked back at. Drag in it to look back.

    >>> Timeline(engine, steps=300)    # doctest: +SKIP
    """

    title = "Timeline"
    _esm = module("timeline.js")
    _css = style("timeline.css")

    @checks_keywords()
    def __init__(self, source: Engine | Trace, *, steps: int = 200) -> None:
        self._steps = _checked(steps)
        super().__init__(source)

    @property
    def steps(self) -> int:
        """How many steps are shown at once."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = _checked(steps)
        self.playhead.look()

    # ── a View's ────────────────────────────────────────────────────────────────────────────────────────────────────

    def stamp(self) -> tuple[Any, ...]:
        return (*super().stamp(), self._steps, len(self.playhead.trace.sequences))

    def state(self) -> dict[str, Any]:
        trace, lanes = self.playhead.trace, self._lanes_now()
        first, end = self.window()
        drawn, left_out = self._drawn(lanes, first, end)
        records = trace.since(first)[: end - first]
        times = np.array([record.time for record in records])
        return {
            "window": [first, end],
            "steps": self._steps,
            "kinds": KINDS,
            "times": ((times - times[:1]) * 1e4).astype(int).tolist(),  # tenths of milliseconds
            "left_out": left_out,
            "lanes": drawn,
            "batch": self._batch(lanes, self.playhead.record),
        }

    def picture(self) -> str:
        lanes = self._lanes_now()
        return draw_lanes(lanes, self.window(), self.playhead.number)

    def summary(self) -> str:
        with self.playhead.lock:
            lanes = self._lanes_now().lanes.values()
            trace = self.playhead.trace
            ended = sum(1 for lane in lanes if lane.ended >= 0)
            return f"{len(lanes)} sequences, {ended} of them finished, in steps up to {trace.last.step if trace.last else 'none yet'}"

    def act(self, name: str, value: Any) -> None:
        if name == "steps":
            self.steps = value
        else:
            super().act(name, value)

    # ── at the playhead's moment ────────────────────────────────────────────────────────────────────────────────────

    def window(self) -> tuple[int, int]:
        """The records that are shown, [first, end)."""
        trace, playhead = self.playhead.trace, self.playhead
        end = trace.end if playhead.live else min(trace.end, max(playhead.number + self._steps // 2, trace.first + self._steps))
        return max(trace.first, end - self._steps), end

    def _lanes_now(self) -> Lanes:
        lanes = self.playhead.model(lanes_of)
        lanes.follow()
        return lanes

    def _drawn(self, lanes: Lanes, first: int, end: int) -> tuple[list[list[Any]], int]:
        """[uid, name, why it ended, runs] of the newest lanes, and how many are left out; prefill chunks in a row are one run where there are many."""
        found = lanes.within(first, end)
        shown = [(lane, lane.between(first, end)) for lane in found[-LANES:]]
        room, drawn = RUNS - (end - first) // 3, []
        if sum(len(runs) + 2 for _, runs in shown) > room:
            shown = [(lane, _merged(runs)) for lane, runs in shown]
        for lane, runs in reversed(shown):
            room -= len(runs) + 2
            if room < 0:
                break
            drawn.append([lane.uid, lane.name, lane.reason if 0 <= lane.ended < end else "", runs])
        return drawn[::-1], len(found) - len(drawn)

    def _batch(self, lanes: Lanes, record: StepRecord | None) -> dict[str, Any] | None:
        """Who took part in the step at the playhead, each with its tokens: [uid, name, first position, tokens, whether of a prompt]."""
        if record is None:
            return None
        rows = []
        for uid, start, count in zip(record.uids[:BATCH], record.starts, record.counts, strict=False):
            lane = lanes.lanes.get(uid) or Lane(uid, sequence_name(lanes.trace, uid))
            prompt = count > 1 or start + count < lane.prompt_len
            rows.append([uid, lane.name, start, count, int(prompt)])
        return {
            "step": record.step,
            "rows": rows,
            "left_out": max(0, len(record.uids) - BATCH),
            "tokens": record.num_tokens,
            "waiting": record.num_waiting,
            "preempted": len(record.preempted),
            "admitted": len(record.admitted),
            "finished": len(record.finished),
        }


def _merged(runs: list[list[int]]) -> list[list[int]]:
    """The same, with runs of prefill that touch as one."""
    merged: list[list[int]] = []
    for run in runs:
        if merged and run[0] == merged[-1][0] == PREFILL and run[1] == merged[-1][2]:
            merged[-1][2:] = [run[2], merged[-1][3] + run[3]]
        else:
            merged.append(list(run))
    return merged


def _checked(steps: Any) -> int:
    number = as_int(steps)
    if number is None or not STEPS[0] <= number <= STEPS[1]:
        raise ValueError(f"steps must be a whole number from {STEPS[0]} to {STEPS[1]}, not {steps!r}")
    return number

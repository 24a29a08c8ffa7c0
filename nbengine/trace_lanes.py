"""What each sequence of a trace did when: waited, computed its prompt, decoded, waited again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nbengine.trace import StepRecord, Trace

Doing = Literal["queued", "prefill", "decode", "preempted"]


@dataclass(slots=True)
class Span:
    """[begin, end): seconds on the engine's clock in which a sequence did one thing."""

    doing: Doing
    begin: float
    end: float


@dataclass(slots=True)
class Lane:
    """A sequence's spans, in order; `reason` is why it finished, if it has."""

    uid: int
    label: str
    spans: list[Span]
    reason: str | None = None


def lanes(trace: Trace) -> list[Lane]:
    """One for each sequence that the trace still speaks of, in order of arrival."""
    found: dict[int, Lane] = {}
    records, truncated = trace.records, trace.first > 0
    if not records:
        return []
    now, since = records[-1].time + records[-1].duration, records[0].time if truncated else 0.0
    for record in records:
        _follow(trace, record, found, since)
    for uid in list(trace.sequences):
        lane = _lane(trace, uid, found, now, since)
        if lane.reason is None and lane.spans[-1].doing in {"queued", "preempted"}:
            lane.spans[-1].end = now
    return [found[uid] for uid in sorted(found)]


def _follow(trace: Trace, record: StepRecord, found: dict[int, Lane], since: float) -> None:
    end = record.time + record.duration
    for uid in record.preempted:
        if uid in found:
            _go_on(found[uid], "preempted", record.time, record.time)
    sampled_alone = [uid for uid in record.sampled if uid not in found and uid not in record.uids]
    for uid, start, count in zip(record.uids, record.starts, record.counts, strict=True):
        info = trace.sequences.get(uid)
        decodes = count == 1 and (info is None or start >= info.prompt_len)
        _go_on(_lane(trace, uid, found, record.time, since), "decode" if decodes else "prefill", record.time, end)
    for uid in sampled_alone:  # it forked from another's prompt
        _go_on(_lane(trace, uid, found, record.time, since), "prefill", record.time, end)
    for uid, reason in record.finished:
        lane = _lane(trace, uid, found, end, since)
        lane.reason = reason
        if lane.spans[-1].doing in {"queued", "preempted"}:
            lane.spans[-1].end = end


def _lane(trace: Trace, uid: int, found: dict[int, Lane], now: float, since: float) -> Lane:
    """A sequence's lane; a new one begins with its arrival, or where the trace does."""
    if uid not in found:
        info = trace.sequences.get(uid)
        arrival = now if info is None else min(max(info.arrival, since), now)
        found[uid] = Lane(uid, _label(trace, uid), [Span("queued", arrival, now)])
    return found[uid]


def _go_on(lane: Lane, doing: Doing, begin: float, end: float) -> None:
    last = lane.spans[-1]
    if last.doing == doing:
        last.end = end
        return
    last.end = begin  # what it did goes on until it does something else
    lane.spans.append(Span(doing, begin, end))


def _label(trace: Trace, uid: int) -> str:
    info = trace.sequences.get(uid)
    return f"#{uid}" if info is None else info.request_id if info.index == 0 else f"{info.request_id}/{info.index}"

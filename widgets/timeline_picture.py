"""The timeline as a static SVG: what a saved notebook shows where no script runs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from nbengine.widgets.lanes import DECODE, HELD, OPEN, PREEMPTED, PREFILL, QUEUED

if TYPE_CHECKING:
    from nbengine.widgets.lanes import Lane, Lanes

WIDTH, GUTTER, MOST = 640, 56, 64  # the last: lanes that are drawn
COLOURS = {QUEUED: "#9a9a9a", PREFILL: "#e69f00", DECODE: "#0072b2", PREEMPTED: "#d55e00", HELD: "#9a9a9a"}
HEIGHTS = {QUEUED: 0.2, PREFILL: 1.0, DECODE: 0.6, PREEMPTED: 0.2, HELD: 0.1}  # of a lane: colour is not the only sign
PAPER, INK = "#ffffff", "#333333"


def draw_lanes(lanes: Lanes, window: tuple[int, int], at: int) -> str:
    """The newest lanes of a window, with a line at the playhead."""
    first, end = window
    found = lanes.within(first, end)
    high = max(5, min(14, 480 // max(1, min(len(found), MOST))))
    shown = found[-MOST:]
    scale = (WIDTH - GUTTER) / max(1, end - first)
    parts = [_lane(lane, window, high * row, high, scale) for row, lane in enumerate(shown)]
    height = max(1, len(shown)) * high
    line = f'<path d="M{GUTTER + (at + 0.5 - first) * scale:.1f} 0v{height}" stroke="{INK}" stroke-width="1"/>' if first <= at < end else ""
    more = f", {len(found) - MOST} earlier sequences left out" if len(found) > MOST else ""
    text = f"records {first} to {end - 1}: prefill (orange, high), decode (blue), queued (grey, thin), preempted (red, thin){more}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 16} {height + 32}" width="{WIDTH + 16}" role="img" '
        f'style="max-width:100%" font-family="sans-serif" font-size="10" fill="{INK}"><title>{escape(text)}</title>'
        f'<rect width="100%" height="100%" fill="{PAPER}"/><g transform="translate(8 8)">{"".join(parts)}{line}'
        f'<text x="0" y="{height + 16}">{escape(text)}</text></g></svg>'
    )


def _lane(lane: Lane, window: tuple[int, int], top: float, high: int, scale: float) -> str:
    first, end = window
    drawn = f'<text x="0" y="{top + high - 2}">{escape(lane.name)}</text>' if high >= 9 else ""
    for kind, begin, stop, _ in lane.between(first, end):
        tall = max(1.0, (high - 1) * HEIGHTS[kind])
        x, width = GUTTER + (begin - first) * scale, max(0.5, (stop - begin) * scale - (0.5 if kind == PREFILL else 0))
        drawn += f'<rect x="{x:.1f}" y="{top + (high - tall) / 2:.1f}" width="{width:.1f}" height="{tall:.1f}" fill="{COLOURS[kind]}"/>'
    if lane.ended != OPEN and first <= lane.ended < end:
        x = GUTTER + (lane.ended + 1 - first) * scale
        drawn += f'<path d="M{x:.1f} {top}v{high - 1}" stroke="{INK}" stroke-width="1.5"/>'
    return drawn

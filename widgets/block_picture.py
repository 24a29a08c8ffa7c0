"""The block table as a static SVG: what a saved notebook shows where no script runs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from nbengine.widgets.followed_pool import CACHED, COPIED, HELD, SHARED
from nbengine.widgets.palette import colour_of

if TYPE_CHECKING:
    from nbengine.widgets.cells import Cells

WIDTH = 640
MOST = 2000  # cells; a larger pool is drawn in groups, and says so
PAPER, INK, FAINT, GREY = "#ffffff", "#333333", "#d9d9d9", "#9a9a9a"


def draw_blocks(cells: Cells, chosen: int | None = None) -> str:
    """Each cell a rectangle, filled from below; groups show their shares of held (grey) and, at the right, cached (hatched) blocks."""
    blocks = cells.num_blocks
    group = -(-blocks // MOST)
    count = -(-blocks // group)
    side = next(side for side in (20, 16, 12, 10, 8, 7, 6) if side * side * count <= WIDTH * 260 or side == 6)
    columns = WIDTH // side
    rows = -(-count // columns)
    parts = [_cell(cells, cell, group, chosen, side, columns) for cell in range(count)]
    height, totals = rows * side + 44, cells.totals()
    lines = [
        (
            f"{totals['held']} of {blocks} blocks held · {totals['shared']} shared · {totals['copied']} copied on write · "
            f"{totals['cached']} cached and free"
        ),
        f"after record {cells.number}" + (f" · one cell for {group} blocks" if group > 1 else "") + f" · {cells.trace.name}",
    ]
    text = "".join(f'<text x="8" y="{rows * side + 26 + 14 * i}">{escape(line)}</text>' for i, line in enumerate(lines))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 16} {height + 8}" width="{WIDTH + 16}" role="img" '
        f'style="max-width:100%" font-family="sans-serif" font-size="11" fill="{INK}"><title>{escape(lines[0])}</title>'
        f'<defs><pattern id="cached" width="4" height="4" patternUnits="userSpaceOnUse"><path d="M0 4L4 0" stroke="{GREY}"/></pattern></defs>'
        f'<rect width="100%" height="100%" fill="{PAPER}"/><g transform="translate(8 8)">{"".join(parts)}</g>{text}</svg>'
    )


def _cell(cells: Cells, cell: int, group: int, chosen: int | None, side: int, columns: int) -> str:
    kinds, size = cells.kinds, cells.trace.block_size
    blocks = range(cell * group, min((cell + 1) * group, cells.num_blocks))
    x, y, inner = cell % columns * side, cell // columns * side, side - 1
    owners = {uid for block in blocks for uid in cells.holders(block)}
    held = [block for block in blocks if kinds[block] & HELD]
    cached = [block for block in blocks if kinds[block] & CACHED]
    drawn = f'<rect x="{x}" y="{y}" width="{inner}" height="{inner}" fill="none" stroke="{FAINT}" stroke-width=".5"/>'
    if held:
        first = cells.owners[held[0]]
        colour = colour_of(first) if group == 1 or len(owners) == 1 else GREY
        share = sum(cells.slots(block) for block in held) / (len(blocks) * size)
        faded = "" if chosen is None or chosen in owners else ' opacity=".25"'
        high = inner * share
        drawn += f'<rect x="{x}" y="{y}" width="{inner}" height="{inner}" fill="{colour}" fill-opacity=".25"{faded}/>'
        drawn += f'<rect x="{x}" y="{y + inner - high:.1f}" width="{inner}" height="{high:.1f}" fill="{colour}"{faded}/>'
        if group == 1 and kinds[held[0]] & SHARED:
            drawn += (
                f'<circle cx="{x + inner / 2}" cy="{y + inner / 2}" r="{side / 5:.1f}" fill="{PAPER}" stroke="{INK}" stroke-width=".7"/>'
            )
        if group == 1 and kinds[held[0]] & COPIED:
            drawn += f'<path d="M{x + inner} {y}v{inner / 2:.1f}L{x + inner / 2:.1f} {y}z" fill="{INK}"/>'
    if cached:
        high, wide = inner * len(cached) / len(blocks), inner if group == 1 else max(1, inner // 3)
        place = f'x="{x + inner - wide}" y="{y + inner - high:.1f}" width="{wide}" height="{high:.1f}"'
        drawn += (f'<rect {place} fill="{PAPER}"/>' if held else "") + f'<rect {place} fill="url(#cached)"/>'
    return drawn

"""The block table: every physical KV block as a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbengine.checks import as_int, checks_keywords
from nbengine.widgets.block_facts import SHOWN, block_facts, sequence_name
from nbengine.widgets.block_picture import draw_blocks
from nbengine.widgets.cells import Cells
from nbengine.widgets.followed_pool import CACHED, HELD
from nbengine.widgets.view import View, module, style

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.trace import Trace

NAMED = 400  # sequences; of more only their numbers are sent, so that the whole stays under 50 kB
TOLD = 5  # names of sequences, where another was asked for
TABLE = 512  # entries of a chosen sequence's table; of a longer one the beginning and the end


class BlockTableView(View):
    """Every physical KV block as a cell, coloured by the sequence that owns it, filled as far as its slots are used.

    Hover or focus a cell for what is in it; choose a sequence to see its page table, whose entries tell of their blocks where a cell
    stands for several. `view.choose("r3")` does it from Python.

    >>> BlockTableView(engine)                     # doctest: +SKIP
    >>> BlockTableView(Trace.load("run.trace"))    # doctest: +SKIP
    """

    title = "KV blocks"
    _esm = module("block_table.js")
    _css = style("block_table.css")

    @checks_keywords()
    def __init__(self, source: Engine | Trace) -> None:
        self._chosen: int | None = None
        self._asked: int | None = None  # the cell, a block or a group of blocks, that somebody points at
        self._block: int | None = None  # or the one block, in a page table
        super().__init__(source)

    def choose(self, sequence: str | int | None) -> None:
        """Light up the table of a sequence, by its uid or by the name that the view shows; None: of nobody."""
        uid = as_int(sequence)
        if sequence is not None and uid is None:
            trace = self.playhead.trace
            uid = next((uid for uid in list(trace.sequences) if sequence_name(trace, uid) == sequence), None)
            if uid is None:
                there = ", ".join(sequence_name(trace, uid) for uid in list(trace.sequences)[-TOLD:]) or "none"
                raise ValueError(f"no sequence is called {sequence!r} in this trace; the last ones are {there}")
        self._chosen = uid
        self.playhead.look()

    # ── a View's ────────────────────────────────────────────────────────────────────────────────────────────────────

    def stamp(self) -> tuple[Any, ...]:
        return (*super().stamp(), self._chosen, self._asked, self._block)

    def state(self) -> dict[str, Any]:
        cells = self._cells_now()
        trace = cells.trace
        uids = sorted(cells.tables)
        return {
            "size": trace.block_size,
            **cells.encode(),
            "uids": uids,
            "names": [sequence_name(trace, uid) for uid in uids] if len(uids) <= NAMED else [],
            "table": self._table(cells),
            "facts": self._facts(cells),
        }

    def picture(self) -> str:
        return draw_blocks(self._cells_now(), self._chosen)

    def summary(self) -> str:
        with self.playhead.lock:
            totals = self._cells_now().totals()
        size = self.playhead.trace.block_size
        return (
            f"{totals['held']} of {totals['blocks']} blocks of {size} tokens held ({totals['shared']} shared, {totals['copied']} copied on "
            f"write), {totals['cached']} cached and free, {totals['slots']} of {totals['held'] * size} slots of held blocks used"
        )

    def act(self, name: str, value: Any) -> None:
        if name == "choose":
            self.choose(value)
        elif name == "inspect":
            self._asked, self._block = as_int(value), None
            self.playhead.look()
        elif name == "block":
            self._asked, self._block = None, as_int(value)
            self.playhead.look()
        else:
            super().act(name, value)

    # ── at the playhead's moment ────────────────────────────────────────────────────────────────────────────────────

    def _cells_now(self) -> Cells:
        cells = self.playhead.model(Cells)
        cells.seek(self.playhead.number)
        return cells

    def _table(self, cells: Cells) -> dict[str, Any] | None:
        """The chosen sequence's table, logical to physical; past its end, or while it waits, an empty one."""
        if self._chosen is None:
            return None
        blocks = cells.tables.get(self._chosen, [])
        left_out = max(0, len(blocks) - TABLE)
        return {
            "uid": self._chosen,
            "name": sequence_name(cells.trace, self._chosen),
            "length": cells.computed.get(self._chosen, 0) if blocks else 0,
            "blocks": blocks if not left_out else blocks[: TABLE // 2] + blocks[-TABLE // 2 :],
            "left_out": left_out,
        }

    def _facts(self, cells: Cells) -> dict[str, Any] | None:
        """What is known of the cell, or of the one block, that somebody points at."""
        if self._block is not None:
            return block_facts(cells, self._block) if 0 <= self._block < cells.num_blocks else None
        group = cells.group
        if self._asked is None or not 0 <= self._asked * group < cells.num_blocks:
            return None
        if group == 1:
            return block_facts(cells, self._asked)
        blocks = range(self._asked * group, min((self._asked + 1) * group, cells.num_blocks))
        owners = list(dict.fromkeys(uid for block in blocks for uid in cells.holders(block)))
        return {
            "cell": self._asked,
            "blocks": [blocks[0], blocks[-1]],
            "held": sum(1 for block in blocks if cells.kinds[block] & HELD),
            "cached": sum(1 for block in blocks if cells.kinds[block] & CACHED),
            "owners": [[uid, sequence_name(cells.trace, uid), 0] for uid in owners[:SHOWN]],
            "sequences": len(owners),
        }

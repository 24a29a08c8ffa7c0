"""What there is to know of one block at a moment of a trace: looked up when somebody asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbengine.widgets.followed_pool import HELD

if TYPE_CHECKING:
    from nbengine.trace import SequenceInfo, Trace
    from nbengine.widgets.cells import Cells

SHOWN = 64  # tokens of a block that are shown, and owners that are named


def sequence_name(trace: Trace, uid: int) -> str:
    """`r3`, or `r3/1` for the second output of a request."""
    info = trace.sequences.get(uid)
    if info is None:
        return f"#{uid}"
    return f"{info.request_id}/{info.index}" if info.index else info.request_id


def block_facts(cells: Cells, block: int) -> dict[str, Any]:
    """Everything about a block, as JSON values."""
    trace, digest = cells.trace, cells.hashes[block]
    holders = cells.holders(block)
    owners = [[uid, sequence_name(trace, uid), cells.tables[uid].index(block)] for uid in holders[:SHOWN]]
    slots = cells.slots(block)
    return {
        "block": block,
        "references": len(holders),
        "hash": None if digest is None else digest.hex()[:16],
        "owners": owners,
        "slots": slots,
        "copy_of": cells.copied.get(block),
        "tokens": _tokens(cells, block, owners, slots),
        **_age(cells, block),
    }


def _age(cells: Cells, block: int) -> dict[str, Any]:
    """When the block was last taken, and for a cached one when its last holder let it go; None: before the trace begins."""
    trace = cells.trace
    records = trace.since(trace.first)[: cells.number - trace.first + 1]
    found: dict[str, Any] = {"taken": None, "freed": None}
    if not records:
        return found
    now = records[-1]
    for record in reversed(records):
        for event in reversed(record.events):
            if event[0] not in {"take", "free"} or event[1] != block:
                continue
            name = "taken" if event[0] == "take" else "freed"
            if found[name] is None and not (name == "freed" and cells.kinds[block] & HELD):
                found[name] = [now.step - record.step, round(now.time - record.time, 3)]
            if name == "taken":
                return found
    return found


def _tokens(cells: Cells, block: int, owners: list[Any], slots: int) -> list[Any] | None:
    """[id, text] of each token whose keys and values are in the block; None where nobody knows any more."""
    trace, size = cells.trace, cells.trace.block_size
    if slots == 0:
        return []
    for uid, _, logical in owners:
        found = _slice(trace.sequences.get(uid), size * logical, slots)
        if found:
            return _named(trace, found)
    uid, logical = _sealed_by(cells, block) or (None, 0)
    return _named(trace, _slice(trace.sequences.get(uid), size * logical, size)) if uid is not None else None


def _slice(info: SequenceInfo | None, start: int, count: int) -> list[int]:
    return [] if info is None else list(info.tokens[start : start + count])


def _named(trace: Trace, tokens: list[int]) -> list[Any] | None:
    text = trace.token_text
    return [[token, None if text is None else text(token)] for token in tokens[:SHOWN]] or None


def _sealed_by(cells: Cells, block: int) -> tuple[int, int] | None:
    """Which sequence filled a block that nobody holds now, and where in its table it stood then."""
    trace, digest = cells.trace, cells.hashes[block]
    for number in range(cells.number, trace.first - 1, -1):
        events = trace.record(number).events
        if ("seal", block, digest) not in events:
            continue
        state = trace.state(number - 1) if number > trace.first else trace.start()
        state.apply(events[: events.index(("seal", block, digest))])
        return next(((uid, table.index(block)) for uid, table in state.tables.items() if block in table), None)
    return None

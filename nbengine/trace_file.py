"""A trace as a file: gzipped lines of JSON, the first of which says what it is. Reading one runs nothing and needs no engine."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import fields
from operator import add
from pathlib import Path
from typing import Any

from nbengine.blocks import BlockPool
from nbengine.checks import as_int
from nbengine.errors import TraceFileError
from nbengine.pool_state import PoolState
from nbengine.trace import SequenceInfo, StepRecord, Trace

FORMAT, VERSION = "nbengine-trace", 1
COUNTS = [f.name for f in fields(StepRecord) if f.type == "int"]
TIMES = [f.name for f in fields(StepRecord) if f.type == "float"]
LISTS = ["sampled", "admitted", "preempted", "finished"]
MOST_BLOCKS, MOST_SLOTS, MOST_RECORDS = 1 << 24, 1 << 32, 1 << 22  # of a file that is believed
MOST = 1 << 40  # of anything else in it
DAMAGED = (EOFError, zlib.error, StopIteration, LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError)


def save_trace(trace: Trace, path: str | Path) -> Path:
    """Write what is in the ring now, the tokens of its sequences included."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with gzip.open(part, "wt", encoding="utf-8", compresslevel=5) as file:
            for line in _lines(trace):
                file.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load_trace(path: str | Path) -> Trace:
    """Read a file that `save_trace` wrote."""
    path = Path(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = iter(file)
            head = _head(path, next(lines, ""))
            return _read(head, (json.loads(line) for line in lines))
    except (gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise TraceFileError(f"{path} is no trace file: use one that trace.save(path) wrote") from error
    except DAMAGED as error:
        if isinstance(error, TraceFileError):
            raise
        raise TraceFileError(f"{path} is damaged or cut short ({type(error).__name__}: {error}): save the trace again") from error


def _head(path: Path, line: str) -> dict[str, Any]:
    """The first line, if it is one of ours."""
    try:
        head = json.loads(line)
    except ValueError:
        head = None
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise TraceFileError(f"{path} is no trace file: use one that trace.save(path) wrote")
    if head.get("version") != VERSION:
        raise TraceFileError(
            f"{path} is of version {head.get('version')}, and this nbengine reads version {VERSION}: use the one that wrote it"
        )
    return head


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _lines(trace: Trace) -> Iterator[dict[str, Any]]:
    start, first, records = trace.snapshot()
    sequences = dict(trace.sequences)
    used = {token for info in sequences.values() for token in list(info.tokens)}
    text = trace.token_text
    yield {
        "format": FORMAT,
        "version": VERSION,
        "name": trace.name,
        "num_blocks": trace.num_blocks,
        "block_size": trace.block_size,
        "capacity": trace.capacity,
        "first": first,
        "records": len(records),
    }
    yield _state(start)
    yield {"sequences": [_sequence(uid, info) for uid, info in sequences.items()]}
    yield {"texts": None if text is None else {token: text(token) for token in sorted(used)}}
    before = StepRecord(-1, 0.0)
    for record in records:
        yield _record(record, before)
        before = record


def _state(state: PoolState) -> dict[str, Any]:
    return {
        "references": state.references,
        "hashes": {block: digest.hex() for block, digest in enumerate(state.hashes) if digest is not None},
        "blank": state.blank,
        "cached": list(state.cached),
        "copied": list(state.copied.items()),
        "tables": list(state.tables.items()),
    }


def _sequence(uid: int, info: SequenceInfo) -> list[Any]:
    last = None if info.last_step == sys.maxsize else info.last_step
    return [uid, info.request_id, info.index, info.prompt_len, info.arrival, last, list(info.tokens)]


def _record(record: StepRecord, before: StepRecord) -> dict[str, Any]:
    """What goes on as in the record before is left out: who ran, single tokens, and starts that follow from those."""
    line: dict[str, Any] = {name: getattr(record, name) for name in COUNTS + TIMES if getattr(record, name) != 0}
    line |= {name: getattr(record, name) for name in LISTS if getattr(record, name)}
    if record.uids != before.uids:
        line["uids"] = record.uids
    if any(count != 1 for count in record.counts):
        line["counts"] = record.counts
    if "uids" in line or list(record.starts) != list(map(add, before.starts, before.counts)):
        line["starts"] = list(record.starts)
    if record.events:
        line["events"] = [[*event[:-1], event[-1].hex()] if event[0] == "seal" else event for event in record.events]
    return line


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(head: dict[str, Any], lines: Iterator[Any]) -> Trace:
    count = _whole(head["num_blocks"], 1, MOST_BLOCKS)
    size = _whole(head["block_size"], 1, MOST_SLOTS // count)
    trace = Trace(BlockPool(count, size), max(1, _whole(head["capacity"], 0, MOST_RECORDS), _whole(head["records"], 0, MOST_RECORDS)))
    trace.name = _text(head["name"])
    start = _read_state(next(lines))
    for uid, request_id, index, prompt_len, arrival, last, tokens in next(lines)["sequences"]:
        known = (_text(request_id), _whole(index), _whole(prompt_len), _seconds(arrival), sys.maxsize if last is None else _whole(last))
        trace.sequences[_whole(uid)] = SequenceInfo(*known, tokens=array("q", tokens))
    texts = next(lines)["texts"]
    if texts is not None:
        names = {int(token): str(text) for token, text in texts.items()}
        trace.token_text = lambda token: names.get(token, f"#{token}")
    records, before, count = [], StepRecord(-1, 0.0), len(start.references)
    for line in lines:
        before = _read_record(line, before, count)
        count = next((event[1] for event in reversed(before.events) if event[0] == "resize"), count)
        records.append(before)
    if len(records) != head["records"]:
        raise ValueError(f"{len(records)} of {head['records']} records are there")
    trace.restore(start, _whole(head["first"]), records)
    return trace


def _read_state(line: dict[str, Any]) -> PoolState:
    count = len(line["references"])
    state = PoolState(count)
    state.references = list(map(int, line["references"]))
    for block, digest in line["hashes"].items():
        state.hashes[_block(int(block), count)] = bytes.fromhex(digest)
    state.blank = [_block(block, count) for block in line["blank"]]
    state.cached = dict.fromkeys(_block(block, count) for block in line["cached"])
    state.copied = {_block(target, count): _block(source, count) for target, source in line["copied"]}
    state.tables = {_whole(uid): [_block(block, count) for block in blocks] for uid, blocks in line["tables"]}
    return state


def _read_record(line: dict[str, Any], before: StepRecord, count: int) -> StepRecord:
    uids = _numbers(line["uids"]) if "uids" in line else before.uids
    counts = _numbers(line["counts"]) if "counts" in line else [1] * len(uids)
    starts = line.get("starts")
    rest: dict[str, Any] = {name: _numbers(line.get(name, [])) for name in LISTS if name != "finished"}
    rest |= {name: _whole(line.get(name, 0), -1) for name in COUNTS}  # -1: before the first step
    rest |= {name: _seconds(line.get(name, 0.0)) for name in TIMES}
    record = StepRecord(
        uids=uids,
        counts=counts,
        starts=array("i", map(add, before.starts, before.counts) if starts is None else starts),
        events=_read_events(line.get("events", []), count),
        finished=[(_whole(uid), _text(reason)) for uid, reason in line.get("finished", [])],
        **rest,
    )
    if not len(record.uids) == len(record.counts) == len(record.starts):
        raise ValueError(f"the record of step {record.step} is of three lengths")
    if record.duration < 0:
        raise ValueError(f"step {record.step} ends before it begins")
    return record


ARGUMENTS = {"take": 2, "evict": 1, "share": 2, "copy": 3, "seal": 2, "free": 2, "forget": 0, "resize": 1}  # of each event


def _read_events(lines: list[list[Any]], count: int) -> list[tuple[Any, ...]]:
    events = []
    for line in lines:
        events.append(_read_event(line, count))
        if line[0] == "resize":
            count = line[1]
    return events


def _read_event(event: list[Any], count: int) -> tuple[Any, ...]:
    kind, *arguments = event
    if ARGUMENTS.get(kind) != len(arguments):
        raise ValueError(f"there is no event {event}")
    if kind == "resize":
        return kind, _block(arguments[0], MOST_BLOCKS)
    blocks = 2 if kind == "copy" else 1
    for block in arguments[:blocks]:
        _block(block, count)
    if kind == "seal":
        return kind, arguments[0], bytes.fromhex(arguments[1])
    return (kind, *arguments[:blocks], *map(_whole, arguments[blocks:]))


def _block(block: Any, count: int) -> int:
    if not isinstance(block, int) or not 0 <= block < count:
        raise ValueError(f"there is no block {block}")
    return block


def _whole(value: Any, least: int = 0, most: int = MOST) -> int:
    number = as_int(value)
    if number is None or not least <= number <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return number


def _numbers(values: Any) -> list[int]:
    return array("q", values).tolist()


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not abs(seconds) <= MOST:
        raise ValueError(f"{value!r} is no time in seconds")
    return seconds


def _text(value: Any) -> str:
    """As pictures can show it: without the signs that XML does not allow."""
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in str(value))

"""Who holds a device's memory: engines, the user's own tensors, the rest of this process, other processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbengine.memory import free_ram, size, total_ram
from nbengine.tensor_walk import LAST_OUTPUTS, Found, Place, clear_frames, find_tensors

if TYPE_CHECKING:
    from nbengine.engine import Engine

SHOWN = 6  # lines of an explanation
REST = ("process", "others")  # holders that no name leads to
SMALL = 1 << 20  # bytes that are not worth a line beside larger ones


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who holds memory; names and numbers only, so that to keep one keeps nothing else."""

    kind: str  # "engine", "variable", "output", "traceback", "process" (the rest of this one) or "others"
    name: str  # "engine 'tales'", "variable x", "Out[3]", ...
    device: str
    nbytes: int
    advice: str = ""  # what to type to free it; "" where nothing is known
    also: tuple[str, ...] = ()  # other places that keep some of the same memory: it is free when they have let go too


def holders(device: Any, engines: Mapping[str, Engine], namespace: Mapping[str, Any]) -> list[Holder]:
    """Who holds memory on a device ("cpu", "cuda:1"), the largest first; `engines` by the names that `%engine` gives them.

    Engines and tensors are looked for among the variables of `namespace`, in its `Out` and in the frames of the last traceback.
    Engines count with what they have reserved: on a CPU, pages of a cache that were never written take no memory yet.
    """
    name = _device_name(device)
    walk = find_tensors(namespace)
    own = [*_engines(engines, walk.engines, name), *_tensors(walk.found, name)]
    rest = _of_card(name, own) if name.startswith("cuda") else _of_ram(name, own)
    return sorted((one for one in [*own, *rest] if one.nbytes > 0), key=lambda one: -one.nbytes)


def explain(found: Iterable[Holder]) -> str:
    """A few lines for an error message: who holds the memory, and what to type to have it back."""
    found = sorted(found, key=lambda one: -one.nbytes)
    if not found:
        return "nothing that can be seen from here holds the memory"
    place = "the card" if found[0].device.startswith("cuda") else "the memory"
    own = [one for one in found if one.kind not in REST]
    shown = [one for one in own if one.nbytes >= SMALL][:SHOWN]
    lines = [f"{place} ({found[0].device}) is full:", *map(_line, shown)]
    if smaller := [one for one in own if one not in shown]:
        what = f"{len(smaller)} more hold" if len(smaller) > 1 else f"{smaller[0].name} holds"
        lines.append(f"  {what} {size(sum(one.nbytes for one in smaller))}")
    return "\n".join([*lines, *(_line(one) for one in found if one.kind in REST)])


def forget_traceback() -> None:
    """Let go of what the frames of the last traceback hold; it can still be shown, and `%debug` finds no variables in it any more."""
    clear_frames()


def _line(holder: Holder) -> str:
    several = holder.kind == "others"
    also = f", as {'do' if len(holder.also) > 1 else 'does'} {', '.join(holder.also)}" if holder.also else ""
    advice = f" ({holder.advice})" if holder.advice else ""
    return f"  {holder.name} {'hold' if several else 'holds'} {size(holder.nbytes)}{also}{advice}"


def _device_name(device: Any) -> str:
    """`cpu` or `cuda:N`."""
    name = str(device)
    torch = sys.modules.get("torch")
    return f"cuda:{torch.cuda.current_device()}" if name == "cuda" and torch is not None else name


# ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _engines(named: Mapping[str, Engine], met: Iterable[tuple[str, Engine]], device: str) -> Iterator[Holder]:
    """Those that `%engine` knows, then those that a variable holds."""
    seen: set[int] = set()
    everyone = [(f"engine {name!r}", f"%engine unload {name}", engine) for name, engine in named.items()]
    everyone += [(f"the engine of {engine.config.model!r} in {place}", "its close() frees it", engine) for place, engine in met]
    for name, advice, engine in everyone:
        if id(engine) not in seen and engine.info.device == device:
            yield Holder("engine", name, device, _held(engine), advice)
        seen.add(id(engine))


def _held(engine: Engine) -> int:
    """Weights and KV cache, less what `sleep` gave back."""
    memory, status = engine.info.memory, engine.status
    if status in {"closed", "dead"}:
        return 0
    if status != "asleep":
        return memory.weights + memory.kv_cache
    return 0 if getattr(engine, "sleep_level", 1) == 2 else memory.weights


# ── tensors ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tensors(found: Iterable[Found], device: str) -> Iterator[Holder]:
    """One holder for each place; a storage counts where it is met first."""
    owners: dict[tuple[str, int], Place] = {}
    totals: dict[Place, int] = {}
    also: dict[Place, dict[Place, None]] = {}  # in order
    for one in found:
        if one.device != device:
            continue
        owner = owners.get(one.storage)
        if owner is None:
            owners[one.storage] = one.place
            totals[one.place] = totals.get(one.place, 0) + one.nbytes
        elif owner != one.place:
            also.setdefault(owner, {})[one.place] = None
    for place, nbytes in totals.items():
        others = also.get(place, {})
        yield Holder(place.kind, place.name, device, nbytes, _advice([place, *others]), tuple(other.name for other in others))


def _advice(places: list[Place]) -> str:
    """What to type to let go in all places; `_` goes with the numbered output that it is."""
    numbered = any(place.name.startswith("Out[") for place in places)
    return "; ".join(dict.fromkeys(place.advice for place in places if not (numbered and place.name in LAST_OUTPUTS)))


# ── the rest ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _of_card(device: str, own: list[Holder]) -> Iterator[Holder]:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    unused = reserved - allocated
    accounted = sum(one.nbytes for one in own)
    advice = f"torch.cuda.empty_cache() gives {size(unused)} of it back" if unused >= SMALL else ""
    yield Holder("process", "the rest of this process", device, reserved - accounted, advice)
    yield Holder("others", "other processes and CUDA itself", device, total - free - reserved)


def _of_ram(device: str, own: list[Holder]) -> Iterator[Holder]:
    resident = _resident()
    yield Holder("process", "the rest of this process", device, resident - sum(one.nbytes for one in own))
    yield Holder("others", "other processes", device, total_ram() - free_ram() - resident)


def _resident() -> int:
    """Bytes of main memory that this process has; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")

"""Where a notebook keeps tensors: its variables, `Out`, and the frames of the last traceback. Keeps none itself."""

from __future__ import annotations

import gc
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, NoneType, TracebackType
from typing import Any

DEPTH = 3  # containers in one another: an optimizer's state is that far from its variable
MOST = 100_000  # objects looked at in one place: huge lists must not hold up an error message
LAST_OUTPUTS = ("_", "__", "___")
OUTPUT = re.compile(r"_\d+")
HIDDEN = re.compile(r"In|Out|_i{1,3}|_i\d+|_ih|_oh|_dh|_exit_code|exit|quit|open|get_ipython|__\w+__")
_SHELLS = ("IPython.", "ipykernel.")  # their frames reach the shell, and through it everything
FORGET = "nbengine.holders.forget_traceback()"
_LEAVES = (NoneType, str, bytes, bytearray, int, float, complex, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, CodeType)


@dataclass(frozen=True, slots=True)
class Place:
    """Where to look, and what to type to let go of what is there."""

    kind: str  # "variable", "output" or "traceback"
    name: str  # "variable x", "Out[3]"
    advice: str


@dataclass(frozen=True, slots=True)
class Found:
    """One tensor in one place."""

    place: Place
    device: str
    storage: tuple[str, int]  # device and address: tensors that share memory have the same
    nbytes: int  # of the whole storage, which a view keeps too


@dataclass
class Walk:
    """What was found."""

    found: list[Found] = field(default_factory=list)
    engines: list[tuple[str, Any]] = field(default_factory=list)  # nbengine's, by an expression that leads there or the place's name


def find_tensors(namespace: Mapping[str, Any]) -> Walk:
    """Look through a notebook's variables. Without torch there are no tensors, and torch is not imported for this."""
    walk = Walk()
    torch = sys.modules.get("torch")
    if torch is None:
        return walk
    for place, value in _places(namespace):
        for tensor in _tensors_in(value, walk, place, {id(namespace)}):
            _record(walk, place, tensor)
    return walk


def _places(namespace: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
    """The user's own variables first: what they share with an output counts as theirs."""
    entries = list(namespace.items())
    for name, value in entries:
        if not (HIDDEN.fullmatch(name) or OUTPUT.fullmatch(name) or name in LAST_OUTPUTS):
            yield Place("variable", f"variable {name}", f"del {name}"), value
    outputs = namespace.get("Out", namespace.get("_oh"))
    if isinstance(outputs, dict):
        for number, value in list(outputs.items()):
            advice = f"%xdel _{number}" if f"_{number}" in namespace else f"del Out[{number}]"
            yield Place("output", f"Out[{number}]", advice), value
    for name, value in entries:
        if OUTPUT.fullmatch(name):
            yield Place("output", f"Out[{name[1:]}]", f"%xdel {name}"), value  # as `_3` it outlives `del Out[3]`
        elif name in LAST_OUTPUTS:
            yield Place("output", name, f"%xdel {name}"), value  # not %reset: IPython keeps these in another dict too
    for frame in _frames():
        # its locals as they are: reading f_locals would make a copy of them, which Python 3.11 keeps with the frame
        for value in gc.get_referents(frame):
            yield Place("traceback", "the last traceback", FORGET), value


def clear_frames() -> None:
    """Empty the frames that the last exception keeps."""
    for frame in _frames():
        with suppress(RuntimeError):  # it is still running
            frame.clear()
        frame.f_locals  # noqa: B018 - until Python 3.13 a copy of the locals that somebody read once stays as it was unless it is read again


def _frames() -> Iterator[Any]:
    """Of the last exception and of those that it came from."""
    chain = [getattr(sys, "last_exc", None), getattr(sys, "last_value", None)]
    yield from _frames_of(getattr(sys, "last_traceback", None))
    seen: set[int] = set()
    while chain:
        error = chain.pop()
        if isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            yield from _frames_of(error.__traceback__)
            chain += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]


def _frames_of(traceback: TracebackType | None) -> Iterator[Any]:
    while traceback is not None:
        if not str(traceback.tb_frame.f_globals.get("__name__")).startswith(_SHELLS):
            yield traceback.tb_frame
        traceback = traceback.tb_next


def _tensors_in(value: Any, walk: Walk, place: Place, seen: set[int]) -> Iterator[Any]:
    """The tensors of a value: itself, a module's parameters and buffers, and those of what it contains, the nearest first."""
    torch = sys.modules["torch"]
    queue = deque([(value, DEPTH)])
    for _ in range(MOST):
        if not queue:
            return
        value, depth = queue.popleft()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
            if value.is_leaf and value.grad is not None:
                yield value.grad
        elif _is_engine(value):
            walk.engines.append((place.name.removeprefix("variable "), value))
        elif callable(getattr(type(value), "parameters", None)):
            queue.extend((tensor, 0) for tensor in _of_module(value))
        elif depth > 0:
            queue.extend((item, depth - 1) for item in _items(value) if not isinstance(item, _LEAVES))


def _of_module(module: Any) -> Iterator[Any]:
    for name in ("parameters", "buffers"):
        listed = getattr(module, name, None)
        try:
            yield from listed() if callable(listed) else ()
        except Exception:  # noqa: BLE001, S112 - the user's own code, which may want arguments or a state it does not have
            continue


def _items(value: Any) -> list[Any]:
    """What a container, or a plain object, holds."""
    try:
        if isinstance(value, Mapping):
            return [item for pair in islice(value.items(), MOST) for item in pair]  # an optimizer's keys are parameters
        if isinstance(value, list | tuple | set | frozenset):
            return list(islice(value, MOST))
        if isinstance(value, CellType):  # a local that an inner function uses
            return [value.cell_contents]
        return list(vars(value).values())
    except Exception:  # noqa: BLE001 - a container of the user's own may do anything, or change while it is read
        return []


def _is_engine(value: Any) -> bool:
    module = sys.modules.get("nbengine.engine")
    return module is not None and isinstance(value, module.Engine)


def _record(walk: Walk, place: Place, tensor: Any) -> None:
    try:
        storage = tensor.untyped_storage()
        device, nbytes = str(tensor.device), storage.nbytes()
        key = (device, storage.data_ptr())
    except (NotImplementedError, RuntimeError):  # sparse, fake, deleted: no storage of its own
        return
    if nbytes and device != "meta":
        walk.found.append(Found(place, device, key, nbytes))

"""What can go wrong, in words for the person at the notebook. Every message says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NBEngineError(Exception):
    """Base of nbengine's own errors."""


class ModelNotFoundError(NBEngineError, FileNotFoundError):
    """The model's name or folder leads nowhere, or the hub will not give it."""


class CheckpointError(NBEngineError, ValueError):
    """The weights on disk are damaged, incomplete, or of another shape than the config says."""


class UnsupportedModelError(NBEngineError, ValueError):
    """The checkpoint needs something that is not built (a quantisation method, an architecture)."""


class TraceFileError(NBEngineError, ValueError):
    """The file holds no trace, a damaged one, or one of another version."""


class EngineClosedError(NBEngineError, RuntimeError):
    """The engine was closed before, or while, this was asked."""


class EngineDeadError(NBEngineError, RuntimeError):
    """The engine's loop met an error that it could not give to one request."""


class DeviceMemoryError(NBEngineError, MemoryError):
    """A step found no memory on its device; nothing of it was computed, and a smaller one may fit."""


class DeviceLostError(NBEngineError, RuntimeError):
    """The GPU answers this process no more: nothing that runs on it can go on without another process."""


class EnginePausedError(NBEngineError, RuntimeError):
    """What was asked needs a running engine, and this one is paused or asleep."""


class RequestError(NBEngineError, RuntimeError):
    """One request failed; the engine and every other request go on."""


class EnginePausedWarning(UserWarning):
    """Somebody waits on an engine that is paused or asleep."""


def without_frames(error: BaseException) -> BaseException:
    """The error fit to be kept: no traceback of it, or of what it came from, keeps the engine's frames and their tensors alive."""
    chain: list[BaseException | None] = [error]
    seen: set[int] = set()
    while chain:
        one = chain.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            chain += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return error


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'max_tokens'?` when one of the known names is close, or an empty string."""
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close is not None else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one is close to, if there is one."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)

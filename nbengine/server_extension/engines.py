"""Which engines this server's kernels run, by what they announce, and which of them a model's name means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from nbengine.errors import nearest
from nbengine.serve import announce
from nbengine.serve.refusal import Refusal
from nbengine.server_extension.refusals import unavailable

SHORT = 8  # of a kernel's id: what names carry
LABEL = re.compile(r"([0-9a-zA-Z_-]+?)(?:\.(\d+))?")
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine's HTTP server in a kernel of ours."""

    kernel_id: str
    number: int  # among the engines of its kernel
    pid: int
    models: tuple[str, ...]
    state: str
    secret: str = field(repr=False)
    host: str = ""
    port: int = 0
    socket: str | None = None
    engine_id: str | None = None  # the same for two servers of one engine

    @property
    def short(self) -> str:
        """What follows the @ in a model's full name: the kernel, and the last engine in it that serves the model."""
        return self.kernel_id[:SHORT]

    @property
    def label(self) -> str:
        """What it alone is called."""
        return f"{self.short}.{self.number}"

    @property
    def labels(self) -> dict[str, str]:
        """The same, in metrics."""
        return {"kernel": self.short, "server": str(self.number)}

    def called(self, label: str) -> bool:
        """Is this a name of it: a beginning of its kernel's id that is long enough, with or without its number."""
        named = LABEL.fullmatch(label)
        if named is None:
            return False
        kernel, number = named.groups()
        known = len(kernel) >= SHORT or kernel == self.kernel_id
        return known and self.kernel_id.startswith(kernel) and (number is None or int(number) == self.number)


class Engines:
    """The engines of one server's kernels. Reads their announcements anew each time: a kernel tells nobody when it dies."""

    def __init__(self, kernel_ids: Callable[[], Iterable[str]], folder: str | Path | None = None) -> None:
        self._kernel_ids = kernel_ids
        self._folder = folder
        self._seen: dict[str, tuple[int, frozenset[str]]] = {}  # by kernel: the process that served last, and what

    def live(self) -> list[Engine]:
        """Every engine announced by a process that runs a kernel of ours, the oldest first."""
        kernels = set(self._kernel_ids())
        found = [
            engine for file, told in announce.list_files(self._folder) if (engine := _engine(file, told)) and engine.kernel_id in kernels
        ]
        serving: dict[str, list[Engine]] = {}
        for engine in found:
            serving.setdefault(engine.kernel_id, []).append(engine)
        self._seen = {kernel: seen for kernel, seen in self._seen.items() if kernel in kernels}
        for kernel, engines in serving.items():
            self._seen[kernel] = (engines[-1].pid, frozenset(model for engine in engines for model in engine.models))
        return found

    def find(self, model: str) -> tuple[Engine, str]:
        """The engine that a client's model name means, and that model's name there."""
        engines = self.live()
        name, at, label = model.rpartition("@")
        found = [(engine, model) for engine in _latest(engines, model)]
        if not found and at:
            found = [(engine, name) for engine in _latest([engine for engine in engines if engine.called(label)], name)]
        if len(found) == 1:
            return _awake(*found[0])
        if found:
            names = " or ".join(repr(f"{plain}@{engine.short}") for engine, plain in found)
            raise Refusal(400, f"{len(found)} kernels serve {model!r}: ask for {names}", code="ambiguous_model", param="model")
        if self._restarted(model) or (at and self._restarted(name, label)):
            message = f"the kernel that served {model!r} was restarted and does not serve it yet: run its %engine load and %engine serve"
            raise unavailable(message, "kernel_restarted")
        raise Refusal(404, f"no model {model!r} is served here: {self.offer(engines, model)}", code="model_not_found", param="model")

    def only(self) -> Engine:
        """The engine for a request that names no model."""
        engines = self.live()
        kernels = {engine.kernel_id for engine in engines}
        if not engines:
            raise unavailable(self.offer(engines), "no_engine")
        if len({engine.models for engine in engines}) > 1 or len(kernels) > 1:
            raise Refusal(400, f"name the model: {self.offer(engines)}", code="missing_model", param="model")
        return _awake(engines[-1], "")[0]

    def called(self, label: str) -> Engine:
        """The engine of a kernel, the last where it has several and the label has no number."""
        found = [engine for engine in self.live() if engine.called(label)]
        if len({engine.kernel_id for engine in found}) > 1:
            names = " or ".join(sorted({engine.kernel_id for engine in found}))
            raise Refusal(400, f"{label!r} is the beginning of several kernels: {names}", code="ambiguous_kernel")
        if found:
            return found[-1]
        if any(kernel.startswith(label) and announce.started(pid) is None for kernel, (pid, _) in self._seen.items()):
            raise unavailable(f"kernel {label} was restarted and does not serve yet: run its %engine serve", "kernel_restarted")
        raise Refusal(404, f"no kernel {label!r} serves an engine here", code="kernel_not_found")

    @staticmethod
    def names(engines: list[Engine]) -> dict[str, tuple[Engine, str]]:
        """Every model under the shortest name that means it, as `find` takes it."""
        shown = {}
        for engine in engines:
            for model in engine.models:
                latest = _latest(engines, model)
                full = f"{model}@{engine.short if engine in latest else engine.label}"
                shown[model if latest == [engine] else full] = (engine, model)
        return shown

    def offer(self, engines: list[Engine], model: str = "") -> str:
        """What there is, for a message."""
        names = self.names(engines)
        if not names:
            return "no kernel of this server serves an engine; run %engine load and %engine serve in a notebook"
        return f"there is {', '.join(map(repr, names))}{nearest(model, names)}"

    def _restarted(self, model: str, label: str | None = None) -> bool:
        """Did a kernel serve this until its process ended, and announce nothing since? One whose engine was closed did not."""
        return any(
            model in models and announce.started(pid) is None and (label is None or kernel.startswith(label.partition(".")[0]))
            for kernel, (pid, models) in self._seen.items()
        )


def _latest(engines: list[Engine], model: str) -> list[Engine]:
    """Of each kernel the last engine that serves this: a cell that is run again makes another, and means that."""
    return list({engine.kernel_id: engine for engine in engines if model in engine.models}.values())


def _awake(engine: Engine, model: str) -> tuple[Engine, str]:
    if engine.state == "loading":
        raise unavailable(f"{model or 'the model'} is still loading", "model_loading")
    return engine, model


def _engine(file: Path, told: announce.Announcement) -> Engine | None:
    """None for one of no kernel, or at an address that is not on this machine: its secret is not to travel."""
    kernel, socket, url = told["kernel_id"], told.get("socket"), urlsplit(told.get("url") or "")
    if kernel is None or (socket is None and (url.scheme != "http" or url.hostname not in LOOPBACK or url.port is None)):
        return None
    number = int(file.stem.rpartition("-")[2])
    models = tuple(str(model) for model in told["models"])
    at = (url.hostname or "", url.port or 0, socket)
    return Engine(kernel, number, told["pid"], models, told["state"], told["secret"], *at, engine_id=told.get("engine"))

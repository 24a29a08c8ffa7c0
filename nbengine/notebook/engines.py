"""The engines of one shell by name; one of them is current."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from IPython.core.error import UsageError

from nbengine.engine import Engine
from nbengine.errors import nearest

GONE = ("closed", "dead")


class Engines(Mapping[str, Engine]):
    """What `%engine load` made and `%engine use` took in. An engine that was closed elsewhere is no longer listed."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}
        self._current: str | None = None
        self._owned: set[str] = set()

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, engine in self._engines.items() if engine.status != "closed"])

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def current(self) -> str | None:
        """The name of the engine that a cell uses when it names none."""
        alive = list(self)
        if self._current not in alive:
            self._current = alive[-1] if alive else None
        return self._current

    def add(self, name: str, engine: Engine, *, owned: bool = True) -> None:
        """Take an engine in, as the current one. One that the user made and holds is only forgotten at the end, not closed."""
        self._engines[name] = engine
        self._current = name
        (self._owned.add if owned else self._owned.discard)(name)

    def use(self, name: str) -> None:
        """Make this one the current one."""
        self.find(name)
        self._current = name

    def remove(self, name: str) -> Engine:
        """Forget an engine, without closing it."""
        self.find(name)
        return self._engines.pop(name)

    def find(self, name: str | None = None, variables: Mapping[str, Any] | None = None) -> Engine:
        """The engine of this name (also one that a variable of the user's holds), or the current one."""
        wanted = name or self.current
        if wanted is None:
            raise UsageError("no engine is loaded: run `%engine load tales`, or another model")
        if wanted in self:
            return self._engines[wanted]
        held = (variables or {}).get(wanted)
        engine = getattr(held, "engine", held)  # an LLM has its engine in there
        if isinstance(engine, Engine):
            return engine
        raise UsageError(f"no engine is called {wanted!r}{nearest(wanted, list(self))}; loaded: {', '.join(self) or 'none'}")

    def close(self) -> list[str]:
        """Close what was loaded here; the names of those that were open."""
        names = [name for name in self if name in self._owned]
        for name in names:
            self._engines[name].close()
        self._engines.clear()
        return names

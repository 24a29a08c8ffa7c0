"""The servers of one engine, and what goes over them together. Nothing of a server is imported before there is one."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from nbengine.serve.latency import Latency
from nbengine.serve.traffic import Traffic

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.serve.announce import State
    from nbengine.serve.listener import Listener
    from nbengine.serve.server import Server


class Served:
    """Belongs to an engine, and does not hold it."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.latency = Latency()
        self.listeners: list[Listener] = []

    def open(self, engine: Engine, **options: Any) -> Server:
        """Listen for an engine."""
        from nbengine.serve.listener import Listener
        from nbengine.serve.serve_options import ServeOptions
        from nbengine.serve.server import Server, names_of

        checked = ServeOptions.of(**options)
        engine.get_tokenizer()  # without one there is no text to answer with
        listener = Listener(engine.front, checked, checked.names or names_of(engine.config.model), self.traffic, self.latency)
        self.listeners = [one for one in self.listeners if not one.closed]
        self.listeners.append(listener)  # first: whatever happens now, it is closed with the engine
        listener.engine_of = weakref.ref(engine)
        listener.open("asleep" if engine.status == "asleep" else "ready")
        return Server(listener, engine)

    def tell(self, state: State) -> None:
        """Announce a new state of the engine."""
        for listener in self.listeners:
            listener.state = state

    def stats(self) -> dict[str, Any]:
        """What goes over them."""
        servers = [{"url": one.url, "socket": one.options.uds, "models": list(one.names)} for one in self.listeners if not one.closed]
        return {"servers": servers, **self.traffic.stats()}

    def close(self) -> int:
        """Close all; how many were open."""
        listening = [one for one in self.listeners if not one.closed]
        for listener in self.listeners:  # one that somebody else is closing is waited for
            listener.close()
        return len(listening)

"""A server as its users hold it."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jupyter_core.paths import jupyter_runtime_dir

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.serve.listener import Listener


class Server:
    """What `Engine.serve` returns. It keeps its engine, and either may be closed first.

    >>> with engine.serve() as server:                                                     # doctest: +SKIP
    ...     client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
    """

    def __init__(self, listener: Listener, engine: Engine) -> None:
        self.engine = engine
        self._listener = listener

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._listener.url or f"unix:{self._listener.options.uds}"

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"{self._listener.url or 'http://localhost'}/v1"

    @property
    def socket(self) -> str | None:
        """The path of its Unix socket, if it listens at one."""
        return self._listener.options.uds

    @property
    def api_key(self) -> str:
        """What clients send: the key that was given, or the random one of this server. Shown nowhere but here."""
        return self._listener.options.api_key or self._listener.secret

    @property
    def models(self) -> list[str]:
        """What clients may call the model."""
        return list(self._listener.names)

    @property
    def announcement(self) -> Path | None:
        """The file, readable by its user alone, that tells others on this machine of it."""
        return self._listener.file

    @property
    def closed(self) -> bool:
        return self._listener.closed

    def stats(self) -> dict[str, Any]:
        """`Engine.http_stats()`."""
        return self.engine.http_stats()

    def close(self) -> None:
        """Stop listening; what is still being answered is ended, and clients are told. The engine goes on."""
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ways(self) -> list[tuple[str, str]]:
        """The lines that make a client, and from where each works. No line holds a key."""
        here = f'OpenAI(base_url="{self.base_url}", api_key=server.api_key)'
        if self.socket is not None:
            here = f'OpenAI(base_url="{self.base_url}", api_key=server.api_key, http_client=httpx.Client(transport=httpx.HTTPTransport(uds="{self.socket}")))'
        found = [] if self.socket is not None else [("in any process of yours on this machine", "OpenAI(**nbengine.serve.client())")]
        found.append(("in this process, with this object as `server`", here))
        if (jupyter := jupyter_url()) is not None:
            found.append(("through the Jupyter server", f'OpenAI(base_url="{jupyter}nbengine/v1", api_key="<your Jupyter token>")'))
        return found

    def __repr__(self) -> str:
        if self.closed:
            return f"<Server of {', '.join(self.models)}, closed>"
        lines = [f"  {where}: {line}" for where, line in self.ways()]
        return "\n".join([f"<Server of {', '.join(self.models)} at {self.url}>", *lines])

    def _repr_html_(self) -> str:
        head = (
            f"<b>{html.escape(', '.join(self.models))}</b> {'was' if self.closed else 'is'} served at <code>{html.escape(self.url)}</code>"
        )
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(where)}</td><td style='text-align:left'><code>{html.escape(line)}</code></td></tr>"
            for where, line in ([] if self.closed else self.ways())
        )
        return f"<div>{head}{', closed' if self.closed else f'<table>{rows}</table>'}</div>"


def names_of(model: str) -> tuple[str, ...]:
    """What clients call a model that was loaded under this name: a hub id whole and by its last part, a folder by its last part."""
    last = model.replace("\\", "/").rstrip("/").rpartition("/")[2] or model
    return (last,) if Path(model).exists() or last == model else (model, last)


def jupyter_url() -> str | None:
    """Of the Jupyter server that started this kernel, as that announces itself."""
    parent = os.environ.get("JPY_PARENT_PID", "")
    file = Path(jupyter_runtime_dir()) / f"jpserver-{parent}.json"
    try:
        told = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    url = told.get("url") if isinstance(told, dict) else None
    return url if isinstance(url, str) and url.endswith("/") else None

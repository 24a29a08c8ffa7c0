"""How a server listens and what it bears, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nbengine.checks import as_int
from nbengine.errors import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What `engine.serve(...)` takes.

    >>> ServeOptions.of(port=8000).host
    '127.0.0.1'
    """

    host: str = "127.0.0.1"
    port: int = 0  # 0: any that is free
    uds: str | None = None  # a Unix socket's path, in place of host and port
    api_key: str | None = None  # what clients send; beside it, the secret of the announcement is always taken
    served_model_name: str | tuple[str, ...] | None = None  # in place of the model's own name; the first is told in answers
    max_queue: int = 1024  # outputs that may wait beyond the max_num_seqs that run
    max_body_size: int = 8 << 20  # bytes of a request
    body_timeout: float = 60.0  # seconds that a client may take to send its request
    stall_timeout: float = 120.0  # seconds that a client may take nothing of what it is sent

    @classmethod
    def of(cls, **options: Any) -> ServeOptions:
        """Checked options; an unknown one is refused with the nearest name."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"serve() has no option {name!r}{nearest(name, known)}")
        names = options.get("served_model_name")
        if isinstance(names, list):
            options["served_model_name"] = tuple(names)
        if isinstance(uds := options.get("uds"), str | Path) and str(uds):
            options["uds"] = str(Path(uds).absolute())  # a process elsewhere is told of it
        return cls(**options)

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("max_queue", 0), ("max_body_size", 1)):
            number = as_int(getattr(self, name))
            if number is None:
                raise TypeError(f"{name} must be a whole number, not {getattr(self, name)!r}")
            if number < least or (name == "port" and number > 65535):
                raise ValueError(f"{name} must be at least {least}{' and at most 65535' if name == 'port' else ''}, not {number}")
        for name in ("body_timeout", "stall_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} must be a number of seconds above 0, not {value!r}")
        if not isinstance(self.host, str) or not self.host:
            raise TypeError(f"host must be an address such as '127.0.0.1' or '0.0.0.0', not {self.host!r}")
        if self.uds is not None and not (isinstance(self.uds, str) and self.uds):
            raise TypeError(f"uds must be the path of a Unix socket, not {self.uds!r}")
        if self.api_key is not None:
            if not isinstance(self.api_key, str):
                raise TypeError("api_key must be a string")
            if not self.api_key.isascii() or not self.api_key.isprintable() or not self.api_key.strip() or " " in self.api_key:
                raise ValueError("api_key must be printable ASCII without spaces, and not empty: it goes into a header")
        if not all(isinstance(name, str) and name for name in self.names):
            raise TypeError(f"served_model_name must be a name or a list of names, not {self.served_model_name!r}")
        if self.uds is None and self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host!r} can be reached from other machines, so it needs api_key=...: choose a long random one, such as "
                "secrets.token_urlsafe(32), or leave host out to listen on this machine only"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model, if that was said."""
        given = self.served_model_name
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if f.name != "api_key" and getattr(self, f.name) != f.default)
        return f"ServeOptions({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"


def is_loopback(host: str) -> bool:
    """Whether every address of this host is on this machine alone."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ValueError(f"host={host!r} is no address of this machine: {error}") from None
    return bool(found) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)

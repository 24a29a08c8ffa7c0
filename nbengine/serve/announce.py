"""Where a server says that it is there: one file in Jupyter's runtime folder, readable by its user alone. Imports no torch.

The Jupyter server's extension reads these, and so does whoever looks for a server of their own on this machine. A file is a
hint, and whoever follows it still has to be answered: the process may be gone (`list_live` leaves those out) or busy.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from jupyter_core.paths import jupyter_runtime_dir, secure_write

VERSION = 1
NAME = re.compile(r"nbengine-(\d+)-\d+\.json")
KERNEL = re.compile(r"kernel-(.+)\.json")
LARGEST = 1 << 20  # bytes of a file that is still read

State = Literal["ready", "loading", "asleep"]


class Announcement(TypedDict):
    """What such a file holds: `url` or `socket`, and the rest."""

    version: int
    pid: int
    started: float  # when that process began, in seconds since the machine did: tells it from a later one of the same number
    kernel_id: str | None  # of the Jupyter kernel that this is, if it is one
    url: NotRequired[str]  # http://127.0.0.1:PORT
    socket: NotRequired[str]  # a Unix socket's path
    secret: str  # sent as `Authorization: Bearer`
    models: list[str]
    state: State
    engine: NotRequired[str]  # the same for two servers of one engine


def write(
    *,
    secret: str,
    models: list[str],
    engine: str = "",
    state: State = "ready",
    url: str | None = None,
    socket: str | None = None,
    file: Path | None = None,
) -> Path:
    """Announce a server of this process, or (with `file`) say something new of it; where that stands."""
    assert (url is None) != (socket is None), "a server is at a URL or at a socket"
    told: Announcement = {
        "version": VERSION,
        "pid": os.getpid(),
        "started": started(os.getpid()) or 0.0,
        "kernel_id": kernel_id(),
        "secret": secret,
        "models": models,
        "engine": engine,
        "state": state,
    }
    if url is not None:
        told["url"] = url
    if socket is not None:
        told["socket"] = socket
    folder = Path(jupyter_runtime_dir()) if file is None else file.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if file is None:
        file = _free(folder)
    half = file.with_name(f".{file.name}")
    with secure_write(str(half)) as out:
        json.dump(told, out)
    half.replace(file)  # at once: nobody reads half of it
    return file


def remove(file: Path) -> None:
    """Harmless when it is gone."""
    file.unlink(missing_ok=True)


def list_live(folder: str | Path | None = None) -> list[Announcement]:
    """Every server of this user on this machine, the oldest process first. Files that dead processes left are removed."""
    return [told for _, told in list_files(folder)]


def list_files(folder: str | Path | None = None) -> list[tuple[Path, Announcement]]:
    """The same, each with the file that says so."""
    folder = Path(folder or jupyter_runtime_dir())
    found = []
    for file in folder.glob("nbengine-*-*.json"):
        told = _read(file)
        if told is None:
            continue
        if started(told["pid"]) != told["started"]:
            remove(file)
        else:
            found.append((told["started"], told["pid"], int(file.stem.rpartition("-")[2]), file, told))
    return [(file, told) for *_, file, told in sorted(found, key=lambda one: one[:3])]


def started(pid: int) -> float | None:
    """When a process began, in seconds since the machine did; None when there is no such process, or it is only waited for."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = told.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[0] in "ZX" else int(fields[19]) / os.sysconf("SC_CLK_TCK")


def kernel_id() -> str | None:
    """The id of the Jupyter kernel that this process is, as its server knows it."""
    app = sys.modules.get("ipykernel.kernelapp")
    if app is None or not app.IPKernelApp.initialized():
        return None
    name = KERNEL.fullmatch(Path(app.IPKernelApp.instance().connection_file).name)
    return name[1] if name else None


def _free(folder: Path) -> Path:
    for number in itertools.count():
        file = folder / f"nbengine-{os.getpid()}-{number}.json"
        try:
            file.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            told = _read(file)
            if told is None or told["started"] == started(os.getpid()):
                continue
        return file
    raise AssertionError


def _read(file: Path) -> Announcement | None:
    """What it says, if it is this user's, nobody else's to read, and whole."""
    name = NAME.fullmatch(file.name)
    try:
        about = file.lstat()
        private = stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077
        if name is None or not private or about.st_size > LARGEST:
            return None
        told: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("version") != VERSION or told.get("pid") != int(name[1]):
        return None
    where = [told.get("url"), told.get("socket")]
    whole = isinstance(told.get("secret"), str) and isinstance(told.get("started"), float) and isinstance(told.get("models"), list)
    return told if whole and any(isinstance(one, str) for one in where) else None  # type: ignore[return-value]

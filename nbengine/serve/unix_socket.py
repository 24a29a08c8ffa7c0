"""A socket in the file system: made where nothing else is, and taken away only by who made it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 1.0  # seconds until who listens somewhere takes a connection


@dataclass(frozen=True)
class OwnPath:
    """Where a socket was made, and which file that was."""

    path: str
    device: int
    inode: int

    def remove(self) -> None:
        """Take the file away, unless another has come in its place."""
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == (self.device, self.inode):
                Path(self.path).unlink()


def bind_path(path: str, backlog: int) -> tuple[socket.socket, OwnPath]:
    """Listen at a path, for this user alone. A socket that nobody listens at any more is replaced; whatever else is there stays."""
    from tornado.netutil import bind_unix_socket

    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is no socket")
        if _answers(path):
            raise OSError(errno.EADDRINUSE, "another server listens there")
    bound = bind_unix_socket(path, mode=0o600, backlog=backlog)
    made = os.lstat(path)
    return bound, OwnPath(path, made.st_dev, made.st_ino)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(PATIENCE)
        try:
            asking.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # too many wait to be taken, or it may not be asked
            return True
    return True

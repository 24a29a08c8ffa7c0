"""The last lines of nbengine's log, kept for `%engine log`: nothing is printed by the engine itself."""

from __future__ import annotations

import logging
from collections import deque

LINES = 500


class LogRing(logging.Handler):
    """Listens to the library's logger until it is closed."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: deque[str] = deque(maxlen=LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        self._logger = logging.getLogger("nbengine")
        self._before = self._logger.level, self._logger.propagate
        self._passes = self._logger.getEffectiveLevel()
        self._logger.setLevel(min(self._passes, logging.INFO))
        self._logger.propagate = False  # what is only for the ring must not reach the user's own handlers
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.extend(self.format(record).splitlines())
        root = logging.getLogger()
        if record.levelno >= self._passes and root.handlers:
            root.callHandlers(record)

    def close(self) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)
        super().close()

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
        self._before = self._logger.level
        if self._logger.getEffectiveLevel() > logging.INFO:
            self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.extend(self.format(record).splitlines())

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._before)
        super().close()

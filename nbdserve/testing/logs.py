"""What servers in this process log, each apart, whatever the program does with its logging.

The server's own log is at DEBUG or INFO level, which nobody has turned on, and a test wants all of
it when it fails. So while servers run the logger ``nbdserve`` hands every record to the `Log` of
the thread that made it, and passes on to the loggers above just what would have got there without
this.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

__all__ = ["Log"]

MAX_LINES = 2000

_above = logging.getLogger("nbdserve")
_logs: dict[int | None, Log] = {}
_turning = threading.Lock()


class Log:
    """The last lines that the server of a thread logged."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._thread: int | None = None

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in list(self._lines))

    def open(self, thread: int) -> None:
        """Take what is logged by that thread."""
        with _turning:
            if not _logs:
                _tap.install()
            self._thread = thread
            _logs[thread] = self

    def close(self) -> None:
        """Take no more; what was taken stays."""
        with _turning:
            if _logs.pop(self._thread, None) is not None and not _logs:
                _tap.remove()

    def take(self, record: logging.LogRecord) -> None:
        self._lines.append(_format.format(record))


_format = logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", "%H:%M:%S")


class _Tap(logging.Handler):
    def install(self) -> None:
        self._before = _above.level, _above.propagate
        self._level = _above.getEffectiveLevel()
        _above.setLevel(logging.DEBUG)
        _above.propagate = False
        _above.addHandler(self)

    def remove(self) -> None:
        _above.removeHandler(self)
        _above.level, _above.propagate = self._before
        _above.setLevel(_above.level)  # loggers below remember what is enabled

    def emit(self, record: logging.LogRecord) -> None:
        found = _logs.get(record.thread)
        if found is not None:
            found.take(record)
        _, propagated = self._before
        if propagated and record.levelno >= self._level and _above.parent is not None:
            _above.parent.handle(record)


_tap = _Tap()

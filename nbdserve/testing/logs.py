"""What servers in this process log, each apart, whatever the program does with its logging.

The server's own log is at DEBUG or INFO level, which nobody has turned on, and a test wants all of
it when it fails. So while servers run the logger ``nbdserve`` lets every record through, to the
`Log` of the thread that made it; and above it stands a gate, in place of its parent, that lets
through what would have got there without this. The program, and pytest, see the logger as they
left it, but for its level, and may change that: they get what they ask for.
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


EVERYTHING = logging.DEBUG - 1
"""The level while servers run: one that nobody else asks for."""


class _Tap(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        found = _logs.get(record.thread)
        if found is not None:
            found.take(record)

    def install(self) -> None:
        _gate.install()
        _above.addHandler(self)
        _above.setLevel(EVERYTHING)

    def remove(self) -> None:
        _above.removeHandler(self)
        _gate.remove()


class _Gate(logging.Handler):
    """A logger's parent is a chain of handlers to it; this one's only link."""

    _level = logging.NOTSET

    def install(self) -> None:
        if _above.level != EVERYTHING:  # put back by a caplog that outlived the last server
            self._level = _above.level
        self._parent = _above.parent
        _above.parent = self._logger = logging.Logger("nbdserve's gate")
        self._logger.addHandler(self)
        self._logger.propagate = False

    def remove(self) -> None:
        _above.parent = self._parent
        if _above.level == EVERYTHING:
            _above.setLevel(self._level)  # loggers below remember what is enabled, this tells them

    def emit(self, record: logging.LogRecord) -> None:
        parent = self._parent
        if parent is None:
            return
        level = self._level if _above.level == EVERYTHING else _above.level
        if record.levelno >= (level or parent.getEffectiveLevel()):
            parent.callHandlers(record)


_tap, _gate = _Tap(), _Gate()

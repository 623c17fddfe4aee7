"""Which engine is started for `--aio`, and what happens where the kernel forbids it.

io_uring is refused in many containers (seccomp answers ENOSYS or EPERM) and by administrators
(kernel.io_uring_disabled); memory limits count on old kernels. Serving with threads instead is
slower and just as correct, so that is a line in the log and no error. Linux AIO was asked for by
name, by somebody who knows why: there it is an error.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

from nbdserve.engines.threads import ThreadsEngine
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdserve.engines.engine import Engine

__all__ = ["Engines", "start_engine"]

log = logging.getLogger("nbdserve.engines")

FORBIDDEN = frozenset(
    {errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


def start_engine(aio: str | None, *, direct: bool) -> Engine:
    """The engine for the current trio run.

    :param aio: threads, io_uring, native; None for the fastest that is correct, which is io_uring
        where there is one. What the page cache holds is read and written inline whatever the
        engine; what it does not, and syncs, io_uring has done sooner (docs/architecture.md).
    :raises ConfigError: `native` without O_DIRECT, or where the kernel has no AIO for us; io_uring
        that fails for a reason of its own.
    """
    if aio == "native":
        return _start_native(direct)
    if aio in ("io_uring", None):
        from nbdserve.engines.io_uring import IoUringEngine

        try:
            return IoUringEngine()
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            if error.errno not in FORBIDDEN:
                message = f"--aio=io_uring: {reason}; use --aio=threads"
                raise ConfigError(message, error.errno) from None
            log.warning("io_uring cannot be used here (%s): using threads", reason)
    return ThreadsEngine()


def _start_native(direct: bool) -> Engine:
    if not direct:
        raise ConfigError(
            "--aio=native needs O_DIRECT, else it waits for the disk: use --cache=none or"
            " --cache=directsync with it"
        )
    from nbdserve.engines.linux_aio import LinuxAioEngine

    try:
        return LinuxAioEngine()
    except OSError as error:
        reason = f"Linux AIO cannot be used here: {error.strerror}"
        raise ConfigError(f"--aio=native: {reason}", error.errno) from None


class Engines:
    """The engines of a process, each kind started once, when it is first asked for."""

    def __init__(self) -> None:
        self._started: dict[str | None, Engine] = {}

    def get(self, aio: str | None, *, direct: bool) -> Engine:
        """As `start_engine`. Files that ask for the same share it."""
        kind = aio or "io_uring"
        # Without O_DIRECT native is refused, whoever may have started it.
        if kind not in self._started or (kind == "native" and not direct):
            engine = start_engine(aio, direct=direct)
            # io_uring may have become threads, which may run already.
            same = next((one for one in self if one.name == engine.name), engine)
            if same is not engine:
                engine.close()
            self._started[kind] = same
        return self._started[kind]

    def __iter__(self) -> Iterator[Engine]:
        """Those that run, each once."""
        return iter(dict.fromkeys(self._started.values()))

    def close(self) -> None:
        """Nothing may be in flight."""
        for engine in self:
            engine.close()
        self._started.clear()

"""Our server, with every write and sync of its image on record.

    python recorder.py LOG serve OPTIONS IMAGE      (as `nbdserve serve OPTIONS IMAGE`)

The record is taken where Python calls the system, below all of our code that could be wrong about
what it wrote or synced, and with the `threads` engine only, because an io_uring takes its requests
out of sight. A call has a record before it is made and one when it has returned, each written to
LOG before anything else can happen: so whoever looks at the length of LOG when a client has got an
answer knows that all that led to the answer lies before. Reading the record, and what the image
may be after a power cut, is powercut.py's; that the record is complete is checked there, too.

There is no guardian (nbdserve/guardian.py): the power would take it with the server.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import sys
from typing import TYPE_CHECKING, TypeVar

from nbdserve.cli.main import main
from nbdserve.engines import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdserve.engines.engine import Buffer

T = TypeVar("T")

HEAD = struct.Struct("<BQQQ")
"""Kind, number of the call, offset, length; bytes of data follow a WRITE or DURABLE_WRITE."""

WRITE, DURABLE_WRITE, PUNCH, ZERO, ALLOCATE, SYNC, RETURNED, FAILED = range(8)


class Recorder:
    """Stands before the system calls that change or sync the image."""

    def __init__(self, log: str, image: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._image = os.stat(image)
        self._numbers = itertools.count(1)
        self._write = os.write
        self._writev = os.writev

    def install(self) -> None:
        """From now on all goes through here."""
        os.register_at_fork(after_in_child=lambda: os._exit(0))  # the guardian
        pwrite, pwritev, fallocate = os.pwrite, os.pwritev, syscalls.fallocate

        def logged_pwrite(fd: int, data: Buffer, offset: int) -> int:
            return self._call(fd, WRITE, offset, [data], lambda: pwrite(fd, data, offset))

        def logged_pwritev(fd: int, data: Sequence[Buffer], offset: int, flags: int = 0) -> int:
            kind = DURABLE_WRITE if flags & os.RWF_DSYNC else WRITE
            return self._call(fd, kind, offset, data, lambda: pwritev(fd, data, offset, flags))

        def logged_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
            if mode & syscalls.FALLOC_FL_PUNCH_HOLE:
                kind = PUNCH
            else:
                kind = ZERO if mode & syscalls.FALLOC_FL_ZERO_RANGE else ALLOCATE
            self._call(fd, kind, offset, length, lambda: fallocate(fd, mode, offset, length))

        os.pwrite = logged_pwrite  # type: ignore[assignment]
        os.pwritev = logged_pwritev  # type: ignore[assignment]
        syscalls.fallocate = logged_fallocate
        for name in ("fdatasync", "fsync"):
            setattr(os, name, self._logged_sync(getattr(os, name)))
        for name in ("truncate", "ftruncate", "copy_file_range", "sendfile", "splice"):
            setattr(os, name, self._refused_of_the_image(getattr(os, name)))

    def _logged_sync(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def logged(fd: int) -> None:
            self._call(fd, SYNC, 0, 0, lambda: sync(fd))

        return logged

    def _refused_of_the_image(self, call: Callable[..., T]) -> Callable[..., T]:
        def refused(changed: int, other: int, *more: int) -> T:
            for fd in (changed, other):
                with contextlib.suppress(OSError):  # not a file
                    if os.path.samestat(os.stat(fd), self._image):
                        raise AssertionError("a way to change the image that is not recorded")
            return call(changed, other, *more)

        return refused

    def _call(
        self, fd: int, kind: int, offset: int, data: Sequence[Buffer] | int, call: Callable[[], T]
    ) -> T:
        if not os.path.samestat(os.fstat(fd), self._image):
            return call()
        number = next(self._numbers)
        pieces = [] if isinstance(data, int) else [memoryview(piece) for piece in data]
        length = data if isinstance(data, int) else sum(map(len, pieces))
        # One call: threads' records must not mix, and O_APPEND keeps each whole.
        self._put(b"".join((HEAD.pack(kind, number, offset, length), *pieces)))
        try:
            result = call()
        except BaseException:
            self._put(HEAD.pack(FAILED, number, 0, 0))
            raise
        done = result if isinstance(result, int) else length
        self._put(HEAD.pack(RETURNED, number, 0, done))
        return result

    def _put(self, record: bytes) -> None:
        if self._write(self._log, record) != len(record):
            os._exit(70)  # without its record nothing may go on


if __name__ == "__main__":
    log, *arguments = sys.argv[1:]
    Recorder(log, arguments[-1]).install()
    sys.argv = ["nbdserve", arguments[0], "--aio=threads", *arguments[1:]]
    main()

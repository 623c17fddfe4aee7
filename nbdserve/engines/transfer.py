"""Whole reads and writes by blocking calls: short ones are continued.

What O_DIRECT adds: a read that stopped at an end of file which is not aligned cannot go on from
there, the kernel says EINVAL. After a part was read that means the end (as QEMU takes it,
handle_aiocb_rw_linear).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdserve.engines.engine import Buffer

__all__ = ["IOV_MAX", "read_all", "rest_of", "write_all"]

# The most buffers that one pwritev takes; it refuses more with EINVAL.
IOV_MAX = os.sysconf("SC_IOV_MAX")


def read_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset`, with zeroes past the end of the file; may wait."""
    progress = False
    while len(buffer):
        try:
            done = os.preadv(fd, (buffer,), offset)
        except OSError as error:
            if not progress or error.errno != errno.EINVAL:
                raise
            done = 0
        if not done:
            buffer[:] = bytes(len(buffer))
            return
        progress = True
        buffer = buffer[done:]
        offset += done


def write_all(fd: int, data: Sequence[Buffer], offset: int, flags: int = 0) -> None:
    """Write all buffers one after the other from `offset`; may wait. `flags`: RWF_*."""
    pending = [memoryview(piece) for piece in data if len(piece)]
    while pending:
        done = os.pwritev(fd, pending[:IOV_MAX], offset, *((flags,) if flags else ()))
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += done
        pending = rest_of(pending, done)


def rest_of(data: Sequence[Buffer], nb_bytes: int) -> list[memoryview]:
    """What is left of several buffers after their first `nb_bytes`."""
    rest: list[memoryview] = []
    for piece in data:
        if nb_bytes < len(piece):
            rest.append(memoryview(piece)[nb_bytes:])
        nb_bytes = max(0, nb_bytes - len(piece))
    return rest

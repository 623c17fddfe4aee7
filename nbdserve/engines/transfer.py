"""Whole reads and writes by blocking calls: short ones are continued.

A read that meets the end of the file is filled up with zeroes, unless the file is known to be
longer: then somebody has cut it, and zeroes would be made up. Who knows has put a function into
`at_end`.

What O_DIRECT adds: a read that stopped at an end of file which is not aligned cannot go on from
there, the kernel says EINVAL. After a part was read that means the end (as QEMU takes it,
handle_aiocb_rw_linear).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdserve.engines.engine import Buffer

__all__ = ["IOV_MAX", "at_end", "fill_past_end", "read_all", "rest_of", "write_all"]

# The most buffers that one pwritev takes; it refuses more with EINVAL.
IOV_MAX = os.sysconf("SC_IOV_MAX")


# By descriptor: called, from any thread, with the offset at which a read met the end of the file;
# raises OSError if there must be more.
at_end: dict[int, Callable[[int], None]] = {}


def fill_past_end(fd: int, rest: memoryview, offset: int) -> None:
    """The file ends at `offset`: what is left of a read is zeroes. Raises OSError if it is not."""
    check = at_end.get(fd)
    if check is not None:
        check(offset)
    rest[:] = bytes(len(rest))


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
            fill_past_end(fd, buffer, offset)
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

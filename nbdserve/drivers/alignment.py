"""What O_DIRECT asks of memory, offsets and lengths, found out for each file.

statx(STATX_DIOALIGN) says it since Linux 6.1 for most file systems; a block device has its logical
block size; else small reads are tried until one is taken (after raw_probe_alignment of QEMU: where
even the smallest is taken, or the file is too short to tell, nothing is known, and a page it is).

O_DIRECT on a file system in memory is accepted by new kernels and means nothing: it is refused, as
old kernels do, because who asks for it wants the page cache out of the way.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.engines import syscalls
from nbdserve.errors import NoDirectIOError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Alignment", "direct_alignment"]

PAGE = mmap.PAGESIZE

# Never below a sector: sizes of images are whole sectors, and no disk does less.
SECTOR = 512


class Alignment(NamedTuple):
    """In bytes, powers of two: of addresses in memory, and of offsets and lengths in the file."""

    memory: int
    request: int


def direct_alignment(fd: int, filename: str, *, is_device: bool) -> Alignment:
    """For a descriptor opened with O_DIRECT. Raises NoDirectIOError if the file cannot do it."""
    if not is_device and syscalls.is_memory_file_system(fd):
        raise NoDirectIOError(
            f"{filename}: its file system is in memory, without O_DIRECT; use --cache=writeback",
            errno.EINVAL,
        )
    told = syscalls.direct_io_alignment(fd)
    if told is not None:
        memory, request = told
        if not request:
            raise no_direct_io(filename)
        return Alignment(max(memory, 1), max(request, SECTOR))
    if is_device:
        return Alignment(PAGE, syscalls.logical_block_size(fd))
    return Alignment(PAGE, probe(fd, os.preadv))


def no_direct_io(filename: str) -> NoDirectIOError:
    """What is said of a file that cannot be opened with O_DIRECT."""
    return NoDirectIOError(
        f"{filename}: its file system does not support O_DIRECT; use --cache=writeback",
        errno.EINVAL,
    )


def probe(fd: int, preadv: Callable[[int, list[memoryview], int], int]) -> int:
    """The smallest length that can be read, by trying."""
    buffer = memoryview(mmap.mmap(-1, PAGE))
    for length in (SECTOR, 1024, 2048):
        try:
            done = preadv(fd, [buffer[:length]], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                continue
            break
        # A file that ends before says nothing: the kernel did not get as far as the device.
        return length if done == length else PAGE
    return PAGE

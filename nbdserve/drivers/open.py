"""Opening a host file: what it is, how long it is, and which node stands on it.

A regular file or a block device, nothing else; a fifo in the image's place must not hang the open.
Every refusal is an ImageError of one line that names the file, and leaves no descriptor behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import TYPE_CHECKING

from nbdserve.drivers.alignment import direct_alignment, no_direct_io
from nbdserve.drivers.direct import DirectFileNode
from nbdserve.drivers.file import FileNode, OpenFile
from nbdserve.engines import syscalls
from nbdserve.errors import ImageError

if TYPE_CHECKING:
    from nbdserve.block.buffers import BufferPool
    from nbdserve.engines.engine import Engine

__all__ = ["open_file"]


def open_file(
    filename: str,
    engine: Engine,
    *,
    read_only: bool,
    no_flush: bool = False,
    discard: bool = False,
    direct: BufferPool | None = None,
) -> FileNode:
    """Open a regular file or block device. Raises ImageError naming the file, nothing else.

    `direct`: with O_DIRECT, and these buffers for what is not aligned.
    """
    try:
        # O_NONBLOCK so that a fifo in the image's place cannot hang the open; it means nothing
        # for regular files and block devices.
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(filename, flags | (os.O_DIRECT if direct is not None else 0))
        # From here on it would mean something after all: io_uring of Linux 5.6 to 5.14 answers
        # EAGAIN to such a descriptor, however often it is asked.
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EINVAL and direct is not None:
            raise no_direct_io(filename) from None
        raise ImageError(f"{filename}: {error.strerror}", error.errno) from None
    try:
        status = os.fstat(fd)
        is_device = stat.S_ISBLK(status.st_mode)
        if not is_device and not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{filename}: neither a regular file nor a block device")
        length = syscalls.block_device_size(fd) if is_device else status.st_size
        file = OpenFile(
            filename=filename,
            fd=fd,
            length=length,
            is_device=is_device,
            read_only=read_only,
            no_flush=no_flush,
            discard=discard,
        )
        if direct is None:
            return FileNode(file, engine)
        alignment = direct_alignment(fd, filename, is_device=is_device)
        return DirectFileNode(file, engine, alignment, direct)
    except OSError as error:
        os.close(fd)
        raise ImageError(f"{filename}: {error.strerror}", error.errno) from None
    except ImageError:
        os.close(fd)
        raise

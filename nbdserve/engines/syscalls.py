"""The Linux calls that Python's ``os`` lacks: fallocate, fstatfs and the block device ioctls.

Plain blocking functions on a file descriptor, to be run in a thread. They do what their
names say or raise; whether to discard at all, and what to do where a file cannot, belongs
to the driver above.

- Every failure is an OSError with its errno. "This file cannot do that" has many names in
  the kernel (ENOSYS, ENODEV, ENOTTY, EOPNOTSUPP); here it has one, EOPNOTSUPP (follows
  QEMU's ``translate_err``).
- EINTR is retried; all of these calls may be repeated.
- The GIL is released during every call, so a thread pool can overlap them.
- ctypes is loaded at the first call that needs it, not on import: starting a server must
  not pay for it.

The constants are those of x86_64 and aarch64 (Linux's falloc.h, magic.h, and fs.h with the
generic ioctl encoding); ``off_t`` and ``long`` are taken to have 64 bits, as they have there.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

FALLOC_FL_KEEP_SIZE = 0x01
"""Leave the file's size alone even where the range reaches past its end."""
FALLOC_FL_PUNCH_HOLE = 0x02
"""Deallocate the range; it reads as zeroes. Only together with KEEP_SIZE."""
FALLOC_FL_ZERO_RANGE = 0x10
"""Make the range read as zeroes and keep it allocated."""

BLKGETSIZE64 = 0x80081272
BLKSSZGET = 0x1268
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F

_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENODEV, errno.ENOTTY, errno.EOPNOTSUPP})
_TRY_ANOTHER_WAY = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.EBUSY})
"""Answers after which another call may still succeed on the same range (follows
``handle_aiocb_write_zeroes_unmap``): some file systems say EINVAL to a range that is not
aligned to their blocks, and some devices EBUSY to a discard."""

_MEMORY_FILE_SYSTEMS = frozenset({0x01021994, 0x858458F6})  # tmpfs, ramfs

_RANGE = struct.Struct("=QQ")
_SIZE = struct.Struct("=Q")
_INT = struct.Struct("=i")
_LONG = struct.Struct("@l")
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_SPACE = 256
_MASK = struct.Struct("=I")
_DIO_ALIGNMENT = struct.Struct("=II")  # stx_dio_mem_align, stx_dio_offset_align
_DIO_ALIGNMENT_AT = 0x98
_STATFS_SPACE = 256  # struct statfs has 120 bytes on both machines, and f_type comes first


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2): change how [offset, offset + length) is allocated, in bytes.

    :param mode: 0 to allocate (and to grow the file), or FALLOC_FL_* bits.
    :raises OSError: EOPNOTSUPP if the file or its file system cannot do this; EINVAL for a
        length that is not positive or a range the file system finds unaligned; ENOSPC, EIO,
        EBADF, ... as in the manual page.
    """
    _call("fallocate", fd, mode, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Deallocate [offset, offset + length): it reads as zeroes and the size stays as it is.

    On a block device this is a write of zeroes that may unmap, refused with EOPNOTSUPP
    where the device has no such command.

    :raises OSError: as :func:`fallocate`.
    """
    fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int, may_unmap: bool, is_device: bool) -> None:
    """Make [offset, offset + length) read as zeroes without writing them.

    A regular file that ended before ``offset + length`` ends there afterwards.

    :param may_unmap: the range may become a hole; otherwise it is allocated afterwards.
    :param is_device: the descriptor is a block device's, not a regular file's.
    :raises OSError: EOPNOTSUPP or EINVAL if nothing works for this range, and zeroes must be
        written; part of it may already be zeroed. Else as :func:`fallocate`.

    Follows ``handle_aiocb_write_zeroes_unmap`` and ``handle_aiocb_write_zeroes`` in the order
    of attempts. Unlike QEMU's, a hole punched past the end of the file also moves the end.
    """
    if may_unmap and _works(punch_hole, fd, offset, length):
        if not is_device:
            _grow(fd, offset + length)
    elif is_device:
        block_zero_out(fd, offset, length)
    elif not _works(fallocate, fd, FALLOC_FL_ZERO_RANGE, offset, length):
        # What is allocated anew reads as zeroes, so drop the old blocks first (tmpfs).
        punch_hole(fd, offset, length)
        fallocate(fd, 0, offset, length)


def discard_range(fd: int, offset: int, length: int, is_device: bool) -> None:
    """Say that the contents of a range are no longer needed.

    In a regular file it becomes a hole; what it reads as on a device is the device's choice.
    The size stays as it is (follows ``handle_aiocb_discard``).

    :raises OSError: EOPNOTSUPP if the file or device cannot; EINVAL for a range that is not
        aligned to a device's logical blocks or passes its end. Else as :func:`fallocate`.
    """
    if is_device:
        block_discard(fd, offset, length)
    else:
        punch_hole(fd, offset, length)


def direct_io_alignment(fd: int) -> tuple[int, int] | None:
    """What O_DIRECT asks of (memory addresses, offsets and lengths) in bytes; zeroes if the file
    cannot do it. None: the kernel, the C library or the file system does not say (Linux 6.1)."""
    import ctypes

    status = ctypes.create_string_buffer(_STATX_SPACE)
    try:
        _call("statx", fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, status)
    except (OSError, AttributeError):
        return None
    if not _MASK.unpack_from(status)[0] & _STATX_DIOALIGN:
        return None
    memory, request = _DIO_ALIGNMENT.unpack_from(status, _DIO_ALIGNMENT_AT)
    return memory, request


def is_memory_file_system(fd: int) -> bool:
    """Whether the file lives in memory alone (tmpfs, ramfs), so that no read of it waits long.

    tmpfs may still have pages swapped out.

    :raises OSError: as fstatfs(2).
    """
    import ctypes

    status = ctypes.create_string_buffer(_STATFS_SPACE)
    _call("fstatfs", fd, status)
    return _LONG.unpack_from(status)[0] in _MEMORY_FILE_SYSTEMS


def block_device_size(fd: int) -> int:
    """Size of a block device in bytes (BLKGETSIZE64).

    :raises OSError: EOPNOTSUPP if it is not a block device.
    """
    size: int = _SIZE.unpack(_ioctl(fd, BLKGETSIZE64, bytes(_SIZE.size)))[0]
    return size


def logical_block_size(fd: int) -> int:
    """Smallest unit a block device reads or writes, in bytes (BLKSSZGET).

    :raises OSError: EOPNOTSUPP if it is not a block device.
    """
    size: int = _INT.unpack(_ioctl(fd, BLKSSZGET, bytes(_INT.size)))[0]
    return size


def block_discard(fd: int, offset: int, length: int) -> None:
    """Tell a block device that a range is no longer needed (BLKDISCARD).

    :raises OSError: EOPNOTSUPP if it is not a block device or cannot discard; EINVAL for a
        range that is not aligned to its logical blocks or passes its end.
    """
    _ioctl(fd, BLKDISCARD, _RANGE.pack(offset, length))


def block_zero_out(fd: int, offset: int, length: int) -> None:
    """Make a range of a block device read as zeroes, allocated (BLKZEROOUT).

    The kernel writes zeroes itself where the device has no command for it.

    :raises OSError: EOPNOTSUPP if it is not a block device; EINVAL as for
        :func:`block_discard`.
    """
    _ioctl(fd, BLKZEROOUT, _RANGE.pack(offset, length))


def _works(call: Callable[..., None], *args: int) -> bool:
    """Whether ``call`` did it; False if another call might, any other error is raised."""
    try:
        call(*args)
    except OSError as error:
        if error.errno in _TRY_ANOTHER_WAY:
            return False
        raise
    return True


def _grow(fd: int, end: int) -> None:
    """Make a regular file at least ``end`` bytes long, atomically: it never shrinks.

    ftruncate to a size that was looked up before could cut off what another thread
    appended meanwhile; fallocate cannot.
    """
    size = os.fstat(fd).st_size
    if size < end:
        fallocate(fd, 0, size, end - size)


def _ioctl(fd: int, request: int, argument: bytes) -> bytes:
    while True:
        try:
            return fcntl.ioctl(fd, request, argument)
        except InterruptedError:
            # Unlike fcntl.fcntl, fcntl.ioctl leaves the retry to its caller.
            continue
        except OSError as error:
            raise _error(error.errno or errno.EIO) from None


def _call(name: str, *args: object) -> None:
    """Call a function of the C library that returns 0, or -1 and errno."""
    import ctypes

    function = getattr(_c_library(), name)
    while function(*args) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise _error(code)


def _error(code: int) -> OSError:
    code = errno.EOPNOTSUPP if code in _UNSUPPORTED else code
    return OSError(code, os.strerror(code))


@functools.cache
def _c_library() -> ctypes.CDLL:
    import ctypes

    # CDLL (not PyDLL) releases the GIL; use_errno keeps a private errno for each thread.
    library = ctypes.CDLL(None, use_errno=True)
    library.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    library.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
    return library

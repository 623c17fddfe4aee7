"""The `file` driver: a leaf on a regular file or a block device of the host.

Law: what the page cache can answer is answered inline, by one system call and no hop; what would
wait goes to the engine. Reads ask with RWF_NOWAIT and get EAGAIN instead of waiting. Writes go
inline too, into the page cache, because a hop costs more than the copy; see `write_nowait` for
the limit of that. With O_DIRECT there is no page cache: drivers/direct.py.

A write with FUA is one with RWF_DSYNC: it waits for its own data and for what of the file's
metadata leads to it (its length, where its blocks are), and for nothing else that is dirty. The
kernel tells of an earlier write that it could not write back once to each open file description
(errseq_t), by the next sync of whatever kind. So these writes have a description of their own:
what they are told is told the next flush all the same.

Past the end of the file everything reads as zeroes. The end (`length`) moves only by our own
writes: the image locks keep others away. If somebody cuts the file all the same, what is gone
reads as an error; QEMU makes zeroes of it.

After block/file-posix.c of QEMU: raw_co_prw, raw_co_flush_to_disk, raw_do_pdiscard,
raw_co_pwrite_zeroes, raw_co_block_status.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nbdserve.block.node import MAX_INLINE, Buffer, Extent, Leaf
from nbdserve.block.units import align_up
from nbdserve.drivers.locks import ImageLock
from nbdserve.engines import syscalls
from nbdserve.engines.engine import completion
from nbdserve.engines.transfer import at_end, write_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdserve.drivers.locks import Permission
    from nbdserve.engines.engine import Done, Engine

__all__ = ["FileNode", "OpenFile"]

RWF_NOWAIT = os.RWF_NOWAIT

# QEMU's block layer counts a regular file in whole sectors; the rest of the last reads as zeroes.
SECTOR = 512

# How a file system says that it cannot do that here: at all, or (EINVAL) not to this range.
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL})

# What these errors say of RWF_DSYNC: not here. (Every file system of a kernel since 4.7 has it.)
NO_DSYNC = frozenset({errno.EOPNOTSUPP})

# Pieces in one block status answer: enough for the client's, and a file of a million holes shall
# not keep the interpreter busy for a second.
MAX_PIECES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFile:
    """A host file as it was opened: what it is, and what it may be used for. `length` in bytes."""

    filename: str
    fd: int
    length: int
    is_device: bool
    read_only: bool
    no_flush: bool
    discard: bool


class FileNode(Leaf):
    """An open file; `length` is its length in bytes, `size` the same in whole sectors."""

    driver = "file"
    fua = True

    def __init__(self, file: OpenFile, engine: Engine) -> None:
        super().__init__(
            file.filename,
            align_up(file.length, SECTOR),
            read_only=file.read_only,
            no_flush=file.no_flush,
        )
        self.fd = file.fd
        self.length = file.length
        self.is_device = file.is_device
        self._engine = engine
        self._discard = file.discard
        self._lock = ImageLock(file.fd, file.filename)
        self._nowait = RWF_NOWAIT
        self._zero_modes = {True: True, False: True}  # may_unmap -> the file system can do it
        self._would_block = 0
        self._dsync_fd: int | None = None
        self._has_dsync = True
        at_end[self.fd] = self._met_end

    def _met_end(self, offset: int) -> None:
        """A read met the end of the file there.

        Our own write may have moved it since: what lies behind it then was not there to be read.
        `length` is looked at first, as it follows the file.
        """
        if offset < self.length and (self.is_device or os.fstat(self.fd).st_size <= offset):
            raise OSError(
                errno.EIO,
                f"{self.filename}: ends at byte {offset} of {self.length}: somebody has cut it",
            )

    def lock(self, permissions: Permission, shared: Permission) -> None:
        """Take the image lock. Raises ImageError, LockedError.

        Until now somebody else may have been writing: what is at the end is only known from here.
        """
        self._lock.acquire(permissions, shared)
        if not self.is_device:
            self.length = os.fstat(self.fd).st_size
            self.size = align_up(self.length, SECTOR)

    def guarded(self) -> tuple[int, ImageLock]:
        """A description of the file for a guardian, without O_DIRECT, and the same locks as this
        one's on it. Raises OSError, ImageError."""
        fd = self._reopen(0)
        try:
            return fd, self._lock.twin(fd)
        except BaseException:
            os.close(fd)
            raise

    # --- the synchronous way -------------------------------------------------------------------

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        try:
            done = os.preadv(self.fd, (buffer,), offset, self._nowait)
        except BlockingIOError:
            self._would_block += 1
            return False
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and self._nowait:
                return self._without_nowait(offset, buffer)
            raise
        if done == len(buffer):
            return True
        # Short: either the end of the file, or only the first part was in the page cache.
        if offset + done < self.length:
            self._would_block += 1
            return False
        buffer[done:] = bytes(len(buffer) - done)
        return True

    def _without_nowait(self, offset: int, buffer: memoryview) -> bool:
        """The file system cannot say whether a read would wait; only memory never does."""
        if syscalls.is_memory_file_system(self.fd):
            self._nowait = 0
            return self.read_nowait(offset, buffer)
        self.read_nowait = super().read_nowait  # type: ignore[method-assign]
        return False

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Copy into the page cache.

        Facts: ext4 refuses RWF_NOWAIT for buffered writes, so there is no way to ask whether a
        write would wait; it waits when the kernel throttles writers of dirty pages, for some
        milliseconds. A hop to a thread costs 30 us for each write, always. So: inline.
        """
        length = len(data)
        if length > MAX_INLINE:
            return False
        done = os.pwrite(self.fd, data, offset)
        if done != length:
            write_all(self.fd, (memoryview(data)[done:],), offset + done)
        self._wrote(offset + length)
        return True

    def writev_nowait(self, offset: int, data: Sequence[Buffer]) -> bool:
        length = sum(map(len, data))
        if length > MAX_INLINE:
            return False
        write_all(self.fd, data, offset)
        self._wrote(offset + length)
        return True

    def _wrote(self, end: int, *, durable: bool = False) -> None:
        if not durable:
            self.generation.written += 1
        if end > self.length:
            self.length = end
            self.size = align_up(end, SECTOR)

    # --- the asynchronous way ------------------------------------------------------------------

    def submit_read(self, offset: int, buffer: memoryview, done: Done) -> None:
        self._engine.submit_read(self.fd, buffer, offset, done)

    def submit_write(
        self, offset: int, data: Buffer, done: Done, *, fua: bool = False
    ) -> None:
        end = offset + len(data)

        def completed(error: OSError | None) -> None:
            if error is None:
                self._wrote(end)
            done(error)

        if fua and not self.no_flush:
            self._submit_fua(offset, data, done)
        else:
            self._engine.submit_write(self.fd, (data,), offset, completed)

    def _submit_fua(self, offset: int, data: Buffer, done: Done) -> None:
        self.generation.check()
        if not self._open_dsync():
            self._submit_and_sync(offset, data, done)
            return

        def completed(error: OSError | None) -> None:
            if error is None:
                self._wrote(offset + len(data), durable=True)
            elif error.errno in NO_DSYNC:
                self._has_dsync = False
                self._submit_and_sync(offset, data, done)
                return
            else:
                self.generation.written += 1  # perhaps a part of it, which a flush must find
            done(error)

        self._submit_dsync(offset, data, completed)

    def _submit_dsync(self, offset: int, data: Buffer, done: Done) -> None:
        assert self._dsync_fd is not None
        self._engine.submit_write(self._dsync_fd, (data,), offset, done, dsync=True)

    def _submit_and_sync(self, offset: int, data: Buffer, done: Done) -> None:
        """Where there is no RWF_DSYNC."""

        def written(error: OSError | None) -> None:
            if error is None:
                try:
                    self.generation.submit(done)
                except OSError as failure:
                    error = failure
            if error is not None:
                done(error)

        self.submit_write(offset, data, written)

    def _open_dsync(self) -> bool:
        """Whether there is a description for RWF_DSYNC; without /proc there is none."""
        if self._dsync_fd is None and self._has_dsync:
            try:
                self._dsync_fd = self._reopen(fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_DIRECT)
            except OSError:
                self._has_dsync = False
        return self._has_dsync

    def _reopen(self, flags: int) -> int:
        """Another description of the same file, for reading and writing, locked as this one."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC | flags)
        try:
            self._lock.copy_to(fd)
        except OSError:
            os.close(fd)
            raise
        return fd

    async def read(self, offset: int, buffer: memoryview) -> None:
        if len(buffer):
            await completion(partial(self._engine.submit_read, self.fd, buffer, offset))

    async def write(self, offset: int, data: Buffer) -> None:
        await self.writev(offset, (data,))

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        if len(data):
            await completion(partial(self.submit_write, offset, data, fua=True))
        return True

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        data = [piece for piece in data if len(piece)]
        if data:
            await completion(partial(self._engine.submit_write, self.fd, data, offset))
            self._wrote(offset + sum(map(len, data)))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        if not length:
            return
        unmap = may_unmap and self._discard
        if await self._zero_range(offset, length, unmap, may_be_slow=fallback):
            self._wrote(offset + length)
            return
        if not fallback:
            raise OSError(errno.EOPNOTSUPP, f"{self.filename}: no fast way to write zeroes")
        zeroes = bytes(min(length, MAX_INLINE))
        end = offset + length
        while offset < end:
            piece = min(len(zeroes), end - offset)
            await self.write(offset, memoryview(zeroes)[:piece])
            offset += piece

    async def _zero_range(
        self, offset: int, length: int, unmap: bool, *, may_be_slow: bool
    ) -> bool:
        """Make a range zeroes without writing them; False if that cannot be done."""
        # For a device without a command for it the kernel writes the zeroes itself and does not
        # tell; only a hole is refused then.
        slow = self.is_device and not may_be_slow
        if not self._zero_modes[unmap] or (slow and not unmap):
            return False
        try:
            if slow:
                await self._engine.run(syscalls.punch_hole, self.fd, offset, length)
            else:
                await self._engine.run(
                    syscalls.zero_range, self.fd, offset, length, unmap, self.is_device
                )
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._zero_modes[unmap] = slow or error.errno == errno.EINVAL
            return False
        return True

    async def discard(self, offset: int, length: int) -> None:
        if not self._discard:
            return
        try:
            await self._engine.run(
                syscalls.discard_range, self.fd, offset, length, self.is_device
            )
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._discard = error.errno == errno.EINVAL
        else:
            self._wrote(min(offset + length, self.length))

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        if offset >= self.length:
            return [Extent(length, data=False, zero=True)]
        if self.is_device:
            return [Extent(length, data=True, zero=False)]
        return await self._engine.run(seek_extents, self.fd, offset, length)

    def submit_sync(self, done: Done) -> None:
        self._engine.submit_fsync(self.fd, done)

    async def close(self) -> None:
        """Flush what nobody flushed, as bdrv_close does, and let go of the file."""
        try:
            await self.flush()
        finally:
            if self._dsync_fd is not None:
                os.close(self._dsync_fd)
            try:
                self._lock.release()
            finally:
                at_end.pop(self.fd, None)
                os.close(self.fd)

    def statistics(self) -> dict[str, object]:
        return {
            "would_block": self._would_block,
            "written": self.generation.written,
            "flush": self.generation.statistics(),
        }


def seek_extents(fd: int, offset: int, length: int) -> list[Extent]:
    """The data and holes of a range by SEEK_DATA and SEEK_HOLE; past the end is a hole.

    At most MAX_PIECES pieces, so perhaps only the start of the range. A file system that cannot
    tell has data everywhere.
    """
    extents: list[Extent] = []
    end = offset + length
    while offset < end and len(extents) < MAX_PIECES:
        try:
            data = _seek(fd, offset, os.SEEK_DATA, end)
            # A discard may come between the two: then the data is no longer there.
            hole = _seek(fd, data, os.SEEK_HOLE, end) if data < end else end
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return [Extent(length, data=True, zero=False)]
            raise
        if data > offset:
            extents.append(Extent(data - offset, data=False, zero=True))
        if hole > data:
            extents.append(Extent(hole - data, data=True, zero=False))
        offset = hole
    return extents


def _seek(fd: int, offset: int, whence: int, end: int) -> int:
    """Where data or a hole begins from `offset` on; `end` if not before that."""
    try:
        return min(os.lseek(fd, offset, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:  # there is no more data; or no more file
            return end
        raise

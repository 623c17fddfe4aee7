"""The raw format: guest offsets are offsets in the child, from `offset` on.

A window has an end too if it was given a `size`. The node above may be a format that writes behind
the end of its file to let it grow; it does not get beyond that end (raw_adjust_offset of QEMU).

Nothing of its own is stored, so every operation is passed to the child, moved; a range resolves
through to the child's leaves. Also the window that `--offset` opens on any image.

An image whose format nobody named and that was taken for raw is dangerous: a guest that writes
another format's header into its first sector has it opened as that format next time, and could
name any host file as its backing file. Such writes are refused (`guarded`; raw_co_pwritev of QEMU).
What counts is the sector as it would become, not the bytes written: two harmless writes can make up
a signature, and so can zeroes (some signatures hold a zero byte). Hence whatever changes the first
sector is checked and done under one lock, and a discard of a part of it is not passed on.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from nbdserve.block.node import Buffer, Extent, Node
from nbdserve.block.run import READ, Miss
from nbdserve.formats.probe import PROBE_SIZE, looks_like_format

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdserve.block.run import Op, Resolution

__all__ = ["RawNode"]


class RawNode(Node):
    """A window on a child, from `offset` on; of `size` bytes, or to the child's end."""

    driver = "raw"

    def __init__(
        self, file: Node, *, offset: int = 0, size: int | None = None, guarded: bool = False
    ) -> None:
        super().__init__(
            file.filename,
            file.size - offset if size is None else size,
            read_only=file.read_only,
            no_flush=file.no_flush,
        )
        self._file = file
        self.offset = offset
        self._end = size
        self._guarded = guarded
        self._first_sector = trio.Lock()

    @property
    def children(self) -> Mapping[str, Node]:
        return {"file": self._file}

    @property
    def cluster_size(self) -> int:
        return self._file.cluster_size

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        if self._guarded and op is not READ and offset < PROBE_SIZE:
            return Miss.OPAQUE
        if self._end is not None and offset + length > self._end:
            return Miss.OPAQUE  # the asynchronous path says why
        return self._file.resolve(op, offset + self.offset, length)

    def allocate_nowait(self, offset: int, data: Buffer) -> bool:
        return self._file.allocate_nowait(offset + self.offset, data)

    def _check_end(self, offset: int, length: int, error: int) -> None:
        if self._end is not None and offset + length > self._end:
            raise OSError(error, f"{self.filename}: {offset + length} is beyond {self._end} bytes")

    async def read(self, offset: int, buffer: memoryview) -> None:
        self._check_end(offset, len(buffer), errno.EINVAL)
        await self._file.read(offset + self.offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        self._check_end(offset, len(data), errno.ENOSPC)
        if not self._guarded or offset >= PROBE_SIZE:
            await self._file.write(offset + self.offset, data)
            return
        async with self._first_sector:
            await self._check_first_sector(offset, data)
            await self._file.write(offset + self.offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        self._check_end(offset, len(data), errno.ENOSPC)
        if not self._guarded or offset >= PROBE_SIZE:
            return await self._file.write_fua(offset + self.offset, data)
        async with self._first_sector:
            await self._check_first_sector(offset, data)
            return await self._file.write_fua(offset + self.offset, data)

    async def _check_first_sector(self, offset: int, data: Buffer) -> None:
        """Raise OSError(EPERM) if `data` would make the image look like one in another format."""
        sector = bytearray(min(PROBE_SIZE, self.size))
        await self._file.read(self.offset, memoryview(sector))
        piece = memoryview(data)[: len(sector) - offset]
        sector[offset : offset + len(piece)] = piece
        name = looks_like_format(bytes(sector))
        if name is not None:
            raise OSError(
                errno.EPERM,
                f"{self.filename}: a write would make the raw image look like {name};"
                " its format was guessed, name it with -f raw to allow this",
            )

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        self._check_end(offset, length, errno.ENOSPC)
        start = offset + self.offset
        if not self._guarded or offset >= PROBE_SIZE:
            await self._file.write_zeroes(start, length, may_unmap=may_unmap, fallback=fallback)
            return
        async with self._first_sector:
            await self._check_first_sector(offset, bytes(min(length, PROBE_SIZE)))
            await self._file.write_zeroes(start, length, may_unmap=may_unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        self._check_end(offset, length, errno.EINVAL)
        if not self._guarded or offset >= PROBE_SIZE:
            await self._file.discard(offset + self.offset, length)
            return
        end = offset + length
        start = 0 if offset == 0 and end >= PROBE_SIZE else PROBE_SIZE
        if start < end:
            async with self._first_sector:
                await self._file.discard(start + self.offset, end - start)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self._file.block_status(offset + self.offset, length)

    def flush_nowait(self) -> bool:
        return self._file.flush_nowait()

    def submit_flush(self, done: Callable[[OSError | None], None]) -> bool:
        return self._file.submit_flush(done)

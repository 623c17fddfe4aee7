"""A node that keeps a write log of another: above the format it sees what the guest does, below it
what reaches the host's file.

Its ranges do not resolve, and a flush that would have nothing to do is passed on as if it had: all
that changes anything comes by here. Requests that overlap wait for each other, so that the log's
order is the order on the disk.

What the node below held before is `initial` of the log, so it is read when logging begins.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nbdserve.block.node import Node
from nbdserve.block.rangelock import RangeLock
from nbdserve.testing.writelog import Kind, WriteLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from nbdserve.block.node import Buffer, Extent

__all__ = ["LoggedNode", "log_writes"]

PIECE = 1 << 20


async def log_writes(file: Node, log: WriteLog) -> LoggedNode:
    """A node over `file`, whose content becomes one more file of the log. Raises OSError."""
    content = bytearray(file.size)
    for start in range(0, len(content), PIECE):
        await file.read(start, memoryview(content)[start : start + PIECE])
    return LoggedNode(file, log, log.add_file(bytes(content)))


class LoggedNode(Node):
    """A child, and a log of what is done to it."""

    is_filter = True
    driver = "write-log"

    def __init__(self, file: Node, log: WriteLog, number: int) -> None:
        """`number`: that of the child in the log."""
        super().__init__(
            file.filename, file.size, read_only=file.read_only, no_flush=file.no_flush
        )
        self.log = log
        self._file = file
        self._number = number
        self._ranges = RangeLock()
        self.is_device: bool = getattr(file, "is_device", True)

    @property
    def children(self) -> Mapping[str, Node]:
        return {"file": self._file}

    @property
    def cluster_size(self) -> int:
        return self._file.cluster_size

    @asynccontextmanager
    async def _logged(self, kind: Kind, offset: int, data: bytes | int) -> AsyncIterator[None]:
        length = data if isinstance(data, int) else len(data)
        async with self._ranges.hold(offset, offset + length - 1):
            number = self.log.begin(kind, self._number, offset, data)
            yield
            self.log.end(number)
            self.size = max(self.size, self._file.size)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._file.read(offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        async with self._logged(Kind.WRITE, offset, bytes(data)):
            await self._file.write(offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        async with self._ranges.hold(offset, offset + len(data) - 1):
            number = self.log.begin(Kind.WRITE, self._number, offset, bytes(data))
            durable = await self._file.write_fua(offset, data)
            self.log.end(number, durable=durable)
            self.size = max(self.size, self._file.size)
        return durable

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        async with self._logged(Kind.WRITE_ZEROES, offset, length):
            await self._file.write_zeroes(
                offset, length, may_unmap=may_unmap, fallback=fallback
            )

    async def discard(self, offset: int, length: int) -> None:
        async with self._logged(Kind.DISCARD, offset, length):
            await self._file.discard(offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self._file.block_status(offset, length)

    async def flush(self) -> None:
        number = self.log.begin(Kind.FLUSH, self._number)
        await self._file.flush()
        self.log.end(number)

    def presume_written(self) -> None:
        self._file.presume_written()

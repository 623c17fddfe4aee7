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

from nbdserve.block.filter import FilterNode
from nbdserve.block.rangelock import RangeLock
from nbdserve.powercut.writelog import Kind, WriteLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdserve.block.node import Buffer, Node

__all__ = ["PowerCutNode", "log_writes"]

PIECE = 1 << 20


async def log_writes(file: Node, log: WriteLog) -> PowerCutNode:
    """A node over `file`, whose content becomes one more file of the log. Raises OSError."""
    content = bytearray(file.size)
    for start in range(0, len(content), PIECE):
        await file.read(start, memoryview(content)[start : start + PIECE])
    return PowerCutNode(file, log, log.add_file(bytes(content)))


class PowerCutNode(FilterNode):
    """A child, and a log of what is done to it."""

    driver = "power-cut"

    def __init__(self, file: Node, log: WriteLog, number: int) -> None:
        """`number`: that of the child in the log."""
        super().__init__(file)
        self.log = log
        self._number = number
        self._ranges = RangeLock()

    @asynccontextmanager
    async def _logged(self, kind: Kind, offset: int, data: bytes | int) -> AsyncIterator[None]:
        length = data if isinstance(data, int) else len(data)
        async with self._ranges.hold(offset, offset + length - 1):
            number = self.log.begin(kind, self._number, offset, data)
            yield
            self.log.end(number)

    async def write(self, offset: int, data: Buffer) -> None:
        async with self._logged(Kind.WRITE, offset, bytes(data)):
            await self.file.write(offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        async with self._ranges.hold(offset, offset + len(data) - 1):
            number = self.log.begin(Kind.WRITE, self._number, offset, bytes(data))
            durable = await self.file.write_fua(offset, data)
            self.log.end(number, durable=durable)
        return durable

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        async with self._logged(Kind.WRITE_ZEROES, offset, length):
            await self.file.write_zeroes(
                offset, length, may_unmap=may_unmap, fallback=fallback
            )

    async def discard(self, offset: int, length: int) -> None:
        async with self._logged(Kind.DISCARD, offset, length):
            await self.file.discard(offset, length)

    async def flush(self) -> None:
        number = self.log.begin(Kind.FLUSH, self._number)
        await self.file.flush()
        self.log.end(number)

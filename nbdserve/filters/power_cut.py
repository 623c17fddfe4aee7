"""The `power-cut` driver: a node that logs all that is done to its child, until the power is cut.

Above a format it sees what the guest does, below it what reaches the host's file. What the power
takes is powercut/'s to say; here is what makes the log true:

* reads resolve to what the child's do, but writes to the node itself (`_Front`), and no flush takes
  a short way, so all that changes anything comes by;
* requests that overlap wait for each other, so the log's order is the order on the disk;
* a request is in the log before it is passed on, and has returned there before its client is told;
* after the cut nothing is passed on, and what had not returned fails, whatever became of it below;
* where flushes do nothing (cache.no-flush) nothing ever counts as flushed.

What the child held before is read when logging begins: its data, not its holes.
"""

from __future__ import annotations

import errno
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from nbdserve.block.filter import FilterNode
from nbdserve.block.node import Leaf
from nbdserve.block.rangelock import RangeLock
from nbdserve.block.run import READ, WRITE, Miss
from nbdserve.powercut.content import Content
from nbdserve.powercut.powercut import PowerLost
from nbdserve.powercut.writelog import Kind, LogFull

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdserve.block.node import Buffer, Done, Extent, Node
    from nbdserve.block.run import Op, Resolution
    from nbdserve.powercut.powercut import PowerCut

__all__ = ["PowerCutNode", "log_writes", "power_cut_of", "read_content"]

log = logging.getLogger("nbdserve.filters.power_cut")

PIECE = 1 << 20


async def log_writes(file: Node, power_cut: PowerCut, name: str = "") -> PowerCutNode:
    """A node over `file`, whose content becomes one more file of the log, of that name. Raises
    OSError: it cannot be read, or the log not written; EFBIG: there is more than max-data."""
    writes = power_cut.log
    room = None if writes.max_data is None else writes.max_data - writes.size
    content = await read_content(file, room)
    return PowerCutNode(file, power_cut, writes.add_file(content, name))


def power_cut_of(root: Node) -> PowerCut | None:
    """That of the tree, if there are power-cut nodes in it."""
    if isinstance(root, PowerCutNode):
        return root.power_cut
    found = (power_cut_of(child) for child in root.children.values())
    return next((each for each in found if each is not None), None)


async def read_content(node: Node, most: int | None = None) -> Content:
    """What a node holds. Raises OSError; EFBIG: that is more than `most` bytes of data."""
    content = Content(node.size)
    buffer = bytearray(PIECE)
    offset = 0
    while offset < node.size:
        for extent in await node.block_status(offset, node.size - offset):
            end = offset + extent.length
            while offset < end and not extent.zero:
                piece = min(PIECE, end - offset)
                view = memoryview(buffer)[:piece]
                await node.read(offset, view)
                content.write(offset, view)
                offset += piece
                if most is not None and content.data_size > most:
                    what = f"more than the {most} bytes of data that max-data leaves room for"
                    raise OSError(errno.EFBIG, what)
            offset = end
    return content


class PowerCutNode(FilterNode):
    """A child, and a log of what is done to it."""

    driver = "power-cut"

    def __init__(self, file: Node, power_cut: PowerCut, number: int) -> None:
        """`number`: that of the child in the log."""
        super().__init__(file)
        self.power_cut = power_cut
        self.log = power_cut.log
        self._number = number
        self._ranges = RangeLock()
        self._told = False
        self._front = _Front(self)

    def _check_power(self) -> None:
        if self.power_cut.is_cut:
            raise PowerLost

    def _begin(self, kind: Kind, offset: int = 0, data: bytes | int = b"") -> int:
        self._check_power()
        try:
            return self.log.begin(kind, self._number, offset, data)
        except LogFull as full:
            if not self._told:
                log.error("%s: %s: see the option max-data of the driver power-cut; what would"
                          " change the disk fails from now on", self.filename, full.strerror)
                self._told = True
            raise

    def _end(self, number: int, *, durable: bool = False) -> None:
        self._check_power()
        self.log.end(number, durable=durable and not self.no_flush)

    @asynccontextmanager
    async def _logged(self, kind: Kind, offset: int, data: bytes | int) -> AsyncIterator[None]:
        length = data if isinstance(data, int) else len(data)
        async with self._ranges.hold(offset, offset + length - 1):
            number = self._begin(kind, offset, data)
            yield
            self._end(number)

    # --- the synchronous way -------------------------------------------------------------------

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        if self.power_cut.is_cut:
            return Miss.OPAQUE  # the asynchronous way says why
        if op is READ:
            return self.file.resolve(READ, offset, length)
        if op is WRITE and self._ranges.is_free(offset, offset + length - 1):
            return [(self._front, offset, length)]
        return Miss.OPAQUE

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Log and do a write at once, if the child can do it in one piece; the range is free."""
        runs = self.file.resolve(WRITE, offset, len(data))
        if runs is not Miss.NEEDS_ALLOC and (isinstance(runs, Miss) or len(runs) > 1):
            return False
        number = self._begin(Kind.WRITE, offset, bytes(data))
        if isinstance(runs, Miss):
            done = self.file.allocate_nowait(offset, data)
        else:
            leaf, host_offset, _ = runs[0]
            done = leaf is not None and leaf.write_nowait(host_offset, data)
        if done:
            self.log.end(number)
        else:
            self.log.refused(number)
        return done

    # --- the asynchronous way ------------------------------------------------------------------

    async def read(self, offset: int, buffer: memoryview) -> None:
        self._check_power()
        await self.file.read(offset, buffer)
        self._check_power()

    async def write(self, offset: int, data: Buffer) -> None:
        data = bytes(data)
        async with self._logged(Kind.WRITE, offset, data):
            await self.file.write(offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        data = bytes(data)
        async with self._ranges.hold(offset, offset + len(data) - 1):
            number = self._begin(Kind.WRITE, offset, data)
            durable = await self.file.write_fua(offset, data)
            self._end(number, durable=durable)
        return durable

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        async with self._ranges.hold(offset, offset + length - 1):
            number = self._begin(Kind.WRITE_ZEROES, offset, length)
            try:
                await self.file.write_zeroes(
                    offset, length, may_unmap=may_unmap, fallback=fallback
                )
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP and not fallback:
                    self._check_power()
                    self.log.refused(number)
                raise
            self._end(number)

    async def discard(self, offset: int, length: int) -> None:
        async with self._logged(Kind.DISCARD, offset, length):
            await self.file.discard(offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        self._check_power()
        return await self.file.block_status(offset, length)

    async def flush(self) -> None:
        self._check_power()
        if self.no_flush:
            await self.file.flush()
            self._check_power()
            return
        number = self._begin(Kind.FLUSH)
        await self.file.flush()
        self._end(number)

    async def close(self) -> None:
        await self._front.idle()


class _Front(Leaf):
    """What writes to a power-cut node resolve to: a leaf that is the node's own."""

    def __init__(self, node: PowerCutNode) -> None:
        super().__init__(node.filename, node.size, read_only=node.read_only)
        self._node = node
        self._submitted = 0
        self._idle = trio.Event()
        self._idle.set()

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return self._node.write_nowait(offset, data)

    def submit_write(
        self, offset: int, data: Buffer, done: Done, *, fua: bool = False
    ) -> None:
        """A task of its own, as it may have to wait for others that overlap. (Nobody asks for FUA:
        that does not resolve.)"""
        assert not fua
        if not self._submitted:
            self._idle = trio.Event()
        self._submitted += 1
        trio.lowlevel.spawn_system_task(self._write, offset, data, done)

    async def _write(self, offset: int, data: Buffer, done: Done) -> None:
        error: OSError | None = None
        try:
            await self._node.write(offset, data)
        except OSError as failure:
            error = failure
        except Exception as bug:  # whoever waits gets an answer, whatever it is
            error = OSError(errno.EIO, f"internal error: {bug!r}")
        self._submitted -= 1
        if not self._submitted:
            self._idle.set()
        done(error)

    async def idle(self) -> None:
        """Wait until all is done that was submitted."""
        await self._idle.wait()

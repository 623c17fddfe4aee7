"""The `file` driver with O_DIRECT: `DirectFileNode`, past the page cache.

Law: the kernel gets whole blocks in aligned memory. What a request wants otherwise is read into, or
written from, a buffer of the pool; a write that covers part of a block reads the block first, and
no other write may touch it meanwhile (drivers/gate.py). Nothing is ever done inline: every request
waits for the disk, so all go to the engine.

The end of the file keeps its exact place. A write into the last block of a file that ends within
it, or that makes it end within a block, cannot be one of whole blocks: it goes through the page
cache, by a second descriptor. A sync of either covers both. One after the other the kernel keeps
the two coherent: it writes such pages out before O_DIRECT reads and drops them before O_DIRECT
writes. At the same time it does not: a page is larger than a block, may be read into the cache
while O_DIRECT writes next to it, and would later be written out with the old bytes (the kernel then
logs a collision and fails the next sync). So such a write has the file to itself; it is rare.
Cutting the file afterwards instead could cut off what another request had just appended.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from nbdserve.block.units import align_down, align_up
from nbdserve.drivers.file import FileNode
from nbdserve.drivers.gate import WriteGate
from nbdserve.engines.engine import completion
from nbdserve.engines.memory import address_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from nbdserve.block.buffers import BufferPool
    from nbdserve.block.node import Buffer
    from nbdserve.drivers.alignment import Alignment
    from nbdserve.drivers.file import OpenFile
    from nbdserve.engines.engine import Done, Engine

__all__ = ["DirectFileNode"]


class DirectFileNode(FileNode):
    """A FileNode whose descriptor was opened with O_DIRECT."""

    def __init__(
        self, file: OpenFile, engine: Engine, alignment: Alignment, buffers: BufferPool
    ) -> None:
        super().__init__(file, engine)
        self.alignment = alignment
        self.gate = WriteGate()
        self.buffers = buffers
        self._in_block = alignment.request - 1
        self._in_memory = alignment.memory - 1
        self._cached_fd: int | None = None
        self._bounced = 0
        self._rewritten = 0

    # --- the synchronous way: there is none ----------------------------------------------------

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        return False

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return False

    def writev_nowait(self, offset: int, data: Sequence[Buffer]) -> bool:
        return False

    # --- reads ---------------------------------------------------------------------------------

    def submit_read(self, offset: int, buffer: memoryview, done: Done) -> None:
        length = len(buffer)
        if not ((offset | length) & self._in_block or address_of(buffer) & self._in_memory):
            self._engine.submit_read(self.fd, buffer, offset, done)
            return
        self._bounced += 1
        start = align_down(offset, self.alignment.request)
        stop = align_up(offset + length, self.alignment.request)
        blocks = self.buffers.take(stop - start)

        def completed(error: OSError | None) -> None:
            if error is None:
                buffer[:] = blocks[offset - start : offset - start + length]
            self.buffers.give(blocks)
            done(error)

        self._engine.submit_read(self.fd, blocks[: stop - start], start, completed)

    def is_aligned(self, buffer: Buffer) -> bool:
        """Whether the kernel takes this memory."""
        return not address_of(buffer) & self._in_memory

    async def read(self, offset: int, buffer: memoryview) -> None:
        if len(buffer):
            await completion(partial(self.submit_read, offset, buffer))

    # --- writes --------------------------------------------------------------------------------

    def submit_write(
        self, offset: int, data: Buffer, done: Done, *, fua: bool = False
    ) -> None:
        if fua and not self.no_flush:
            self._submit_fua(offset, data, done)
            return
        end = offset + len(data)
        token = None
        if not ((offset | end) & self._in_block or address_of(data) & self._in_memory):
            token = self.gate.enter_nowait(offset, end)
        if token is None:
            _Write(self, offset, (data,), done).enter()
        else:
            self._submit_whole(offset, data, token, done)

    def _submit_whole(self, offset: int, data: Buffer, token: int, done: Done) -> None:
        """What nearly all writes are: whole blocks in aligned memory, and nobody in the way."""

        def written(error: OSError | None) -> None:
            if error is None:
                self._wrote(offset + len(data))
            self.gate.leave(token)
            done(error)

        try:
            self._engine.submit_write(self.fd, (data,), offset, written)
        except BaseException:
            self.gate.leave(token)
            raise

    def _submit_dsync(self, offset: int, data: Buffer, done: Done) -> None:
        _Write(self, offset, (data,), done, dsync=True).enter()

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        data = [piece for piece in data if len(piece)]
        if data:
            await completion(lambda done: _Write(self, offset, data, done).enter())

    def submit_blocks(self, offset: int, blocks: Buffer, done: Done, *, dsync: bool) -> None:
        """For _Write: whole blocks in aligned memory, whose turn it is."""
        fd = self.fd
        if dsync:
            assert self._dsync_fd is not None
            fd = self._dsync_fd
        self._engine.submit_write(fd, (blocks,), offset, done, dsync=dsync)

    def submit_cached(
        self, offset: int, data: Sequence[Buffer], done: Done, *, dsync: bool
    ) -> None:
        """For _Write: past the rules of O_DIRECT, through the page cache."""
        if self._cached_fd is None:
            self._cached_fd = self._reopen(0)
        self._engine.submit_write(self._cached_fd, data, offset, done, dsync=dsync)

    def submit_old(self, start: int, blocks: memoryview, done: Done) -> None:
        """For _Write: what blocks hold before they are changed."""
        self._rewritten += 1
        self._engine.submit_read(self.fd, blocks, start, done)

    def wrote(self, end: int, *, durable: bool) -> None:
        """For _Write, while it is still its turn: data was written up to here."""
        self._wrote(end, durable=durable)

    @asynccontextmanager
    async def _turn(self, offset: int, length: int) -> AsyncIterator[None]:
        """Wait until no block of the range is being rewritten; none will be in the body."""
        turn = trio.Event()
        token = self.gate.enter(offset, offset + length, turn.set)
        try:
            await turn.wait()
            yield
        finally:
            self.gate.leave(token)

    async def _zero_range(
        self, offset: int, length: int, unmap: bool, *, may_be_slow: bool
    ) -> bool:
        async with self._turn(offset, length):
            return await super()._zero_range(offset, length, unmap, may_be_slow=may_be_slow)

    async def discard(self, offset: int, length: int) -> None:
        async with self._turn(offset, length):
            await super().discard(offset, length)

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self._cached_fd is not None:
                os.close(self._cached_fd)

    def statistics(self) -> dict[str, object]:
        return {
            **super().statistics(),
            "bounced": self._bounced,
            "rewritten_blocks": self._rewritten,
            "alignment": self.alignment,
            "gate": self.gate.statistics(),
        }


# A range up to here overlaps all others.
WHOLE_FILE = 1 << 64


class _Write:
    """One write on its way: wait for its turn, read what it covers in part, write, leave."""

    __slots__ = ("_data", "_done", "_dsync", "_end", "_error", "_node", "_offset", "_reads",
                 "_slot", "_start", "_stop", "_token")  # fmt: skip

    def __init__(
        self,
        node: DirectFileNode,
        offset: int,
        data: Sequence[Buffer],
        done: Callable[[OSError | None], None],
        *,
        dsync: bool = False,
    ) -> None:
        self._node = node
        self._data = data
        self._done = done
        self._dsync = dsync
        self._offset = offset
        self._end = offset + sum(map(len, data))
        self._start = align_down(offset, node.alignment.request)
        self._stop = align_up(self._end, node.alignment.request)
        self._slot: memoryview | None = None
        self._error: OSError | None = None
        self._reads = 0
        self._token: int | None = None

    def enter(self) -> None:
        """May raise OSError: then nothing was done, nor will be."""
        gate = self._node.gate
        if self._start == self._offset and self._stop == self._end:
            self._token = gate.enter(self._start, self._stop, self._go)
        elif self._passes_end():
            self._token = gate.enter(0, WHOLE_FILE, self._go, serialising=True)
        else:
            self._token = gate.enter(self._start, self._stop, self._go, serialising=True)

    def _passes_end(self) -> bool:
        """Whether the file ends, or is to end, within the last block. It may have grown by the time
        of our turn, but never ends earlier than it did."""
        return self._end < self._stop and self._stop > self._node.length

    def _go(self) -> None:
        whole = self._start == self._offset and self._stop == self._end
        try:
            if whole:
                self._write()
            else:
                self._rewrite()
        except OSError as error:  # no memory, no descriptor
            if self._token is None:
                raise
            self._written(error)  # it had to wait: whoever submitted it is gone

    def _write(self) -> None:
        """Whole blocks."""
        if len(self._data) == 1 and self._node.is_aligned(self._data[0]):
            self._node.submit_blocks(
                self._offset, self._data[0], self._written, dsync=self._dsync
            )
        else:
            self._merge(self._node.buffers.take(self._stop - self._start))

    def _rewrite(self) -> None:
        """Parts of blocks: get the rest of the first and last."""
        node, block = self._node, self._node.alignment.request
        if self._passes_end():
            node.submit_cached(self._offset, self._data, self._written, dsync=self._dsync)
            return
        self._slot = node.buffers.take(self._stop - self._start)
        last = self._stop - block - self._start
        pieces = set()
        if self._start < self._offset:
            pieces.add((0, block))
        if self._end < self._stop:
            pieces.add((last, last + block))
        if not all(node.is_aligned(self._slot[first:end]) for first, end in pieces):
            pieces = {(0, last + block)}
        self._reads = len(pieces)
        for first, end in pieces:
            node.submit_old(self._start + first, self._slot[first:end], self._read)

    def _read(self, error: OSError | None) -> None:
        self._error = self._error or error
        self._reads -= 1
        if self._reads:
            return
        if self._error is not None:
            self._written(self._error)
        elif self._slot is not None:
            self._merge(self._slot)

    def _merge(self, slot: memoryview) -> None:
        self._slot = slot
        place = self._offset - self._start
        for piece in self._data:
            slot[place : place + len(piece)] = piece
            place += len(piece)
        blocks = slot[: self._stop - self._start]
        self._node.submit_blocks(self._start, blocks, self._written, dsync=self._dsync)

    def _written(self, error: OSError | None) -> None:
        node = self._node
        if self._slot is not None:
            node.buffers.give(self._slot)
        if error is None:
            node.wrote(self._end, durable=self._dsync)
        assert self._token is not None  # no completion comes from inside a submission
        node.gate.leave(self._token)
        self._done(error)

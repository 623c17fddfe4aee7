"""A leaf in memory whose behaviour a test decides, request by request.

It stores bytes and holes (blocks of `BLOCK` bytes that resolve to no leaf and read as zeroes), and
has some switches, all off at first:

* `would_block`: the synchronous way always says that it would have to wait;
* `miss`: what `resolve` answers instead of runs;
* `queues`: flushes may be submitted; `fua`: writes with FUA; `flushed`: there is nothing to flush,
  which cannot be done any more once `failed` is set;
* `fail_at(n, errno)`: the nth operation from now raises OSError, on whichever way it comes;
* `hold()`: what takes the asynchronous way is stuck until `release()`.

`calls` lists what reached the leaf as (name, offset, length), `waiting` counts what is stuck.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from nbdserve.block.node import Buffer, Extent, Leaf
from nbdserve.block.run import Miss, Op, Resolution

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.block.node import Done

__all__ = ["BLOCK", "MemoryLeaf"]

BLOCK = 4096


class MemoryLeaf(Leaf):
    """`size` bytes, all of them holes; give it content through `data` and `fill`."""

    def __init__(self, size: int, *, read_only: bool = False) -> None:
        super().__init__("memory", size, read_only=read_only)
        self.data = bytearray(size)
        self.holes = set(range(-(-size // BLOCK)))
        self.calls: list[tuple[str, int, int]] = []
        self.would_block = False
        self.miss: Miss | None = None
        self.queues = False
        self.flushed = False
        self.failed: OSError | None = None
        self.waiting = 0
        self._failures: dict[int, int] = {}  # operations left until then -> errno
        self._stuck: list[trio.Event] | None = None
        self._queued: list[Callable[[], None]] = []

    def fill(self, offset: int, data: bytes) -> None:
        """Store content behind everybody's back."""
        self.data[offset : offset + len(data)] = data
        self.holes.difference_update(_blocks(offset, len(data)))

    def fail_at(self, number: int, error: int) -> None:
        """The operation of that number, 1 being the next one, raises this errno."""
        self._failures[len(self.calls) + number] = error

    def hold(self) -> None:
        """From now on asynchronous operations are stuck."""
        self._stuck = []

    def release(self, nb_operations: int | None = None, *, newest_first: bool = False) -> None:
        """Let the oldest stuck operations go on; without a number all, and those to come."""
        stuck, queued = self._stuck or [], self._queued
        if nb_operations is None:
            nb_operations, self._stuck = self.waiting, None
        for _ in range(nb_operations):
            if stuck:
                stuck.pop(-1 if newest_first else 0).set()
            else:
                self.waiting -= 1
                queued.pop(-1 if newest_first else 0)()

    # --- the node ------------------------------------------------------------------------------

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        if self.miss is not None:
            return self.miss
        if op is Op.WRITE_FUA and not self.fua:
            return Miss.NEEDS_FLUSH
        if op is not Op.READ:
            self.holes.difference_update(_blocks(offset, length))
            return [(self, offset, length)]
        return [
            (None if is_hole else self, start, nb_bytes)
            for is_hole, start, nb_bytes in self._pieces(offset, length)
        ]

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        if self.would_block:
            return False
        self._count("read", offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]
        return True

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self.would_block:
            return False
        self._count("write", offset, len(data))
        self._store(offset, data)
        return True

    def submit_read(self, offset: int, buffer: memoryview, done: Done) -> None:
        def read() -> None:
            self._count("submit_read", offset, len(buffer))
            buffer[:] = self.data[offset : offset + len(buffer)]

        self._queue(read, done)

    def submit_write(
        self, offset: int, data: Buffer, done: Done, *, fua: bool = False
    ) -> None:
        def write() -> None:
            self._count("submit_write" + "+fua" * fua, offset, len(data))
            self._store(offset, data)

        self._queue(write, done)

    def _queue(self, action: Callable[[], None], done: Done) -> None:
        def complete() -> None:
            try:
                action()
            except OSError as error:
                done(error)
            else:
                done(None)

        if self._stuck is None:
            trio.lowlevel.current_trio_token().run_sync_soon(complete)
        else:
            self.waiting += 1
            self._queued.append(complete)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._wait()
        self._count("read", offset, len(buffer))
        buffer[:] = self.data[offset : offset + len(buffer)]

    async def write(self, offset: int, data: Buffer) -> None:
        await self._wait()
        self._count("write", offset, len(data))
        self._store(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        await self._wait()
        name = "zeroes" + "+unmap" * may_unmap + "+fast" * (not fallback)
        self._count(name, offset, length)
        self._store(offset, bytes(length))
        if may_unmap:
            self._punch(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self._wait()
        self._count("discard", offset, length)
        self._punch(offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._wait()
        self._count("block_status", offset, length)
        return [
            Extent(nb_bytes, data=not is_hole, zero=is_hole)
            for is_hole, _, nb_bytes in self._pieces(offset, length)
        ]

    def flush_nowait(self) -> bool:
        if self.failed is not None:
            raise self.failed
        return self.flushed

    def submit_flush(self, done: Done) -> bool:
        if not self.queues:
            return False
        self._queue(lambda: self._count("submit_flush", 0, 0), done)
        return True

    async def flush_to_disk(self) -> None:
        await self._wait()
        self._count("flush", 0, 0)

    # --- inside --------------------------------------------------------------------------------

    async def _wait(self) -> None:
        if self._stuck is None:
            await trio.lowlevel.checkpoint()
            return
        event = trio.Event()
        self._stuck.append(event)
        self.waiting += 1
        try:
            await event.wait()
        finally:
            self.waiting -= 1

    def _count(self, name: str, offset: int, length: int) -> None:
        self.calls.append((name, offset, length))
        error = self._failures.pop(len(self.calls), 0)
        if error:
            raise OSError(error, os.strerror(error))

    def _store(self, offset: int, data: Buffer) -> None:
        self.fill(offset, bytes(data))
        self.generation.written += 1

    def _punch(self, offset: int, length: int) -> None:
        """Whole blocks become holes."""
        first, end = -(-offset // BLOCK), (offset + length) // BLOCK
        self.holes.update(range(first, end))
        if end > first:
            self.data[first * BLOCK : end * BLOCK] = bytes((end - first) * BLOCK)

    def _pieces(self, offset: int, length: int) -> list[tuple[bool, int, int]]:
        """(is a hole, offset, length) of the blocks of a range, neighbours alike joined."""
        pieces: list[tuple[bool, int, int]] = []
        for block in _blocks(offset, length):
            start, end = max(offset, block * BLOCK), min(offset + length, (block + 1) * BLOCK)
            is_hole = block in self.holes
            if pieces and pieces[-1][0] is is_hole:
                pieces[-1] = (is_hole, pieces[-1][1], end - pieces[-1][1])
            else:
                pieces.append((is_hole, start, end - start))
        return pieces or [(False, offset, 0)]


def _blocks(offset: int, length: int) -> range:
    return range(offset // BLOCK, -(-(offset + length) // BLOCK))

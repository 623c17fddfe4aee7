"""An open image as nbdkit's threads call it.

Each request first goes the synchronous way, in the calling thread (turn.py). What cannot be done so
but is a single read, write or sync of a file is handed to the engine from the same thread and
waited for. Only the rest is a task in trio's thread.

A throttled drive has no synchronous way here: its requests wait for trio's clock, and a wait is
what they are for.

Law of buffers: nbdkit's are ours until the call returns, and it returns when the request is done.
Errors are OSError. Each request is counted in its connection's account (block/account.py), in the
turn of whoever finishes it.
"""

from __future__ import annotations

import errno
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING

from nbdserve.block.run import Miss
from nbdserve.nbdkit.loop import Waiter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeVar

    from nbdserve.block.account import Operations
    from nbdserve.block.node import Extent
    from nbdserve.nbdkit.loop import Image, Loop

    T = TypeVar("T")

__all__ = ["Disk"]

# Bytes that a request to fill the page cache reads at a time.
CACHE_STEP = 1 << 20


class Disk:
    """An image, for one connection. Offsets and lengths in bytes, within `size`."""

    def __init__(self, loop: Loop, image: Image) -> None:
        self._loop = loop
        self._turn = loop.turn
        self.backend = backend = image.backend
        self.size = backend.size
        self.read_only = backend.read_only
        self._inline = not backend.throttled
        self._queues_reads = backend.queues_reads
        self._read_nowait = backend.read_nowait
        self._write_nowait = backend.write_nowait
        with_turn = self._turn
        with_turn.enter()
        try:
            self._account = backend.accounts.open()
        finally:
            with_turn.leave()
        self._reads = self._account.operations["rd"]
        self._writes = self._account.operations["wr"]

    def close(self) -> None:
        """The connection has ended; none of its requests is under way."""
        self._turn.enter()
        try:
            self.backend.accounts.close(self._account)
        finally:
            self._turn.leave()

    # --- requests that may be done at once -----------------------------------------------------

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`."""
        began = perf_counter_ns()
        length = len(buffer)
        waiter = None
        if self._inline:
            self._turn.enter()
            try:
                miss: Miss | None = Miss.WOULD_BLOCK
                if not self._queues_reads:
                    miss = self._read_nowait(offset, buffer)
                    if miss is None:
                        self._reads.add(1, length, perf_counter_ns() - began)
                        return
                if miss is Miss.WOULD_BLOCK:
                    waiter = self._submitted(
                        self._reads, length, began,
                        partial(self.backend.submit_read, offset, buffer),
                    )  # fmt: skip
            except OSError:
                self._reads.fail(perf_counter_ns() - began)
                raise
            finally:
                self._turn.leave()
        if waiter is not None:
            waiter.wait()
        else:
            self._late(self._reads, length, began, self.backend.read, offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Write; durable on return with `fua` or without a write cache."""
        began = perf_counter_ns()
        length = len(data)
        backend = self.backend
        waiter = None
        if self._inline:
            self._turn.enter()
            try:
                if fua or not backend.write_cache or backend.queues_writes:
                    waiter = self._submitted(
                        self._writes, length, began,
                        partial(backend.submit_write, offset, data, fua=fua),
                    )  # fmt: skip
                elif self._write_nowait(offset, data) is None:
                    self._writes.add(1, length, perf_counter_ns() - began)
                    return
            except OSError:
                self._writes.fail(perf_counter_ns() - began)
                raise
            finally:
                self._turn.leave()
        if waiter is not None:
            waiter.wait()
        else:
            write = partial(backend.write, fua=fua)
            self._late(self._writes, length, began, write, offset, data)

    def flush(self) -> None:
        """Make every write answered so far durable."""
        began = perf_counter_ns()
        flushes = self._account.operations["flush"]
        waiter = None
        self._turn.enter()
        try:
            if self.backend.flush_nowait():
                flushes.add(1, 0, perf_counter_ns() - began)
                return
            waiter = self._submitted(flushes, 0, began, self.backend.submit_flush)
        except OSError:
            flushes.fail(perf_counter_ns() - began)
            raise
        finally:
            self._turn.leave()
        if waiter is not None:
            waiter.wait()
        else:
            self._late(flushes, 0, began, self.backend.flush)

    # --- requests that are tasks ---------------------------------------------------------------

    def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """What the range holds is no longer needed."""
        discard = partial(self.backend.discard, fua=fua)
        self._task("unmap", length, discard, offset, length)

    def zero(self, offset: int, length: int, *, may_trim: bool, fast: bool, fua: bool) -> None:
        """Make the range zeroes; `fast`: OSError(EOPNOTSUPP) rather than writing them."""
        zero = partial(self.backend.write_zeroes, may_unmap=may_trim, fast=fast, fua=fua)
        self._task("zero", length, zero, offset, length)

    def extents(self, offset: int, length: int, *, one: bool) -> list[Extent]:
        """As BlockBackend.block_status."""
        status = partial(self.backend.block_status, one=one)
        return self._task("status", length, status, offset, length)

    def cache(self, offset: int, length: int) -> None:
        """Bring the range into the page cache, by reading it."""
        self._task("prefetch", length, self._prefetch, offset, length)

    async def _prefetch(self, offset: int, length: int) -> None:
        buffer = memoryview(bytearray(min(length, CACHE_STEP)))
        while length:
            piece = buffer[:length]
            await self.backend.read(offset, piece)
            offset += len(piece)
            length -= len(piece)

    def _task(
        self, kind: str, length: int, function: Callable[..., Awaitable[T]], *args: object
    ) -> T:
        operations = self._account.operations[kind]
        return self._late(operations, length, perf_counter_ns(), function, *args)

    # --- what is not done at once --------------------------------------------------------------

    def _submitted(
        self,
        operations: Operations,
        length: int,
        began: int,
        submit: Callable[[Callable[[OSError | None], None]], bool],
    ) -> Waiter | None:
        """Submit to the engine, in our turn; None: it must go another way."""
        waiter = Waiter()

        def done(error: OSError | None) -> None:
            _count(operations, length, began, error)
            waiter.done(error)

        return waiter if submit(done) else None

    def _late(
        self,
        operations: Operations,
        length: int,
        began: int,
        function: Callable[..., Awaitable[T]],
        *args: object,
    ) -> T:
        async def counted() -> T:
            error: Exception | None = OSError(errno.EIO, "cut off")
            try:
                result = await function(*args)
                error = None
            finally:
                _count(operations, length, began, error)
            return result

        return self._loop.call(self.backend, counted)


def _count(operations: Operations, length: int, began: int, error: Exception | None) -> None:
    if error is None:
        operations.add(1, length, perf_counter_ns() - began)
    else:
        operations.fail(perf_counter_ns() - began)

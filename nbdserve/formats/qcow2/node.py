"""The qcow2 node: which module does what for a request, and the node's own life.

Nothing is decided here. A request goes to resolve, read, allocation or discard; a flush to
ordering. What is left is the flush lock, the background task that settles what was unlinked when
no client flushes, and closing. open.py opens it.

After qcow2_co_pwritev_part, qcow2_co_block_status and qcow2_close of QEMU.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import trio

from nbdserve.block.node import Buffer, Extent, Node
from nbdserve.block.units import MIB
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.allocation import allocate_nowait, write_allocating
from nbdserve.formats.qcow2.cache import TableCache
from nbdserve.formats.qcow2.discard import discard, write_zeroes
from nbdserve.formats.qcow2.ordering import is_dirty, mark_corrupt, write_back
from nbdserve.formats.qcow2.read import Reader
from nbdserve.formats.qcow2.resolve import ClusterType

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Mapping as MappingType

    from nbdserve.block.run import Op, Resolution
    from nbdserve.engines.engine import Engine
    from nbdserve.formats.qcow2.geometry import Geometry
    from nbdserve.formats.qcow2.header import Header
    from nbdserve.formats.qcow2.image import Image

__all__ = ["CacheSizes", "Qcow2Node"]

# Seconds after which clusters that were unlinked are freed though no client has flushed, and how
# many may wait at most.
SETTLE_AFTER = 1.0
SETTLE_AT = 16384

CLOSING_FLUSHES = 4


class CacheSizes(NamedTuple):
    """Bytes. QEMU's defaults: L2 as much as the image needs but 32 MiB at most (l2-cache-size)."""

    l2: int = 32 * MIB
    refcount: int = 8 * MIB


class Qcow2Node(Node):
    """An open qcow2 image."""

    driver = "qcow2"

    image: Image

    def __init__(
        self,
        file: Node,
        header: Header,
        geometry: Geometry,
        engine: Engine,
        *,
        read_only: bool,
        no_flush: bool,
    ) -> None:
        super().__init__(file.filename, header.size, read_only=read_only, no_flush=no_flush)
        self.wanted = Signal()
        self._engine = engine
        self._geometry = geometry
        self._flush_lock = trio.Lock()
        self._flushes = 0  # begun
        self._flushed = 0  # number of the last that succeeded
        self._reliefs = 0  # the same of `relieve`
        self._relieved = 0
        self._release_lock = trio.Lock()

    def wire(self, sizes: CacheSizes) -> None:
        """Make the caches, whose loaders are the image's, and shorten the hot path."""
        image = self.image
        image.mapping.set_cache(TableCache(sizes.l2, image.load_l2, self.relieve))
        image.refcounts.blocks = TableCache(
            sizes.refcount, image.refcounts.load_block, self.relieve
        )
        self._reader = Reader(image, self._engine)
        self.resolve = image.mapping.resolve  # type: ignore[method-assign]

    @property
    def children(self) -> MappingType[str, Node]:
        nodes = {"file": self.image.file}
        if self.image.data_file is not None:
            nodes["data-file"] = self.image.data_file
        if self.image.backing is not None:
            nodes["backing"] = self.image.backing
        return nodes

    @property
    def cluster_size(self) -> int:
        return self._geometry.cluster_size

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        return self.image.mapping.resolve(op, offset, length)

    def allocate_nowait(self, offset: int, data: Buffer) -> bool:
        return allocate_nowait(self.image, offset, data)

    async def read(self, offset: int, buffer: memoryview) -> None:
        try:
            await self._reader.read(offset, buffer)
        except CorruptImage as error:
            raise OSError(error.errno, str(error)) from None

    async def write(self, offset: int, data: Buffer) -> None:
        image = self.image
        rest = memoryview(data)
        while len(rest):
            image.check_writable()
            try:
                extent = await image.mapping.extent(offset, len(rest))
            except CorruptImage as error:
                raise image.stop(error) from None
            if extent.type is ClusterType.STANDARD and extent.copied:
                try:
                    image.assert_data(extent.host_offset, extent.length)
                except CorruptImage as error:
                    raise image.stop(error) from None
                await image.data.write(extent.host_offset, rest[: extent.length])
                written = extent.length
            else:
                written = await write_allocating(image, self._reader, offset, rest)
            offset += written
            rest = rest[written:]

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        """Passed down where it is one write of one file: several durable ones, one after the other,
        would cost more than a flush."""
        image = self.image
        image.check_writable()
        host_offset = image.mapping.durable_at(offset, len(data))
        if host_offset is not None:
            return await image.data.write_fua(host_offset, data)
        await self.write(offset, data)
        if not image.durability.is_synced:
            image.file.presume_written()  # the write may have gone to the data file alone
            image.durability.file_written()
        return False

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        await write_zeroes(
            self.image, offset, length, may_unmap=may_unmap, fallback=fallback, write=self.write
        )

    async def discard(self, offset: int, length: int) -> None:
        await discard(self.image, offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        image = self.image
        try:
            extent = await image.mapping.extent(offset, length)
        except CorruptImage as error:
            raise OSError(error.errno, str(error)) from None
        length = extent.length
        match extent.type:
            case ClusterType.STANDARD:
                # Part of a data cluster may be a hole in the file: then it reads as zeroes.
                below = await image.data.block_status(extent.host_offset, length)
                return [Extent(piece.length, data=True, zero=piece.zero) for piece in below]
            case ClusterType.COMPRESSED:
                return [Extent(length, data=True, zero=False)]
            case ClusterType.UNALLOCATED:
                if image.backing is None or offset >= image.backing.size:
                    return [Extent(length, data=False, zero=True, allocated=False)]
                inside = min(length, image.backing.size - offset)
                below = await image.backing.block_status(offset, inside)
                return [piece._replace(allocated=False) for piece in below]
        return [Extent(length, data=False, zero=True)]

    # --- the flush chain -----------------------------------------------------------------------

    @property
    def _files(self) -> list[Node]:
        """What holds this node's own metadata and data."""
        image = self.image
        return [image.file] if image.data_file is None else [image.file, image.data_file]

    def _is_settled(self) -> bool:
        """Whether flushing the files is all that a flush takes: no metadata is dirty or on its way,
        and none waits to be known durable. Raises OSError if the image is broken."""
        if self.read_only:
            return True
        image = self.image
        image.check_writable()
        return not (
            self._flush_lock.locked()
            or image.durability.awaits_flush
            or image.quarantine
            or is_dirty(image)
        )

    def flush_nowait(self) -> bool:
        if not self._is_settled():
            return False
        return self.read_only or all(file.flush_nowait() for file in self._files)

    def submit_flush(self, done: Callable[[OSError | None], None]) -> bool:
        if not self._is_settled():
            return False
        *others, last = self._files
        return all(file.flush_nowait() for file in others) and last.submit_flush(done)

    async def flush(self) -> None:
        if self.read_only:
            return
        if self._is_settled():
            for file in self._files:
                await file.flush()
            return
        covering = self._flushes + 1  # the next to begin; those who wait for it share it
        async with self._flush_lock:
            if self._flushed < covering:
                self._flushes = number = self._flushes + 1
                token = self.image.durability.begin_flush()
                await super().flush()
                self._flushed = number
                self.image.durability.flushed(token)
                self.image.quarantine.mark_durable()
        if self.image.quarantine:
            await self._release()

    async def flush_to_os(self) -> None:
        await write_back(self.image)

    async def relieve(self) -> None:
        """A cache is full of dirty tables (reads of a broken image go on: it grows), or the redo
        log of changes."""
        covering = self._reliefs + 1  # as in `flush`
        async with self._flush_lock:
            if self._relieved < covering and self.image.broken is None:
                self._reliefs = number = self._reliefs + 1
                await write_back(self.image)
                self._relieved = number

    async def _release(self) -> None:
        """Free what has left quarantine, and give its room in the file back."""
        image = self.image
        async with self._release_lock:
            released = image.quarantine.release()
            if released:
                self._reader.forget_compressed()
            try:
                while released:
                    if image.redo.low:
                        await self.relieve()
                    del released[: await image.refcounts.lower(released)]
            finally:
                image.quarantine.put_back(released)

    async def settle(self) -> None:
        """Background task: flush some time after something was unlinked, client or no client; set
        the corrupt bit soon after the image broke."""
        image = self.image
        while image.broken is None:
            await self.wanted.wait()
            with trio.move_on_after(SETTLE_AFTER):
                while True:
                    await trio.sleep(SETTLE_AFTER / 10)
                    if image.broken is not None or len(image.quarantine) >= SETTLE_AT:
                        break
            self.wanted.clear()
            # A client's next flush meets the same error and reports it.
            with suppress(OSError):
                await self.flush()
                if image.quarantine:
                    self.wanted.set()
        with suppress(OSError):
            await mark_corrupt(image)

    async def close(self) -> None:
        """Flush until nothing is dirty or waits: freeing what was unlinked dirties refcounts."""
        if self.read_only:
            return
        # At most: write and unlink, free what was unlinked (a former refcount table, too), write
        # the lowered refcounts.
        for _ in range(CLOSING_FLUSHES):
            if self.image.broken is not None:
                await mark_corrupt(self.image)
                return
            await self.flush()
            async with self._release_lock:  # the background task may be freeing the last
                if not (self.image.quarantine or is_dirty(self.image)):
                    return

    def statistics(self) -> dict[str, object]:
        image = self.image
        return {
            "l2_cache": image.l2.statistics(),
            "refcount_cache": image.refcounts.blocks.statistics(),
            "written_back": dict(image.written_back),
            "allocated_clusters": image.refcounts.allocated,
            "freed_clusters": image.refcounts.freed,
            "quarantine": len(image.quarantine),
            "locks": image.locks.statistics(),
            "compressed": self._reader.statistics(),
            "flushes_begun": self._flushes,
            "corrupt": image.broken is not None,
        }


class Signal:
    """An event that can be cleared: something happened since.

    It may be set where no trio runs, by one who holds trio's thread still (Node, on the
    synchronous way): then that thread sets the event when it goes on.
    """

    def __init__(self) -> None:
        self._event = trio.Event()
        self._waiter: tuple[int, trio.lowlevel.TrioToken] | None = None  # its thread and its trio

    def set(self) -> None:
        """Something happened."""
        if self._waiter is not None and self._waiter[0] != threading.get_ident():
            self._waiter[1].run_sync_soon(self.set, idempotent=True)
        else:
            self._event.set()

    def clear(self) -> None:
        """It was dealt with."""
        self._event = trio.Event()

    async def wait(self) -> None:
        """Until something has happened."""
        self._waiter = (threading.get_ident(), trio.lowlevel.current_trio_token())
        await self._event.wait()

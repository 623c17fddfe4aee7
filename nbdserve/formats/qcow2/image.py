"""An open image's parts, and the few operations on several of them at once.

What resolve, read, allocation, discard and ordering share. It knows no requests; it keeps what
they must agree on: the tables, which guest clusters are being changed (`locks`), which host
clusters may not be handed out yet (`quarantine`), and whether the image may still be written.

Law: once `broken` is set nothing is written to the image any more but the corrupt bit.
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections import Counter
from typing import TYPE_CHECKING

from nbdserve.block.rangelock import RangeLock
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.compressed import compressed_extent
from nbdserve.formats.qcow2.ordering import L2_TABLE
from nbdserve.formats.qcow2.resolve import ClusterType, cluster_type
from nbdserve.formats.qcow2.spec import COPIED, OFFSET_MASK
from nbdserve.formats.qcow2.tables import Table, decode_table

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nbdserve.block.node import Node
    from nbdserve.formats.qcow2.cache import TableCache
    from nbdserve.formats.qcow2.durability import Durability
    from nbdserve.formats.qcow2.geometry import Geometry
    from nbdserve.formats.qcow2.header import Header
    from nbdserve.formats.qcow2.metadata import MetadataMap
    from nbdserve.formats.qcow2.quarantine import Quarantine
    from nbdserve.formats.qcow2.redo import Redo
    from nbdserve.formats.qcow2.refcount import Clusters, Refcounts
    from nbdserve.formats.qcow2.resolve import Mapping

__all__ = ["Image"]

log = logging.getLogger("nbdserve.qcow2")


class Image:
    """All attributes are set once, when the image is opened.

    `file` holds the metadata; `data` the guest's clusters: that is `data_file` if there is one,
    else `file` as well.
    """

    def __init__(
        self,
        header: Header,
        geometry: Geometry,
        file: Node,
        backing: Node | None,
        data_file: Node | None,
        mapping: Mapping,
        refcounts: Refcounts,
        metadata: MetadataMap,
        quarantine: Quarantine,
        durability: Durability,
        redo: Redo,
        wake: Callable[[], None],
        relieve: Callable[[], Awaitable[None]],
    ) -> None:
        """`wake`: the background task has something to do. `relieve`: write back, whoever does."""
        self.header = header
        self.geometry = geometry
        self.file = file
        self.backing = backing
        self.data_file = data_file
        self.data = data_file or file
        self.mapping = mapping
        self.refcounts = refcounts
        self.metadata = metadata
        self.quarantine = quarantine
        self.durability = durability
        self.redo = redo
        self.locks = RangeLock()
        self.broken: CorruptImage | None = None
        self.written_back: Counter[str] = Counter()  # tables, by what they are (ordering.What)
        self._wake = wake
        self._relieve = relieve

    @property
    def l2(self) -> TableCache:
        """The cache of L2 tables, by L1 index."""
        return self.mapping.l2

    def check_writable(self) -> None:
        """Raises OSError(EIO) once the image was found damaged."""
        if self.broken is not None:
            raise OSError(errno.EIO, f"{self.file.filename}: stopped: {self.broken}")

    def stop(self, reason: CorruptImage) -> OSError:
        """Damage was found on the way to a write: nothing more is written. Returns the error to
        answer the request with."""
        if self.broken is None:
            self.broken = reason
            self.mapping.refuse_writes()
            self.redo.stop()
            self._wake()  # to set the corrupt bit
            log.error("%s; the image is marked corrupt and takes no more writes", reason)
        return OSError(errno.EIO, str(reason))

    # --- L2 tables -------------------------------------------------------------------------------

    async def load_l2(self, index: int) -> Table:
        """Read one L2 table (the cache's loader). Raises CorruptImage."""
        host_offset = self.mapping.l1.entries[index] & OFFSET_MASK
        if host_offset & self.geometry.in_cluster:
            raise CorruptImage(
                f"{self.file.filename}: L2 table {index} at {host_offset:#x} is not aligned"
            )
        data = bytearray(self.geometry.cluster_size)
        await self.file.read(host_offset, memoryview(data))
        return self.redo.watch(Table(decode_table(data), host_offset), L2_TABLE)

    def table_nowait(self, offset: int) -> Table | None:
        """The L2 table for a guest offset, fit to be changed; a new one if L1 has none.

        None: something must be loaded or written back first; use `table`.
        """
        if self.redo.low:
            return None
        index = offset >> self.geometry.l1_bits
        l1_entry = self.mapping.l1.entries[index]
        if l1_entry & OFFSET_MASK:
            return self.l2.peek(index) if l1_entry & COPIED else None
        if not self.l2.make_room():
            return None
        taken = self.refcounts.take_nowait(1)
        if taken is None:
            return None
        return self._link_l2(index, taken, array("Q", bytes(self.geometry.cluster_size)))

    async def table(self, offset: int) -> Table:
        """As `table_nowait`, doing what it takes. The caller holds the lock on the clusters and
        must not await before it has used the table."""
        index = offset >> self.geometry.l1_bits
        while True:
            # Another request may have found damage meanwhile; then nothing is written back any
            # more and the cache never gets room.
            self.check_writable()
            table = self.table_nowait(offset)
            if table is not None:
                return table
            if self.redo.low:
                await self._relieve()
                continue
            l1_entry = self.mapping.l1.entries[index]
            if not l1_entry & OFFSET_MASK:
                await self.l2.relieve()
                self.refcounts.put_back(await self.refcounts.take(1))
            elif l1_entry & COPIED:
                await self.l2.get(index)
            else:
                await self._copy_l2(index)

    async def _copy_l2(self, index: int) -> None:
        """A table that somebody else refers to as well must not be changed in place."""
        taken = await self.refcounts.take(1)
        try:
            old = await self.l2.get(index)
        except BaseException:
            self.abandon(taken)
            raise
        if self.mapping.l1.entries[index] & COPIED:
            self.abandon(taken)  # another request copied it meanwhile
            return
        self.l2.remove(index)
        self._link_l2(index, taken, old.entries[:])
        self._unlink(old.host_offset >> self.geometry.cluster_bits)

    def _link_l2(self, index: int, taken: Clusters, entries: array[int]) -> Table:
        host_offset = taken.first << self.geometry.cluster_bits
        table = self.redo.watch(Table(entries, host_offset, fresh=True), L2_TABLE)
        self.metadata.add(host_offset)
        self.l2.add(index, table)
        self.mapping.l1.set(index, host_offset | COPIED)
        return table

    # --- unlinking -------------------------------------------------------------------------------

    def forget(self, entry: int) -> None:
        """An L2 entry is overwritten: what it referred to loses one reference, in due time.

        Raises CorruptImage, with nothing changed, if that is no cluster of data: it would be
        discarded, and handed out to somebody else, while tables are in it.
        """
        bits = self.geometry.cluster_bits
        if self.data_file is not None:
            return  # its cluster in the data file stays its own
        match cluster_type(entry):
            case ClusterType.STANDARD | ClusterType.ZERO_ALLOC:
                host_offset, nb_bytes = entry & OFFSET_MASK, self.geometry.cluster_size
            case ClusterType.COMPRESSED:
                host_offset, nb_bytes = compressed_extent(entry, bits)
            case _:
                return
        self.assert_data(host_offset, nb_bytes)
        for cluster in range(host_offset >> bits, (host_offset + nb_bytes - 1 >> bits) + 1):
            self._unlink(cluster)

    def assert_data(self, host_offset: int, nb_bytes: int) -> None:
        """Raises CorruptImage if guest data at a host offset would lie on metadata."""
        if self.data_file is None:
            self.metadata.assert_data(host_offset, nb_bytes)

    def abandon(self, clusters: Clusters) -> None:
        """Clusters that were taken but never linked."""
        for cluster in range(clusters.first, clusters.first + clusters.count):
            self._unlink(cluster)

    def _unlink(self, cluster: int) -> None:
        self.quarantine.add(cluster)
        self._wake()

"""The map from guest ranges to host offsets: what an L1 and L2 entry means.

Law: everything here is synchronous and without I/O. `resolve` turns a range into runs, through
the backing chain down to the leaves; `extent_at` answers for one range of one image what it
consists of, and is what the asynchronous paths walk along.

The contract of `extent_at` is that of qcow2_get_host_offset: bytes in is what the caller wants,
bytes out is how many of them are of one type and contiguous in the host file.

Writes resolve only onto standard clusters whose refcount is one (COPIED) and which are not marked
zero; everything else changes the mapping and belongs to allocation.py.
"""

from __future__ import annotations

import enum
from array import array
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.block.node import Leaf, Node
from nbdserve.block.run import READ, WRITE, Miss, Op, Resolution, Run
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.spec import COMPRESSED, COPIED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from collections.abc import Container

    from nbdserve.formats.qcow2.cache import TableCache
    from nbdserve.formats.qcow2.durability import Durability
    from nbdserve.formats.qcow2.geometry import Geometry
    from nbdserve.formats.qcow2.tables import Table

__all__ = ["ClusterType", "GuestExtent", "Mapping", "cluster_type"]


class ClusterType(enum.Enum):
    """What an L2 entry says of its guest cluster (QEMU: QCow2ClusterType)."""

    UNALLOCATED = "the backing file decides"
    ZERO_PLAIN = "reads as zeroes"
    ZERO_ALLOC = "reads as zeroes, and a host cluster is reserved for it"
    STANDARD = "data at a host offset"
    COMPRESSED = "compressed data"


UNALLOCATED = ClusterType.UNALLOCATED
ZERO_PLAIN = ClusterType.ZERO_PLAIN
STANDARD = ClusterType.STANDARD


class GuestExtent(NamedTuple):
    """`length` bytes of one type.

    host_offset: where the first byte is, for STANDARD and ZERO_ALLOC. entry: the L2 entry of the
    first cluster. copied: the refcounts are one, so the clusters may be overwritten.
    """

    type: ClusterType
    length: int
    host_offset: int = 0
    entry: int = 0
    copied: bool = False


def cluster_type(entry: int) -> ClusterType:
    """Classify an L2 entry of an image that holds its data itself (qcow2_get_cluster_type)."""
    if entry & COMPRESSED:
        return ClusterType.COMPRESSED
    if entry & ZERO:
        return ClusterType.ZERO_ALLOC if entry & OFFSET_MASK else ZERO_PLAIN
    return STANDARD if entry & OFFSET_MASK else UNALLOCATED


class Mapping:
    """The L1 table, the cache of L2 tables and the nodes that they lead to."""

    def __init__(
        self,
        data: Node,
        backing: Node | None,
        geometry: Geometry,
        l1: Table,
        *,
        filename: str,
        has_zero_flag: bool,
        metadata: Container[int],
        durability: Durability,
    ) -> None:
        """`data`: the node that host offsets are of. `filename`: the image's, for errors.
        `has_zero_flag`: version 3; in version 2 the bit is reserved and a mistake. `metadata`: host
        offsets that hold no data, whatever an entry says."""
        self.l1 = l1
        self.l2: TableCache  # set by the node: the cache loads through it
        self.backing = backing
        self._data = data
        self._filename = filename
        self._geometry = geometry
        self._metadata = metadata
        self._durability = durability
        self._empty = array("Q", bytes(8 * geometry.l2_entries))
        # All bits but those of an aligned offset: a plain writable cluster has only COPIED.
        self._not_offset = ~(OFFSET_MASK & ~geometry.in_cluster) & ((1 << 64) - 1)
        reserved = self._not_offset & ~(COPIED | COMPRESSED)
        self._reserved = reserved & ~ZERO if has_zero_flag else reserved
        self._leaf = data if isinstance(data, Leaf) else None
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._in_cluster = geometry.in_cluster
        self._l2_bits = geometry.l2_bits
        self._l2_mask = geometry.l2_entries - 1

    def set_cache(self, cache: TableCache) -> None:
        """The cache is made after the mapping because its loader needs it."""
        self.l2 = cache
        self._hot = cache.hot

    def refuse_writes(self) -> None:
        """From now on no write resolves: all clusters count as metadata; `resolve` stays fast."""
        self._metadata = _Everything()

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        """See Node.resolve. The first lines are the hot path: a plain cluster, table in memory."""
        cluster = offset >> self._cluster_bits
        entries = self._hot.get(cluster >> self._l2_bits)
        if entries is not None:
            entry = entries[cluster & self._l2_mask]
            start = offset & self._in_cluster
            if (
                start + length <= self._cluster_size
                and entry & self._not_offset == COPIED
                and entry != COPIED
            ):
                host = entry ^ COPIED
                if self._leaf is not None and (
                    op is READ
                    or (
                        host not in self._metadata
                        and (op is WRITE or (self._leaf.fua and self.is_durable(offset, length)))
                    )
                ):
                    return [(self._leaf, host + start, length)]
        return self._resolve_extents(op, offset, length)

    def _resolve_extents(self, op: Op, offset: int, length: int) -> Resolution:
        runs: list[Run] = []
        while length:
            try:
                extent = self.extent_at(offset, length)
            except CorruptImage:
                return Miss.OPAQUE  # the asynchronous path meets it again and can report it
            if extent is None:
                return Miss.NOT_CACHED
            found = (
                self._runs_to_read(extent, offset)
                if op is READ
                else self._runs_to_write(op, extent, offset)
            )
            if isinstance(found, Miss):
                return found
            runs += found
            offset += extent.length
            length -= extent.length
        return runs

    def _runs_to_read(self, extent: GuestExtent, offset: int) -> Resolution:
        if extent.type is STANDARD:
            return self._data.resolve(READ, extent.host_offset, extent.length)
        if extent.type is ClusterType.COMPRESSED:
            return Miss.COMPRESSED
        if extent.type is UNALLOCATED and self.backing is not None:
            inside = max(0, min(extent.length, self.backing.size - offset))
            runs = self.backing.resolve(READ, offset, inside) if inside else []
            if isinstance(runs, list) and inside < extent.length:
                # Past the end of a shorter backing file the overlay reads as zeroes.
                runs.append((None, 0, extent.length - inside))
            return runs
        return [(None, 0, extent.length)]

    def _runs_to_write(self, op: Op, extent: GuestExtent, offset: int) -> Resolution:
        miss = self._miss_in_place(extent, offset)
        if miss is not None:
            return miss
        if op is not WRITE and not self.is_durable(offset, extent.length):
            return Miss.NEEDS_FLUSH
        return self._data.resolve(op, extent.host_offset, extent.length)

    def _miss_in_place(self, extent: GuestExtent, offset: int) -> Miss | None:
        """Why an extent cannot be written where it is."""
        if extent.type is STANDARD:
            if not extent.copied:
                return Miss.NEEDS_COW
            first = extent.host_offset & ~self._in_cluster
            end = extent.host_offset + extent.length
            for host in range(first, end, self._cluster_size):
                if host in self._metadata:
                    return Miss.OPAQUE  # corrupt; the asynchronous path reports it
            return None
        if extent.type is ClusterType.COMPRESSED:
            return Miss.COMPRESSED
        if extent.type is UNALLOCATED and self.backing is not None and offset < self.backing.size:
            return Miss.NEEDS_COW
        return Miss.NEEDS_ALLOC

    def is_durable(self, offset: int, length: int) -> bool:
        """Whether after a power cut the range would be mapped as it is now. No: perhaps."""
        bits = self._l2_bits
        first = offset >> self._cluster_bits
        last = (offset + length - 1) >> self._cluster_bits
        covers = self._durability.covers
        if not covers(self.l1, first >> bits, last >> bits):
            return False
        while first <= last:
            table = self.l2.peek(first >> bits)
            stop = min(last, first | self._l2_mask)
            if table is None or not covers(table, first & self._l2_mask, stop & self._l2_mask):
                return False
            first = stop + 1
        return True

    def durable_at(self, offset: int, length: int) -> int | None:
        """The host offset of a range that may be written in place, in one piece, and whose mapping
        is durable; None: it is not so, or perhaps not."""
        try:
            extent = self.extent_at(offset, length)
        except CorruptImage:
            return None  # `write` meets it again and can report it
        if extent is None or extent.length < length or self._miss_in_place(extent, offset):
            return None
        return extent.host_offset if self.is_durable(offset, length) else None

    def entries_at(self, offset: int) -> array[int] | None:
        """The entries of the L2 table for a guest offset; None if it is not in memory.

        Where L1 has no table all entries are zero.
        """
        index = offset >> self._geometry.l1_bits
        entries = self._hot.get(index)
        if entries is not None:
            return entries
        if not self.l1.entries[index] & OFFSET_MASK:
            return self._empty
        table = self.l2.peek(index)
        return None if table is None else table.entries

    def extent_at(self, offset: int, length: int) -> GuestExtent | None:
        """What the range begins with; None if its L2 table is not in memory.

        Raises CorruptImage for an entry with reserved bits or an unaligned offset.
        """
        entries = self.entries_at(offset)
        if entries is None:
            return None
        index = (offset >> self._cluster_bits) & self._l2_mask
        start = offset & self._in_cluster
        wanted = min(
            (start + length + self._in_cluster) >> self._cluster_bits, self._l2_mask + 1 - index
        )
        entry = entries[index]
        kind = self.type_of(entry)
        self.check_entry(entry, offset)
        count = 1
        if kind is not ClusterType.COMPRESSED:
            in_place = entry & OFFSET_MASK or kind is STANDARD
            step = self._cluster_size if in_place else 0
            expected = entry + step
            while count < wanted and entries[index + count] == expected:
                count += 1
                expected += step
        return GuestExtent(
            kind,
            min(length, (count << self._cluster_bits) - start),
            (entry & OFFSET_MASK) + start,
            entry,
            bool(entry & COPIED),
        )

    def type_of(self, entry: int) -> ClusterType:
        """Classify an L2 entry of this image."""
        return cluster_type(entry)

    def check_entry(self, entry: int, offset: int) -> None:
        """Raises CorruptImage if the L2 entry of a guest offset cannot be right."""
        if entry & self._reserved and not entry & COMPRESSED:
            raise CorruptImage(
                f"{self._filename}: the L2 entry {entry:#x} of the cluster at guest offset"
                f" {offset & ~self._in_cluster:#x} is damaged"
            )

    async def extent(self, offset: int, length: int) -> GuestExtent:
        """As `extent_at`, loading the L2 table if it must. Raises CorruptImage, OSError."""
        while (extent := self.extent_at(offset, length)) is None:
            await self.l2.get(offset >> self._geometry.l1_bits)
        return extent


class _Everything:
    """Contains every host offset."""

    def __contains__(self, _host_offset: object) -> bool:
        return True

"""Writes that need new clusters: `Allocation`, begin -> data -> link or abort.

Law: only here does a guest cluster get a host cluster. Until `link` nothing refers to the new
clusters, so a failure or a crash at any point before leaks them at most; `link` is synchronous and
replaces all entries of one stretch at once.

Order on disk (ordering.py): refcounts and data are durable before the L2 entry is. A write covers
part of a cluster only; the rest of the new cluster gets what the old one read as ("copy on
write"), in the same write as the data. Where the old cluster reads as zeroes and the new one has
never been written (it lies past the former end of the file) nothing needs copying.

`allocate_nowait` is the same without waiting: tables in memory, nothing to copy, data straight
into the page cache. First writes into an empty image go this way and cost no task.

After handle_copied, handle_alloc and qcow2_alloc_cluster_link_l2 of QEMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from nbdserve.block.node import MAX_INLINE, Leaf
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.refcount import Clusters
from nbdserve.formats.qcow2.resolve import ClusterType
from nbdserve.formats.qcow2.spec import COPIED, ZERO

if TYPE_CHECKING:
    from nbdserve.block.node import Buffer
    from nbdserve.formats.qcow2.image import Image
    from nbdserve.formats.qcow2.read import Reader
    from nbdserve.formats.qcow2.resolve import GuestExtent
    from nbdserve.formats.qcow2.tables import Table

__all__ = ["Allocation", "allocate_nowait", "write_allocating"]


class Allocation:
    """New host clusters for a stretch of guest clusters of one L2 table; ends by link or abort."""

    def __init__(self, image: Image, clusters: Clusters, *, reserved: bool = False) -> None:
        """`reserved`: the clusters belonged to the guest clusters already: they are marked zero,
        or they are those of a data file."""
        self._image = image
        self._clusters = clusters
        self._reserved = reserved
        self._linked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if not self._linked and not self._reserved:
            self._image.abandon(self._clusters)

    @property
    def host_offset(self) -> int:
        """Of the first cluster."""
        return self._clusters.first << self._image.geometry.cluster_bits

    def link(self, table: Table, index: int) -> None:
        """The data is written: point the entries from `index` on to it. Raises CorruptImage."""
        self._linked = True
        for number in range(self._clusters.count):
            if not self._reserved:
                self._image.forget(table.entries[index + number])
            host_offset = self.host_offset + (number << self._image.geometry.cluster_bits)
            table.set(index + number, host_offset | COPIED)


def allocate_nowait(image: Image, offset: int, data: Buffer) -> bool:
    """See Node.allocate_nowait. False: nothing was changed."""
    geometry = image.geometry
    start = offset & geometry.in_cluster
    first = offset >> geometry.cluster_bits
    nb_clusters = geometry.clusters(start + len(data))
    index = first & (geometry.l2_entries - 1)
    if image.broken is not None or not isinstance(image.data, Leaf):
        return False
    if index + nb_clusters > geometry.l2_entries:
        return False
    if not image.locks.is_free(first, first + nb_clusters - 1):
        return False
    tail = _to_end_of_cluster(image, offset + len(data))
    in_place = image.data_file is not None
    try:
        table = image.table_nowait(offset)
        if table is None:
            return False
        old = table.entries[index : index + nb_clusters]
        # Entries of zero read as the backing file does: then a part of a cluster needs copying.
        copies = image.backing is not None and (start or tail)
        if any(entry != ZERO if copies else entry & ~ZERO for entry in old):
            return False
        clusters = (
            Clusters(first, nb_clusters, zeroed=False)
            if in_place
            else image.refcounts.take_nowait(nb_clusters)
        )
    except CorruptImage as error:
        raise image.stop(error) from None
    if clusters is None:
        return False
    too_much = not clusters.zeroed and nb_clusters << geometry.cluster_bits > MAX_INLINE
    if clusters.count < nb_clusters or too_much:
        if not in_place:
            image.refcounts.put_back(clusters)
        return False
    with Allocation(image, clusters, reserved=in_place) as allocation:
        if clusters.zeroed:
            written = image.data.write_nowait(allocation.host_offset + start, data)
        else:
            written = image.data.writev_nowait(
                allocation.host_offset, (bytes(start), data, bytes(tail))
            )
        if written:
            allocation.link(table, index)
    return written


async def write_allocating(image: Image, reader: Reader, offset: int, data: memoryview) -> int:
    """Write the leading part of `data`, whose clusters need allocating. Returns how many bytes.

    Zero: while the request waited, its clusters became writable in place; start over.
    """
    geometry = image.geometry
    bits = geometry.cluster_bits
    first = offset >> bits
    # Within one L2 table, so that one synchronous link suffices.
    last = min((offset + len(data) - 1) >> bits, first | (geometry.l2_entries - 1))
    async with image.locks.hold(first, last):
        image.check_writable()
        try:
            extent = await image.mapping.extent(offset, len(data))
            if extent.type is ClusterType.STANDARD and extent.copied:
                return 0
            wanted = geometry.clusters((offset & geometry.in_cluster) + extent.length)
            reserved = extent.type is ClusterType.ZERO_ALLOC and extent.copied
            if image.data_file is not None:
                reserved = True
                clusters = Clusters(first, wanted, zeroed=False)
            elif reserved:
                image.assert_data(extent.host_offset, extent.length)
                clusters = Clusters(extent.host_offset >> bits, wanted, zeroed=False)
            else:
                clusters = await image.refcounts.take(wanted)
            with Allocation(image, clusters, reserved=reserved) as allocation:
                room = (clusters.count << bits) - (offset & geometry.in_cluster)
                data = data[: min(extent.length, room)]
                await _write_data(image, reader, allocation, clusters, extent, offset, data)
                table = await image.table(offset)
                allocation.link(table, first & (geometry.l2_entries - 1))
        except CorruptImage as error:
            raise image.stop(error) from None
    return len(data)


async def _write_data(
    image: Image,
    reader: Reader,
    allocation: Allocation,
    clusters: Clusters,
    extent: GuestExtent,
    offset: int,
    data: memoryview,
) -> None:
    """Fill the new clusters: `data`, and around it what the old ones read as."""
    geometry = image.geometry
    start = offset & geometry.in_cluster
    end = offset + len(data)
    reads_as_zeroes = extent.type in (ClusterType.ZERO_PLAIN, ClusterType.ZERO_ALLOC) or (
        extent.type is ClusterType.UNALLOCATED
        and (image.backing is None or offset - start >= image.backing.size)
    )
    if reads_as_zeroes and clusters.zeroed:
        image.check_writable()
        await image.data.write(allocation.host_offset + start, data)
        return
    head = bytearray(start)
    tail = bytearray(_to_end_of_cluster(image, end))
    if not reads_as_zeroes:
        await reader.read(offset - start, memoryview(head))
        inside = max(0, min(len(tail), geometry.size - end))
        await reader.read(end, memoryview(tail)[:inside])
    image.check_writable()
    await image.data.writev(allocation.host_offset, (head, data, tail))


def _to_end_of_cluster(image: Image, end: int) -> int:
    """How many bytes there are from a guest offset to the end of its cluster; in a data file only
    up to the end of the disk, so that a raw one keeps the disk's size (QEMU rounds it up)."""
    nb_bytes = -end & image.geometry.in_cluster
    if image.data_file is not None:
        nb_bytes = min(nb_bytes, image.geometry.size - end)
    return nb_bytes

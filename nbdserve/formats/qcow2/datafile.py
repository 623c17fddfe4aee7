"""The external data file: guest clusters live in a file of their own, each at its guest offset.

Law: where a cluster is never changes, only whether the image says that it is there. So there are no
refcounts for data, nothing to take or to hand out again, no compression and no quarantine: whoever
resolved onto a cluster long ago still reads and writes nothing but his own guest bytes, whatever
became of the mapping meanwhile. Metadata lies in another file, so data cannot overlap it.

What is left to watch is a hole punched late: a freed cluster is punched while its range is locked,
so that no later write finds it free before that (`punch`). A hole needs no order on disk: until the
unlinking is durable the old entry reads the hole, and that is zeroes too. Stale bytes may stay in a
cluster that is marked zero, so whoever allocates it writes it whole.

A raw data file ("data_file_raw", autoclear bit 1) reads as the guest's disk to those who ignore the
image. There zeroes are really written, and the mapping stays as it is: after a discard, too.

The entry of guest cluster 0 is COPIED alone, since its host offset is 0; COPIED tells it from one
that is not allocated. After has_data_file, data_file_is_raw, qcow2_get_cluster_type,
qcow2_get_host_offset and qcow2_subcluster_zeroize of QEMU.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

from nbdserve.block.run import READ, WRITE, Op, Resolution
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.refcount import runs
from nbdserve.formats.qcow2.resolve import ClusterType, Mapping, cluster_type
from nbdserve.formats.qcow2.spec import COMPRESSED, COPIED, OFFSET_MASK

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.image import Image

__all__ = ["DataFileMapping", "discard_raw", "punch", "zero_raw"]


class DataFileMapping(Mapping):
    """The mapping of an image with a data file: an entry says whether, never where."""

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        """See Node.resolve; the hot path of Mapping.resolve, where one comparison tells all."""
        cluster = offset >> self._cluster_bits
        entries = self._hot.get(cluster >> self._l2_bits)
        if entries is not None:
            start = offset & self._in_cluster
            host = offset - start
            if (
                start + length <= self._cluster_size
                and entries[cluster & self._l2_mask] == host | COPIED
                and self._leaf is not None
                and (
                    op is READ
                    or (
                        host not in self._metadata  # which has something once writes are refused
                        and (op is WRITE or (self._leaf.fua and self.is_durable(offset, length)))
                    )
                )
            ):
                return [(self._leaf, offset, length)]
        return self._resolve_extents(op, offset, length)

    def type_of(self, entry: int) -> ClusterType:
        return ClusterType.STANDARD if entry == COPIED else cluster_type(entry)

    def check_entry(self, entry: int, offset: int) -> None:
        super().check_entry(entry, offset)
        guest = offset & ~self._in_cluster
        if entry & COMPRESSED:
            raise CorruptImage(
                f"{self._filename}: the cluster at guest offset {guest:#x} is compressed, which"
                " cannot be in an external data file"
            )
        host = entry & OFFSET_MASK
        if host not in (0, guest) or (host == 0 and entry & COPIED and guest):
            raise CorruptImage(
                f"{self._filename}: the cluster at guest offset {guest:#x} is mapped to"
                f" {host:#x} of the external data file, not to the same offset"
            )


async def punch(image: Image, clusters: list[int]) -> None:
    """Give the room of guest clusters, ascending, back to the data file. They are not allocated any
    more, and the caller holds the lock on them."""
    bits = image.geometry.cluster_bits
    for first, count in runs(clusters):
        offset = first << bits
        with suppress(OSError):  # a hint
            await image.data.discard(offset, min(count << bits, image.geometry.size - offset))


async def zero_raw(
    image: Image, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
) -> None:
    """Write zeroes into a raw data file; whatever the clusters are, they read as zeroes then.

    Raises OSError(EOPNOTSUPP) without `fallback` if that is no faster than writing.
    """
    image.check_writable()
    start, end = offset, offset + length
    while start < end:  # a damaged entry would read as something else
        try:
            start += (await image.mapping.extent(start, end - start)).length
        except CorruptImage as error:
            raise image.stop(error) from None
    await image.data.write_zeroes(offset, length, may_unmap=may_unmap, fallback=fallback)


async def discard_raw(image: Image, offset: int, length: int) -> None:
    """Free the room of whole clusters of a raw data file; they read as zeroes afterwards, or, if
    that would have to be written, as before."""
    try:
        await zero_raw(image, offset, length, may_unmap=True, fallback=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise

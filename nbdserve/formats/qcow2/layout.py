"""Where the parts of a new image lie, and the tables that say so.

They are header, refcount table, refcount blocks and L1 table, back to back, each counted by the
refcount blocks from the start; with a raw data file also all L2 tables, which map every cluster, so
that image and raw file say the same from the start. QEMU starts with a single block and grows, so
its layout differs from ours where one block does not count all of that; the result is equally
valid. Pure arithmetic.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.block.units import align_up
from nbdserve.formats.qcow2.spec import COPIED

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Layout", "MappedClusters"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How many clusters each part has, in the order of the file; the header has the first."""

    nb_table_clusters: int
    nb_blocks: int
    nb_l1_clusters: int
    nb_l2_tables: int

    @classmethod
    def of(
        cls, l1_table_bytes: int, nb_l2_tables: int, cluster_size: int, refcount_bits: int
    ) -> Layout:
        """The smallest refcount structure that counts itself and everything else.

        More blocks need more table, and both need more blocks: iterates to the least fixed point,
        which exists since a block counts at least 64 clusters.
        """
        refcounts_in_block = cluster_size * 8 // refcount_bits
        layout = cls(1, 1, -(-l1_table_bytes // cluster_size), nb_l2_tables)
        while True:
            nb_blocks = -(-layout.nb_clusters // refcounts_in_block)
            nb_table_clusters = -(-nb_blocks * 8 // cluster_size)
            grown = cls(nb_table_clusters, nb_blocks, layout.nb_l1_clusters, nb_l2_tables)
            if grown == layout:
                return layout
            layout = grown

    @property
    def l1_table_cluster(self) -> int:
        """Index of the first cluster of the L1 table."""
        return 1 + self.nb_table_clusters + self.nb_blocks

    @property
    def l2_cluster(self) -> int:
        """Index of the first cluster behind the L1 table."""
        return self.l1_table_cluster + self.nb_l1_clusters

    @property
    def nb_clusters(self) -> int:
        """Of the whole image."""
        return self.l2_cluster + self.nb_l2_tables

    def refcount_table(self, cluster_size: int) -> bytes:
        first = 1 + self.nb_table_clusters
        offsets = range(first * cluster_size, (first + self.nb_blocks) * cluster_size, cluster_size)
        entries = b"".join(offset.to_bytes(8, "big") for offset in offsets)
        return entries.ljust(self.nb_table_clusters * cluster_size, b"\0")

    def refcount_blocks(self, cluster_size: int, refcount_bits: int) -> bytes:
        """A refcount of 1 for each cluster of the image, then zeroes."""
        if refcount_bits >= 8:
            counts = (1).to_bytes(refcount_bits // 8, "big") * self.nb_clusters
        else:
            # The first refcount of a byte is in its lowest bits, so a little endian number is
            # the whole array: that many digits 1 of refcount_bits each.
            ones = ((1 << refcount_bits * self.nb_clusters) - 1) // ((1 << refcount_bits) - 1)
            counts = ones.to_bytes(-(-refcount_bits * self.nb_clusters // 8), "little")
        return counts.ljust(self.nb_blocks * cluster_size, b"\0")


@dataclass(frozen=True, slots=True)
class MappedClusters:
    """L1 and L2 tables that map each of `nb_clusters` guest clusters to its own offset."""

    cluster_size: int
    nb_clusters: int
    l2_offset: int  # of the first L2 table; they lie back to back

    def tables(self) -> Iterator[bytes]:
        size = self.cluster_size
        per_table = size // 8
        nb_tables = -(-self.nb_clusters // per_table)
        l1 = _entries(self.l2_offset, nb_tables, size)
        yield l1.ljust(align_up(len(l1), size), b"\0")
        for first in range(0, self.nb_clusters, per_table):
            count = min(per_table, self.nb_clusters - first)
            yield _entries(first * size, count, size).ljust(size, b"\0")


def _entries(host_offset: int, count: int, cluster_size: int) -> bytes:
    first = COPIED | host_offset
    return struct.pack(f">{count}Q", *range(first, first + count * cluster_size, cluster_size))

"""Which host clusters hold metadata, so that nothing else is ever written over them.

An image with wrong refcounts offers its own tables as free clusters, and one with wrong L2 entries
maps guest data onto them. Every cluster about to be allocated and every standard cluster about to
be overwritten is looked up here first; a hit stops the image before the damage (after
qcow2_pre_write_overlap_check; QEMU's default checks leave out L2 tables that are not active, here
all tables are one set). The look-up is one test of set membership, cheap enough for each write.

Two tables in one cluster are found when the map is made: such an image is not opened for writing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.spec import OFFSET_MASK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdserve.formats.qcow2.geometry import Geometry

__all__ = ["MetadataMap"]


class MetadataMap:
    """`offsets`: the host offsets of all clusters that hold metadata."""

    def __init__(self, filename: str, geometry: Geometry, file_size: int) -> None:
        self._filename = filename
        self._geometry = geometry
        self._file_size = file_size
        self.offsets: set[int] = set()

    def add_table(self, name: str, host_offset: int, nb_bytes: int) -> None:
        """A table of the image being opened. Raises CorruptImage if it is misplaced."""
        geometry = self._geometry
        if host_offset & geometry.in_cluster:
            raise CorruptImage(f"{self._filename}: the {name} at {host_offset:#x} is not aligned")
        if host_offset >= self._file_size:
            raise CorruptImage(
                f"{self._filename}: the {name} at {host_offset:#x} is beyond the end of the file;"
                " repair the image with qemu-img check -r all"
            )
        for offset in range(host_offset, host_offset + nb_bytes, geometry.cluster_size):
            if offset in self.offsets:
                raise CorruptImage(
                    f"{self._filename}: the {name} at {offset:#x} overlaps other metadata;"
                    " repair the image with qemu-img check -r all"
                )
            self.offsets.add(offset)

    def add_entries(self, name: str, entries: Iterable[int], mask: int = OFFSET_MASK) -> None:
        """The tables that the entries of an L1 or refcount table point to."""
        for entry in entries:
            if entry & mask:
                self.add_table(name, entry & mask, self._geometry.cluster_size)

    def add(self, host_offset: int) -> None:
        """A cluster that was just allocated for a table."""
        self.offsets.add(host_offset)

    def discard(self, host_offset: int) -> None:
        """The cluster is free now, whatever it held."""
        self.offsets.discard(host_offset)

    def assert_data(self, host_offset: int, nb_bytes: int) -> None:
        """Raises CorruptImage if guest data at a host offset would lie on metadata."""
        geometry = self._geometry
        first = host_offset & ~geometry.in_cluster
        for offset in range(first, host_offset + nb_bytes, geometry.cluster_size):
            if offset in self.offsets:
                raise CorruptImage(
                    f"{self._filename}: guest data is mapped onto metadata at {offset:#x}"
                )

    def assert_free(self, cluster: int) -> None:
        """Raises CorruptImage if the cluster, free by its refcount, holds metadata."""
        host_offset = cluster << self._geometry.cluster_bits
        if host_offset in self.offsets:
            raise CorruptImage(
                f"{self._filename}: the refcount of the metadata at {host_offset:#x} is zero;"
                " repair the image with qemu-img check -r all"
            )

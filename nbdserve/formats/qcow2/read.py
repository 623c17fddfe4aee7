"""The asynchronous read: whatever the clusters of a range are, fill the buffer.

Walks the range extent by extent. Nothing is locked: a cluster that is unlinked while it is being
read stays in quarantine until the request is done, so it still holds what it held.

Compressed clusters are kept, decompressed, for a moment: guests read them in pieces smaller than a
cluster, and each piece would cost the whole decompression again. A kept cluster is known by its L2
entry together with its guest offset; compressed data is never changed in place.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.block.units import MIB
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.compressed import Decompressor, compressed_extent
from nbdserve.formats.qcow2.resolve import ClusterType

if TYPE_CHECKING:
    from nbdserve.engines.engine import Engine
    from nbdserve.formats.qcow2.image import Image
    from nbdserve.formats.qcow2.resolve import GuestExtent

__all__ = ["CompressedStatistics", "Reader"]

KEPT_BYTES = 4 * MIB


class CompressedStatistics(NamedTuple):
    """decompressed: clusters; reused: reads that found theirs decompressed already."""

    decompressed: int
    reused: int


class Reader:
    """Reads one image."""

    def __init__(self, image: Image, engine: Engine) -> None:
        self._image = image
        self._engine = engine
        self._decompress: Decompressor | None = None
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._decompressed = 0
        self._reused = 0

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the guest offset. Raises CorruptImage, OSError."""
        image = self._image
        while len(buffer):
            extent = await image.mapping.extent(offset, len(buffer))
            piece = buffer[: extent.length]
            if extent.type is ClusterType.STANDARD:
                await image.data.read(extent.host_offset, piece)
            elif extent.type is ClusterType.COMPRESSED:
                await self._read_compressed(extent, offset, piece)
            elif extent.type is ClusterType.UNALLOCATED and image.backing is not None:
                inside = max(0, min(extent.length, image.backing.size - offset))
                if inside:
                    await image.backing.read(offset, piece[:inside])
                piece[inside:] = bytes(extent.length - inside)
            else:
                piece[:] = bytes(extent.length)
            offset += extent.length
            buffer = buffer[extent.length :]

    async def _read_compressed(self, extent: GuestExtent, offset: int, piece: memoryview) -> None:
        start = offset & self._image.geometry.in_cluster
        cluster = await self._cluster(extent.entry, offset - start)
        piece[:] = cluster[start : start + extent.length]

    async def _cluster(self, entry: int, guest_offset: int) -> bytes:
        """The decompressed cluster that an L2 entry describes."""
        key = (entry, guest_offset)
        cluster = self._kept.get(key)
        if cluster is not None:
            self._kept.move_to_end(key)
            self._reused += 1
            return cluster
        image = self._image
        if self._decompress is None:
            self._decompress = Decompressor(
                image.file.filename, image.header.compression_type, image.geometry.cluster_size
            )
        host_offset, nb_bytes = compressed_extent(entry, image.geometry.cluster_bits)
        data = bytearray(nb_bytes)
        await image.file.read(host_offset, memoryview(data))
        try:
            cluster = await self._engine.run(self._decompress, data, guest_offset)
        except CorruptImage as error:
            # Damaged data, not metadata: its reader gets an error, the image is none the worse.
            raise OSError(error.errno, str(error)) from None
        self._decompressed += 1
        self._kept[key] = cluster
        while len(self._kept) * image.geometry.cluster_size > KEPT_BYTES:
            self._kept.popitem(last=False)
        return cluster

    def forget_compressed(self) -> None:
        """Host clusters were freed: what comes to lie there may get an entry that was kept."""
        self._kept.clear()

    def statistics(self) -> CompressedStatistics:
        """Counters since the image was opened."""
        return CompressedStatistics(self._decompressed, self._reused)

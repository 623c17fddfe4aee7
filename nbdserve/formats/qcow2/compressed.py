"""Compressed clusters: where one lies, and how it becomes a cluster of data again.

The only module that knows a compression library. Synchronous and without I/O: whoever reads the
bytes decides on which thread this runs, and any number of threads may (zlib and zstd release the
GIL). What is decompressed is a stranger's data, so no more than one cluster is ever produced
and no more than MAX_ZSTD_WINDOW of memory is granted on the word of a frame header.

Libraries are imported when the first decompressor for them is made, not with this module: most
images hold no compressed cluster, and few are zstd (8 ms of start-up). Behind nbdkit there may be
no libraries but Python's own.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Literal

from nbdserve.block.units import HostOffset
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.spec import COMPRESSED_SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.block.node import Buffer

    Inflate = Callable[[Buffer, int], bytes]

__all__ = ["CompressionType", "Decompressor", "compressed_extent"]

CompressionType = Literal["zlib", "zstd"]

MAX_ZSTD_WINDOW = 8 << 20
"""Bytes. A cluster holds at most 2 MiB, but a writer that streams may announce the window of its
level without looking; 8 MiB is what level 19 announces and what RFC 8878 (section 3.1.1.1.2) asks
every decoder to support. zstd's own default would let a 20-byte frame allocate 128 MiB."""


def compressed_extent(entry: int, cluster_bits: int) -> tuple[HostOffset, int]:
    """Where the data of a compressed cluster descriptor lies: (host offset, nb_bytes).

    nb_bytes is an upper bound: the data fills whole 512-byte sectors on paper, ends somewhere in
    the last one, and the next cluster's may start right behind. The host offset is that of a byte,
    aligned to nothing, and comes unchecked: it may lie beyond the end of the file.

    :param entry: the L2 entry, with or without its COMPRESSED bit.

    Follows the spec's Compressed Clusters Descriptor and ``qcow2_parse_compressed_l2_entry``.
    """
    count_bits = cluster_bits - 8
    offset_bits = 62 - count_bits
    offset = entry & ((1 << offset_bits) - 1)
    additional_sectors = (entry >> offset_bits) & ((1 << count_bits) - 1)
    nb_bytes = (1 + additional_sectors) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR
    return HostOffset(offset), nb_bytes


class Decompressor:
    """Turns the compressed clusters of one image into data. Safe to call from several threads."""

    def __init__(self, filename: str, compression: CompressionType, cluster_size: int) -> None:
        """Raises OSError if there is no library for it."""
        self._filename = filename
        self._compression = compression
        self._cluster_size = cluster_size
        self._inflate, self._errors = _LIBRARIES[compression]()

    def __call__(self, data: Buffer, guest_offset: int) -> bytes:
        """One cluster of data, exactly.

        :param data: the bytes of `compressed_extent`, or those of them that the file has. What
            follows the compressed stream is ignored, and so is what the stream would produce
            beyond a cluster ("decompression stops when it has produced a cluster of data").
        :param guest_offset: of the cluster; the error names it.
        :raises CorruptImage: the stream is damaged or ends before it has filled the cluster.
        """
        try:
            cluster = self._inflate(data, self._cluster_size)
        except self._errors as error:
            raise self._corrupt(guest_offset, str(error)) from None
        if len(cluster) != self._cluster_size:
            reason = f"the {len(data)} bytes hold only {len(cluster)} of {self._cluster_size}"
            raise self._corrupt(guest_offset, reason)
        return cluster

    def _corrupt(self, guest_offset: int, reason: str) -> CorruptImage:
        return CorruptImage(
            f"{self._filename}: cannot decompress the {self._compression} cluster"
            f" at guest offset {guest_offset:#x}: {reason}"
        )


def _zlib() -> tuple[Inflate, type[Exception]]:
    """Raw deflate. isal rather than zlib: measured on clusters of 64 KiB (isal 1.9.1, zlib 1.2.13
    in brackets, one core of an AMD EPYC), machine code takes 91 us (235), Python source 51 us
    (105), zeroes 16 us (114). Only on incompressible data, 145 us (148), they are equal.
    """
    from isal import isal_zlib

    def inflate(data: Buffer, nb_bytes: int) -> bytes:
        # QEMU inflates with the 4 KiB window it deflates with, -12; the largest accepts any.
        return isal_zlib.decompressobj(-15).decompress(data, nb_bytes)

    # isal's stub declares the class as an instance of Exception.
    errors: type[Exception] = isal_zlib.IsalError  # type: ignore[assignment]
    return inflate, errors


def _plain_zlib() -> tuple[Inflate, type[Exception]]:
    import zlib

    def inflate(data: Buffer, nb_bytes: int) -> bytes:
        return zlib.decompressobj(-15).decompress(data, nb_bytes)

    return inflate, zlib.error


def _zstd() -> tuple[Inflate, type[Exception]]:
    """A sequence of zstd frames (QEMU writes one, and reads until the cluster is full)."""
    try:
        import zstandard
    except ImportError as error:
        raise OSError(
            errno.ENOTSUP,
            "zstd clusters need the Python module zstandard (Debian: python3-zstandard)",
        ) from error

    # A context takes 8 us to make, a fifth of the time a cluster takes, and serves one thread.
    local = threading.local()

    def inflate(data: Buffer, nb_bytes: int) -> bytes:
        context = getattr(local, "context", None)
        if context is None:
            context = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
            local.context = context
        with context.stream_reader(data, read_across_frames=True) as reader:
            return reader.read(nb_bytes)

    return inflate, zstandard.ZstdError


_LIBRARIES: dict[CompressionType, Callable[[], tuple[Inflate, type[Exception]]]] = {
    "zlib": _zlib,
    "zstd": _zstd,
}

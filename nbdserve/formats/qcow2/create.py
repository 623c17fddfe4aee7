"""New, empty qcow2 images, the same bytes that ``qemu-img create`` makes (``qcow2_co_create``).

Three steps, so that nothing is destroyed before it is certain what shall take its place:
`plan_image` checks every option and lays the image out, touching no file; `write_image` puts a
plan into an open file; `create_image` opens the file between the two. An existing file is
overwritten, as qemu-img does.

The layout is header, refcount table, refcount blocks, L1 table, back to back, each counted by the
refcount blocks from the start; with a raw data file also all L2 tables, which map every cluster, so
that image and raw file say the same from the start. (QEMU starts with a single block and grows, so
its layout differs from ours where one block does not count all of that; the result is equally
valid.)
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.block.units import align_up
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.spec import (
    COPIED,
    AutoclearFeature,
    CompatibleFeature,
    ExtensionType,
    IncompatibleFeature,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nbdserve.formats.qcow2.compressed import CompressionType

__all__ = ["NewImage", "create_image", "plan_image", "write_image"]

_COMPRESSION_TYPES = {"zlib": spec.COMPRESSION_ZLIB, "zstd": spec.COMPRESSION_ZSTD}
_REFCOUNT_ORDERS = {1 << order: order for order in range(spec.MAX_REFCOUNT_ORDER + 1)}
_WRITE_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class NewImage:
    """A plan: the clusters of a new image in the order of the file. The L1 table is all zero,
    unless all guest clusters are `mapped`. data_size: that its data file shall have, in bytes."""

    header: bytes
    refcount_table: bytes
    refcount_blocks: bytes
    l1_table_bytes: int
    mapped: _Mapped | None
    data_size: int

    def mapping(self) -> Iterator[bytes]:
        """The L1 table and the L2 tables, in pieces."""
        if self.mapped is not None:
            yield from self.mapped.tables()
            return
        # Zeroes are written, not left as a hole: who has the space for the table now, has it later.
        for start in range(0, self.l1_table_bytes, _WRITE_SIZE):
            yield bytes(min(_WRITE_SIZE, self.l1_table_bytes - start))


@dataclass(frozen=True, slots=True)
class _Mapped:
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


def create_image(
    path: str,
    size: int,
    *,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    backing_file: str | None = None,
    backing_format: str | None = None,
    compression_type: CompressionType = "zlib",
    lazy_refcounts: bool = False,
    data_file: str | None = None,
    data_file_raw: bool = False,
) -> None:
    """Make `path` an empty qcow2 image, durably; overwrites what is there.

    Parameters are those of `plan_image`. The backing file is not opened. The data file is made,
    too: a regular file that is all one hole.

    :raises ConfigError: an option cannot be honoured; nothing was touched.
    :raises ImageError: the file cannot be opened or written, with the errno of the reason. A file
        that was made for it is gone again; one that was there holds no image any more.
    """
    plan = plan_image(
        size,
        cluster_size=cluster_size,
        version=version,
        refcount_bits=refcount_bits,
        backing_file=backing_file,
        backing_format=backing_format,
        compression_type=compression_type,
        lazy_refcounts=lazy_refcounts,
        data_file=data_file,
        data_file_raw=data_file_raw,
    )
    if backing_file is not None:
        # A relative name counts from the image's folder. It may also be no path at all.
        name = os.path.join(os.path.dirname(path), backing_file)
        _check_is_another("backing_file", backing_file, name, path)
    if data_file is None:
        _create(path, lambda fd: write_image(fd, plan))
        return
    _check_is_another("data_file", data_file, data_file, path)
    existed = os.path.lexists(data_file)
    _create(data_file, lambda fd: _write_hole(fd, plan.data_size))
    try:
        _create(path, lambda fd: write_image(fd, plan))
    except ImageError:
        if not existed:
            os.unlink(data_file)
        raise


def _create(path: str, write: Callable[[int], None]) -> None:
    """Make or overwrite a file. Raises ImageError."""
    existed = os.path.lexists(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            write(fd)
        except OSError:
            if not existed:
                os.unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"{path}: cannot create: {error.strerror}", error.errno) from None


def plan_image(
    size: int,
    *,
    cluster_size: int,
    version: int,
    refcount_bits: int,
    backing_file: str | None,
    backing_format: str | None,
    compression_type: CompressionType,
    lazy_refcounts: bool,
    data_file: str | None,
    data_file_raw: bool,
) -> NewImage:
    """Lay out an image of `size` bytes, rounded up to a whole sector of 512.

    :param version: 2 or 3 (qemu-img's compat=0.10 and 1.1).
    :param backing_file: the name as it goes into the header.
    :param backing_format: needed with a backing file: one whose format is guessed at each open
        could have it changed by its guest.
    :param data_file: the name as it goes into the header.
    :param data_file_raw: the data file shall read as the guest's disk without the image.
    :raises ConfigError: names the option and what it allows.
    """
    if cluster_size not in (1 << bits for bits in _CLUSTER_BITS):
        raise ConfigError(f"cluster_size: {cluster_size} is not a power of two from 512 to 2M")
    if version not in (2, 3):
        raise ConfigError(f"compat: there is no qcow2 version {version}, only 2 and 3")
    if refcount_bits not in _REFCOUNT_ORDERS:
        raise ConfigError(f"refcount_bits: {refcount_bits} is not a power of two from 1 to 64")
    if compression_type not in _COMPRESSION_TYPES:
        raise ConfigError(f"compression_type: {compression_type!r} is neither zlib nor zstd")
    if version == 2:
        _check_version_2(refcount_bits, compression_type, lazy_refcounts, data_file)
    if data_file_raw and data_file is None:
        raise ConfigError("data_file_raw: needs a data file")
    if data_file_raw and backing_file is not None:
        raise ConfigError("data_file_raw: cannot be used with a backing file")
    nb_l1_entries = _l1_entries(size, cluster_size)
    nb_l2_tables = nb_l1_entries if data_file_raw else 0
    layout = _Layout.of(nb_l1_entries * 8, nb_l2_tables, cluster_size, refcount_bits)
    size = align_up(size, 512)
    header = _build_header(
        {
            "version": version,
            "cluster_bits": cluster_size.bit_length() - 1,
            "size": size,
            "l1_size": nb_l1_entries,
            "l1_table_offset": layout.l1_table_cluster * cluster_size if nb_l1_entries else 0,
            "refcount_table_offset": cluster_size,
            "refcount_table_clusters": layout.nb_table_clusters,
            "incompatible_features": (
                (IncompatibleFeature.COMPRESSION if compression_type != "zlib" else 0)
                | (IncompatibleFeature.DATA_FILE if data_file is not None else 0)
            ),
            "autoclear_features": AutoclearFeature.RAW_DATA if data_file_raw else 0,
            "compatible_features": CompatibleFeature.LAZY_REFCOUNTS if lazy_refcounts else 0,
            "refcount_order": _REFCOUNT_ORDERS[refcount_bits],
            "compression_type": _COMPRESSION_TYPES[compression_type],
        },
        cluster_size,
        _encoded("backing_file", backing_file, spec.MAX_BACKING_FILE_NAME),
        _encoded("backing_format", backing_format, spec.MAX_BACKING_FORMAT_NAME),
        _encoded("data_file", data_file, spec.MAX_DATA_FILE_NAME),
    )
    return NewImage(
        header,
        layout.refcount_table(cluster_size),
        layout.refcount_blocks(cluster_size, refcount_bits),
        nb_l1_entries * 8,
        _Mapped(cluster_size, -(-size // cluster_size), layout.l2_cluster * cluster_size)
        if nb_l2_tables
        else None,
        size,
    )


def write_image(fd: int, plan: NewImage) -> None:
    """Put a planned image into a file or a block device open for writing, durably.

    The header goes last and alone: a crash leaves a file without a qcow2 header or a whole image.

    :raises OSError: as the system says.
    """
    if stat.S_ISREG(os.fstat(fd).st_mode):
        os.ftruncate(fd, 0)
    position = _write(fd, bytes(len(plan.header)), 0)
    position = _write(fd, plan.refcount_table, position)
    position = _write(fd, plan.refcount_blocks, position)
    for piece in plan.mapping():
        position = _write(fd, piece, position)
    os.fsync(fd)
    _write(fd, plan.header, 0)
    os.fsync(fd)


def _write_hole(fd: int, nb_bytes: int) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    os.ftruncate(fd, 0)
    os.ftruncate(fd, nb_bytes)
    os.fsync(fd)


# --- Options -----------------------------------------------------------------------------------

_CLUSTER_BITS = range(spec.MIN_CLUSTER_BITS, spec.MAX_CLUSTER_BITS + 1)


def _check_version_2(
    refcount_bits: int, compression_type: str, lazy_refcounts: bool, data_file: str | None
) -> None:
    if refcount_bits != 1 << spec.V2_REFCOUNT_ORDER:
        raise ConfigError(f"refcount_bits: {refcount_bits} needs version 3; version 2 has 16")
    if compression_type != "zlib":
        raise ConfigError(f"compression_type: {compression_type} needs version 3")
    if lazy_refcounts:
        raise ConfigError("lazy_refcounts: needs version 3")
    if data_file is not None:
        raise ConfigError("data_file: needs version 3")


def _check_is_another(option: str, value: str, path: str, image: str) -> None:
    try:
        same = os.path.samefile(image, path)
    except OSError:  # one of them is not there
        same = os.path.abspath(image) == os.path.abspath(path)
    if same:
        raise ConfigError(f"{option}: {value!r} is the image itself")


def _encoded(option: str, name: str | None, longest: int) -> bytes:
    """A name as it goes into the header; b"" for none."""
    if name is None:
        return b""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{option}: {name!r} is not valid Unicode") from None
    if not raw or b"\0" in raw:
        raise ConfigError(f"{option}: {name!r} is empty or contains a NUL byte")
    if len(raw) > longest:
        raise ConfigError(f"{option}: the name is {len(raw)} bytes long, at most {longest} fit")
    return raw


def _l1_entries(size: int, cluster_size: int) -> int:
    if size < 0:
        raise ConfigError(f"size: {size} is negative")
    mapped_by_entry = cluster_size // 8 * cluster_size
    entries = -(-size // mapped_by_entry)
    largest = spec.MAX_L1_BYTES // 8 * mapped_by_entry
    if size > largest:
        raise ConfigError(
            f"size: {size} bytes is too large for cluster_size={cluster_size},"
            f" which reaches to {largest}"
        )
    return entries


# --- Layout ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """How many clusters each part has, in the order of the file; the header has the first."""

    nb_table_clusters: int
    nb_blocks: int
    nb_l1_clusters: int
    nb_l2_tables: int

    @classmethod
    def of(
        cls, l1_table_bytes: int, nb_l2_tables: int, cluster_size: int, refcount_bits: int
    ) -> _Layout:
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


def _build_header(
    fields: dict[str, int],
    cluster_size: int,
    backing_file: bytes,
    backing_format: bytes,
    data_file: bytes,
) -> bytes:
    """The first cluster: header, extensions, backing file name (as ``qcow2_update_header``)."""
    if backing_format and not backing_file:
        raise ConfigError("backing_format: needs a backing file")
    if backing_file and not backing_format:
        raise ConfigError("backing_file: the format of the backing file must be given too")
    extensions = b""
    if backing_format:
        extensions += _extension(ExtensionType.BACKING_FORMAT, backing_format)
    if data_file:
        extensions += _extension(ExtensionType.DATA_FILE, data_file)
    if fields["version"] == 3 and cluster_size >= spec.FEATURE_NAMES_MIN_CLUSTER_SIZE:
        extensions += _extension(ExtensionType.FEATURE_NAMES, _feature_names())
    extensions += _extension(ExtensionType.END, b"")

    layout, length = spec.HEADER_V2, spec.V2_HEADER_LENGTH
    if fields["version"] == 3:
        layout, length = spec.HEADER_V3, spec.HEADER_LENGTH
    name_offset = length + len(extensions)
    if name_offset > cluster_size:
        raise ConfigError(
            f"data_file: the name is {len(data_file)} bytes long, too long for a header cluster"
            f" of {cluster_size}"
        )
    if name_offset + len(backing_file) > cluster_size:
        raise ConfigError(
            f"backing_file: the name is {len(backing_file)} bytes long, but"
            f" {cluster_size - name_offset} are left in a header cluster of {cluster_size}"
        )
    header: bytes = layout.build(
        fields
        | {
            "backing_file_offset": name_offset if backing_file else 0,
            "backing_file_size": len(backing_file),
            "crypt_method": spec.CryptMethod.NONE,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
            "header_length": length,
        }
    )
    return (header + extensions + backing_file).ljust(cluster_size, b"\0")


def _extension(type_: ExtensionType, data: bytes) -> bytes:
    built: bytes = spec.HEADER_EXTENSION.build({"type": type_, "data": data})
    return built


def _feature_names() -> bytes:
    return b"".join(
        spec.FEATURE_NAME.build({"type": type_, "bit": bit, "name": name.encode("ascii")})
        for (type_, bit), name in spec.FEATURE_NAMES.items()
    )


def _write(fd: int, data: bytes, position: int) -> int:
    """The position behind what was written."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, position)
        view = view[written:]
        position += written
    return position

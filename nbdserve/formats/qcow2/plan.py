"""What a new, empty qcow2 image holds: options in, the bytes of its metadata out.

The same bytes that ``qemu-img create`` makes (``qcow2_co_create``). Pure: no file is touched, so
all that can be wrong with the options is known before anything is overwritten (create.py). Where
the parts of an image lie is for layout.py to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.block.units import align_up
from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.layout import Layout, MappedClusters
from nbdserve.formats.qcow2.spec import (
    AutoclearFeature,
    CompatibleFeature,
    ExtensionType,
    IncompatibleFeature,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nbdserve.formats.qcow2.compressed import CompressionType

__all__ = ["NewImage", "NewImageOptions", "plan_image"]

_CLUSTER_BITS = range(spec.MIN_CLUSTER_BITS, spec.MAX_CLUSTER_BITS + 1)
_COMPRESSION_TYPES = {"zlib": spec.COMPRESSION_ZLIB, "zstd": spec.COMPRESSION_ZSTD}
_REFCOUNT_ORDERS = {1 << order: order for order in range(spec.MAX_REFCOUNT_ORDER + 1)}
_WRITE_SIZE = 1 << 20


# --- Options -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewImageOptions:
    """What is asked of a new image, by qemu-img's names; the options fit each other.

    size: of the virtual disk in bytes, rounded up to a whole sector of 512. version: 2 or 3
    (qemu-img's compat=0.10 and 1.1). backing_file, data_file: the names as they go into the header.
    backing_format: needed with a backing file: one whose format is guessed at each open could have
    it changed by its guest. data_file_raw: the data file shall read as the guest's disk without the
    image.

    :raises ConfigError: names the option and what it allows.
    """

    size: int
    cluster_size: int = 65536
    version: int = 3
    refcount_bits: int = 16
    backing_file: str | None = None
    backing_format: str | None = None
    compression_type: CompressionType = "zlib"
    lazy_refcounts: bool = False
    data_file: str | None = None
    data_file_raw: bool = False

    def __post_init__(self) -> None:
        if self.cluster_size not in (1 << bits for bits in _CLUSTER_BITS):
            raise ConfigError(
                f"cluster_size: {self.cluster_size} is not a power of two from 512 to 2M"
            )
        if self.version not in (2, 3):
            raise ConfigError(f"compat: there is no qcow2 version {self.version}, only 2 and 3")
        if self.refcount_bits not in _REFCOUNT_ORDERS:
            raise ConfigError(
                f"refcount_bits: {self.refcount_bits} is not a power of two from 1 to 64"
            )
        if self.compression_type not in _COMPRESSION_TYPES:
            raise ConfigError(
                f"compression_type: {self.compression_type!r} is neither zlib nor zstd"
            )
        if self.version == 2:
            self._check_version_2()
        self._check_files()

    def _check_version_2(self) -> None:
        if self.refcount_bits != 1 << spec.V2_REFCOUNT_ORDER:
            raise ConfigError(
                f"refcount_bits: {self.refcount_bits} needs version 3; version 2 has 16"
            )
        if self.compression_type != "zlib":
            raise ConfigError(f"compression_type: {self.compression_type} needs version 3")
        if self.lazy_refcounts:
            raise ConfigError("lazy_refcounts: needs version 3")
        if self.data_file is not None:
            raise ConfigError("data_file: needs version 3")

    def _check_files(self) -> None:
        if self.data_file_raw and self.data_file is None:
            raise ConfigError("data_file_raw: needs a data file")
        if self.data_file_raw and self.backing_file is not None:
            raise ConfigError("data_file_raw: cannot be used with a backing file")
        if self.backing_format is not None and self.backing_file is None:
            raise ConfigError("backing_format: needs a backing file")
        if self.backing_file is not None and self.backing_format is None:
            raise ConfigError(
                "backing_file: the format of the backing file must be given too"
            )


# --- The plan ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewImage:
    """A plan: the clusters of a new image in the order of the file. The L1 table is all zero,
    unless all guest clusters are `mapped`. data_size: that its data file shall have, in bytes."""

    header: bytes
    refcount_table: bytes
    refcount_blocks: bytes
    l1_table_bytes: int
    mapped: MappedClusters | None
    data_size: int

    def mapping(self) -> Iterator[bytes]:
        """The L1 table and the L2 tables, in pieces."""
        if self.mapped is not None:
            yield from self.mapped.tables()
            return
        # Zeroes are written, not left as a hole: who has the space for the table now, has it later.
        for start in range(0, self.l1_table_bytes, _WRITE_SIZE):
            yield bytes(min(_WRITE_SIZE, self.l1_table_bytes - start))


def plan_image(options: NewImageOptions) -> NewImage:
    """Lay out an image. Raises ConfigError: a size or a name that does not fit."""
    cluster_size = options.cluster_size
    nb_l1_entries = _l1_entries(options.size, cluster_size)
    nb_l2_tables = nb_l1_entries if options.data_file_raw else 0
    layout = Layout.of(nb_l1_entries * 8, nb_l2_tables, cluster_size, options.refcount_bits)
    size = align_up(options.size, 512)
    mapped = None
    if nb_l2_tables:
        nb_clusters = -(-size // cluster_size)
        mapped = MappedClusters(cluster_size, nb_clusters, layout.l2_cluster * cluster_size)
    return NewImage(
        _build_header(options, layout, nb_l1_entries),
        layout.refcount_table(cluster_size),
        layout.refcount_blocks(cluster_size, options.refcount_bits),
        nb_l1_entries * 8,
        mapped,
        size,
    )


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


# --- Header ------------------------------------------------------------------------------------


def _build_header(options: NewImageOptions, layout: Layout, nb_l1_entries: int) -> bytes:
    """The first cluster: header, extensions, backing file name (as ``qcow2_update_header``)."""
    cluster_size = options.cluster_size
    names = _encoded_names(options)
    extensions = _extensions(options, names)
    form, length = spec.HEADER_V2, spec.V2_HEADER_LENGTH
    if options.version == 3:
        form, length = spec.HEADER_V3, spec.HEADER_LENGTH
    name_offset = _name_offset(length + len(extensions), names, cluster_size)
    header: bytes = form.build(
        {
            "version": options.version,
            "backing_file_offset": name_offset if names["backing_file"] else 0,
            "backing_file_size": len(names["backing_file"]),
            "cluster_bits": cluster_size.bit_length() - 1,
            "size": align_up(options.size, 512),
            "crypt_method": spec.CryptMethod.NONE,
            "l1_size": nb_l1_entries,
            "l1_table_offset": layout.l1_table_cluster * cluster_size if nb_l1_entries else 0,
            "refcount_table_offset": cluster_size,
            "refcount_table_clusters": layout.nb_table_clusters,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
            **_features(options),
            "refcount_order": _REFCOUNT_ORDERS[options.refcount_bits],
            "header_length": length,
            "compression_type": _COMPRESSION_TYPES[options.compression_type],
        }
    )
    return (header + extensions + names["backing_file"]).ljust(cluster_size, b"\0")


def _features(options: NewImageOptions) -> dict[str, int]:
    """The three feature bitmaps."""
    incompatible = 0
    if options.compression_type != "zlib":
        incompatible |= IncompatibleFeature.COMPRESSION
    if options.data_file is not None:
        incompatible |= IncompatibleFeature.DATA_FILE
    return {
        "incompatible_features": incompatible,
        "compatible_features": (
            CompatibleFeature.LAZY_REFCOUNTS if options.lazy_refcounts else 0
        ),
        "autoclear_features": AutoclearFeature.RAW_DATA if options.data_file_raw else 0,
    }


def _encoded_names(options: NewImageOptions) -> dict[str, bytes]:
    """The names that go into the header, by their option; b"" for none."""
    return {
        "backing_file": _encoded(
            "backing_file", options.backing_file, spec.MAX_BACKING_FILE_NAME
        ),
        "backing_format": _encoded(
            "backing_format", options.backing_format, spec.MAX_BACKING_FORMAT_NAME
        ),
        "data_file": _encoded("data_file", options.data_file, spec.MAX_DATA_FILE_NAME),
    }


def _name_offset(offset: int, names: Mapping[str, bytes], cluster_size: int) -> int:
    """Where the backing file name goes, once it is certain that all fits a cluster."""
    if offset > cluster_size:
        raise ConfigError(
            f"data_file: the name is {len(names['data_file'])} bytes long, too long for a header"
            f" cluster of {cluster_size}"
        )
    if offset + len(names["backing_file"]) > cluster_size:
        raise ConfigError(
            f"backing_file: the name is {len(names['backing_file'])} bytes long, but"
            f" {cluster_size - offset} are left in a header cluster of {cluster_size}"
        )
    return offset


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


def _extensions(options: NewImageOptions, names: Mapping[str, bytes]) -> bytes:
    """The header extension area."""
    area = b""
    if names["backing_format"]:
        area += _extension(ExtensionType.BACKING_FORMAT, names["backing_format"])
    if names["data_file"]:
        area += _extension(ExtensionType.DATA_FILE, names["data_file"])
    if options.version == 3 and options.cluster_size >= spec.FEATURE_NAMES_MIN_CLUSTER_SIZE:
        area += _extension(ExtensionType.FEATURE_NAMES, _feature_names())
    return area + _extension(ExtensionType.END, b"")


def _extension(type_: ExtensionType, data: bytes) -> bytes:
    built: bytes = spec.HEADER_EXTENSION.build({"type": type_, "data": data})
    return built


def _feature_names() -> bytes:
    return b"".join(
        spec.FEATURE_NAME.build({"type": type_, "bit": bit, "name": name.encode("ascii")})
        for (type_, bit), name in spec.FEATURE_NAMES.items()
    )

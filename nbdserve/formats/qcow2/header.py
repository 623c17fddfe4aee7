"""From the first cluster of a file to a `Header` that can be believed, or to a refusal.

`parse_header` answers whether this is a well-formed qcow2 image; whether *we* can open it is for
supported.py to say. Pure: bytes in, a value or an ImageError out, one sentence that names the file.
Whatever the bytes are, nothing else is raised, and neither memory nor time grows with a number
found in the header.

What `parse_header` has let through needs no second look: the tables it names are aligned, within
the file, within the limits (spec.py) and apart from each other, and the L1 table covers the disk.
Follows ``qcow2_do_open``, ``qcow2_validate_table`` and ``qcow2_read_extensions``. Stricter than
QEMU where it reads on into nonsense: a table beyond the end of the file (QEMU sees zeroes there
and serves an empty disk), tables that overlap, one extension twice, a backing file name inside
the header, a header_length that is no multiple of 8.

The other direction is deliberately small: a header is never rewritten whole, so fields and
extensions that we do not know survive. The functions at the end give the single writes, each
within one sector, that a running image needs.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from construct import StreamError

from nbdserve.errors import ImageError
from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.extensions import (
    BitmapsExtension,
    Extensions,
    Malformed,
    parse_extensions,
    text,
)
from nbdserve.formats.qcow2.spec import (
    AutoclearFeature,
    CryptMethod,
    FeatureType,
    IncompatibleFeature,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdserve.formats.qcow2.compressed import CompressionType

__all__ = [
    "Header",
    "HeaderUpdate",
    "autoclear_update",
    "header_bytes_wanted",
    "incompatible_features_update",
    "parse_header",
    "refcount_table_update",
]


@dataclass(frozen=True, slots=True)
class Header:
    """The header and its extensions. Offsets are in bytes from the start of the image file.

    Version 2 images have the values that the spec gives them for the fields they lack.
    """

    version: int
    size: int
    """Of the virtual disk in bytes, down to a whole 512-byte sector, which is what QEMU serves."""
    cluster_bits: int
    l1_size: int
    """Entries. May be more than the virtual disk needs: VM state lies behind it."""
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int
    """Known ones only: `parse_header` refuses the others."""
    compatible_features: int
    autoclear_features: int
    header_length: int
    compression_type: CompressionType
    crypt_method: int
    backing_file: str | None
    """As written in the image, bytes that are no UTF-8 as surrogate escapes. A relative name
    counts from the image's folder. It is a stranger's wish, not yet a file to be opened."""
    backing_format: str | None
    extensions: tuple[tuple[int, bytes], ...]
    """All of them, known or not, in their order: (type, data)."""
    feature_names: dict[tuple[FeatureType, int], str]
    """From the image's own table: (which bitmap, bit number) to a printable name."""
    bitmaps: BitmapsExtension | None
    """None also if the image has bitmaps that its autoclear bit declares inconsistent."""
    data_file: str | None
    """The name of the external data file as written in the image, None if it has none or does not
    name it. A plain path, never a protocol's. A relative one counts from the working directory, not
    from the image's folder: that is what QEMU makes of it."""

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def has_data_file(self) -> bool:
        """Whether the guest's data is in an external data file."""
        return bool(self.incompatible_features & IncompatibleFeature.DATA_FILE)

    @property
    def data_file_is_raw(self) -> bool:
        """Whether the data file alone shall read as the guest's disk."""
        return bool(self.autoclear_features & AutoclearFeature.RAW_DATA)

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order


class HeaderUpdate(NamedTuple):
    """One write to the image file."""

    offset: int
    data: bytes


class _Region(NamedTuple):
    """A part of the file that something in the header points at; limit in bytes."""

    name: str
    offset: int
    nb_bytes: int
    limit: int


# --- Parsing -----------------------------------------------------------------------------------


def header_bytes_wanted(first_bytes: bytes) -> int:
    """How much of the file's start `parse_header` needs, given the first 104 bytes or more.

    That is the first cluster, at most 2 MiB. If the bytes are not those of a header, a length that
    lets `parse_header` say so. Never raises.
    """
    offset = spec.HEADER_OFFSETS["cluster_bits"]
    cluster_bits = int.from_bytes(first_bytes[offset : offset + 4], "big")
    if spec.MIN_CLUSTER_BITS <= cluster_bits <= spec.MAX_CLUSTER_BITS:
        return 1 << cluster_bits
    return spec.HEADER_LENGTH


def parse_header(data: bytes, filename: str, file_size: int) -> Header:
    """The header of the image that starts with `data`.

    :param data: from offset 0, `header_bytes_wanted` bytes or the whole of a shorter file. More
        does no harm.
    :param filename: for the error.
    :param file_size: of the image file in bytes; no table may lie beyond it.
    :raises ImageError: not a qcow2 image; malformed; beyond a limit; cut short; or with an
        incompatible feature that is unknown, so that nothing else in it can be relied on.
    """
    try:
        return _parse(data, file_size)
    except Malformed as reason:
        raise ImageError(f"{filename}: {reason}") from None


def _parse(data: bytes, file_size: int) -> Header:
    fields = _parse_fields(data)
    cluster = data[: 1 << fields.cluster_bits]
    extensions_end = fields.backing_file_offset or len(cluster)
    extensions = parse_extensions(cluster, fields.header_length, extensions_end)
    _check_features(fields, extensions.feature_names)
    _check_crypto(fields, extensions.crypto_offset)
    _check_l1_covers_disk(fields)
    bitmaps = _consistent_bitmaps(fields, extensions)
    _check_regions(list(_regions(fields, bitmaps)), len(cluster), file_size)
    return Header(
        version=fields.version,
        size=fields.size - fields.size % 512,
        cluster_bits=fields.cluster_bits,
        l1_size=fields.l1_size,
        l1_table_offset=fields.l1_table_offset,
        refcount_table_offset=fields.refcount_table_offset,
        refcount_table_clusters=fields.refcount_table_clusters,
        refcount_order=fields.refcount_order,
        nb_snapshots=fields.nb_snapshots,
        snapshots_offset=fields.snapshots_offset,
        incompatible_features=fields.incompatible_features,
        compatible_features=fields.compatible_features,
        autoclear_features=fields.autoclear_features,
        header_length=fields.header_length,
        compression_type=_compression_type(fields),
        crypt_method=fields.crypt_method,
        backing_file=_backing_file(fields, cluster),
        backing_format=extensions.backing_format,
        extensions=extensions.entries,
        feature_names=extensions.feature_names,
        bitmaps=bitmaps,
        data_file=extensions.data_file,
    )


@dataclass(slots=True)
class _Fields:
    """The header's plain fields, of either version; names and order are the spec's."""

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = spec.V2_REFCOUNT_ORDER
    header_length: int = spec.V2_HEADER_LENGTH
    compression_type: int = spec.COMPRESSION_ZLIB


def _parse_fields(data: bytes) -> _Fields:
    """Everything up to header_length, and that the first cluster is there whole."""
    if not data.startswith(spec.MAGIC):
        raise Malformed("not a qcow2 image")
    try:
        parsed = spec.HEADER_V2.parse(data)
        if parsed.version == 3:
            parsed = spec.HEADER_V3.parse(data)
    except StreamError:
        raise Malformed(f"cut short: the header ends after {len(data)} bytes") from None
    fields = _Fields(
        **{name: parsed[name] for name in _Fields.__slots__ if parsed.get(name) is not None}
    )
    if fields.version not in (2, 3):
        raise Malformed(f"qcow2 version {fields.version} is not supported, only 2 and 3 are")
    if not spec.MIN_CLUSTER_BITS <= fields.cluster_bits <= spec.MAX_CLUSTER_BITS:
        raise Malformed(
            f"cluster_bits is {fields.cluster_bits},"
            f" not {spec.MIN_CLUSTER_BITS} to {spec.MAX_CLUSTER_BITS}"
        )
    length, cluster_size = fields.header_length, 1 << fields.cluster_bits
    if fields.version == 3 and (length < spec.V3_MIN_HEADER_LENGTH or length % 8):
        raise Malformed(
            f"the header says it is {length} bytes long,"
            f" not a multiple of 8 from {spec.V3_MIN_HEADER_LENGTH}"
        )
    if length > cluster_size:
        raise Malformed(
            f"the header says it is {length} bytes long, more than a cluster of {cluster_size}"
        )
    if len(data) < cluster_size:
        raise Malformed(
            f"cut short: the file has {len(data)} of the first cluster's {cluster_size} bytes"
        )
    if fields.backing_file_offset and not length <= fields.backing_file_offset <= cluster_size:
        raise Malformed(
            f"the backing file name is said to be at offset {fields.backing_file_offset},"
            f" not between the header ({length} bytes) and the end of the first cluster"
        )
    if fields.refcount_order > spec.MAX_REFCOUNT_ORDER:
        raise Malformed(
            f"refcount_order is {fields.refcount_order}, not 0 to {spec.MAX_REFCOUNT_ORDER}"
        )
    return fields


def _backing_file(fields: _Fields, cluster: bytes) -> str | None:
    start, length = fields.backing_file_offset, fields.backing_file_size
    if start == 0:
        return None
    room = min(spec.MAX_BACKING_FILE_NAME, len(cluster) - start)
    if length > room:
        raise Malformed(f"the backing file name is {length} bytes long, more than {room}")
    return text(cluster[start : start + length]) or None


# --- What the fields must agree on -------------------------------------------------------------


def _check_features(fields: _Fields, names: dict[tuple[FeatureType, int], str]) -> None:
    unknown = fields.incompatible_features & ~spec.KNOWN_INCOMPATIBLE
    if unknown:
        listed = ", ".join(
            names.get((FeatureType.INCOMPATIBLE, bit)) or f"bit {bit}"
            for bit in range(64)
            if unknown >> bit & 1
        )
        raise Malformed(f"uses incompatible features that are not known here: {listed}")
    extended_l2 = fields.incompatible_features & IncompatibleFeature.EXTENDED_L2
    if extended_l2 and fields.cluster_bits < spec.EXTENDED_L2_MIN_CLUSTER_BITS:
        raise Malformed("extended L2 entries need clusters of at least 16384 bytes")
    data_file = fields.incompatible_features & IncompatibleFeature.DATA_FILE
    if fields.autoclear_features & AutoclearFeature.RAW_DATA and not data_file:
        raise Malformed("says that its external data file is raw, but has none")
    if fields.autoclear_features & AutoclearFeature.RAW_DATA and fields.backing_file_offset:
        raise Malformed("says that its external data file is raw, but has a backing file")


def _compression_type(fields: _Fields) -> CompressionType:
    names: dict[int, CompressionType] = {
        spec.COMPRESSION_ZLIB: "zlib",
        spec.COMPRESSION_ZSTD: "zstd",
    }
    if fields.compression_type not in names:
        raise Malformed(f"compression type {fields.compression_type} is not supported")
    flagged = bool(fields.incompatible_features & IncompatibleFeature.COMPRESSION)
    if flagged != (fields.compression_type != spec.COMPRESSION_ZLIB):
        raise Malformed(
            f"compression type {fields.compression_type} contradicts its feature bit, which is"
            f" {'set' if flagged else 'not set'}"
        )
    return names[fields.compression_type]


def _check_crypto(fields: _Fields, crypto_offset: int | None) -> None:
    if (crypto_offset is not None) != (fields.crypt_method == CryptMethod.LUKS):
        raise Malformed(
            f"encryption method {fields.crypt_method} contradicts the encryption header"
            f" extension, which is {'missing' if crypto_offset is None else 'present'}"
        )
    if crypto_offset is not None and crypto_offset % (1 << fields.cluster_bits):
        raise Malformed(f"the encryption header is at offset {crypto_offset}, within a cluster")


def _consistent_bitmaps(fields: _Fields, extensions: Extensions) -> BitmapsExtension | None:
    bitmaps = extensions.bitmaps
    if bitmaps is None or not fields.autoclear_features & AutoclearFeature.BITMAPS:
        return None
    if not 1 <= bitmaps.nb_bitmaps <= spec.MAX_BITMAPS:
        raise Malformed(
            f"the bitmaps extension counts {bitmaps.nb_bitmaps} bitmaps,"
            f" not 1 to {spec.MAX_BITMAPS}"
        )
    return bitmaps


def _check_l1_covers_disk(fields: _Fields) -> None:
    extended = fields.incompatible_features & IncompatibleFeature.EXTENDED_L2
    l2_entries = (1 << fields.cluster_bits) // (16 if extended else 8)
    needed = -(-fields.size // (l2_entries << fields.cluster_bits))
    if needed * 8 > spec.MAX_L1_BYTES:
        raise Malformed(
            f"a virtual size of {fields.size} bytes is too large for clusters of"
            f" {1 << fields.cluster_bits}: the L1 table would exceed {spec.MAX_L1_BYTES} bytes"
        )
    if fields.l1_size < needed:
        raise Malformed(
            f"the L1 table is too small: {fields.l1_size} entries,"
            f" but a virtual size of {fields.size} bytes needs {needed}"
        )


def _regions(fields: _Fields, bitmaps: BitmapsExtension | None) -> Iterator[_Region]:
    """What the header occupies and points at."""
    cluster_size = 1 << fields.cluster_bits
    if fields.refcount_table_clusters == 0:
        raise Malformed("has no refcount table")
    yield _Region("header", 0, cluster_size, cluster_size)
    yield _Region(
        "refcount table",
        fields.refcount_table_offset,
        fields.refcount_table_clusters * cluster_size,
        spec.MAX_REFCOUNT_TABLE_BYTES,
    )
    yield _Region("L1 table", fields.l1_table_offset, fields.l1_size * 8, spec.MAX_L1_BYTES)
    # Its entries vary in length; this much it has at least.
    yield _Region(
        "snapshot table",
        fields.snapshots_offset,
        fields.nb_snapshots * spec.SNAPSHOT_ENTRY_MIN_BYTES,
        spec.MAX_SNAPSHOTS * spec.SNAPSHOT_ENTRY_MIN_BYTES,
    )
    if bitmaps is not None:
        yield _Region(
            "bitmap directory",
            bitmaps.directory_offset,
            bitmaps.directory_size,
            spec.MAX_BITMAP_DIRECTORY_BYTES,
        )


def _check_regions(regions: list[_Region], cluster_size: int, file_size: int) -> None:
    for region in regions:
        if region.nb_bytes > region.limit:
            raise Malformed(
                f"the {region.name} is too large: {region.nb_bytes} bytes, at most {region.limit}"
            )
        if region.offset % cluster_size:
            raise Malformed(f"the {region.name} is at offset {region.offset}, within a cluster")
        if region.nb_bytes and region.offset + region.nb_bytes > file_size:
            raise Malformed(
                f"cut short: the {region.name} is at bytes {region.offset} to"
                f" {region.offset + region.nb_bytes}, but the file has only {file_size}"
            )
    occupied = sorted((region for region in regions if region.nb_bytes), key=lambda r: r.offset)
    for region, following in itertools.pairwise(occupied):
        if region.offset + region.nb_bytes > following.offset:
            raise Malformed(
                f"the {following.name} at offset {following.offset}"
                f" overlaps the {region.name} at offset {region.offset}"
            )


# --- What is written ---------------------------------------------------------------------------


def refcount_table_update(offset: int, nb_clusters: int) -> HeaderUpdate:
    """Points the header at another refcount table, which is durable already.

    Both fields in one write, in one sector: no crash can leave the one without the other.
    """
    data = struct.pack(">QI", offset, nb_clusters)
    return HeaderUpdate(spec.HEADER_OFFSETS["refcount_table_offset"], data)


def incompatible_features_update(header: Header, features: int) -> HeaderUpdate:
    """Replaces all incompatible feature bits, as to set CORRUPT. Not for version 2."""
    return _features_update(header, "incompatible_features", features)


def autoclear_update(header: Header) -> HeaderUpdate | None:
    """What must be written, and be durable, before anything else is; None: nothing.

    Clears all autoclear bits but RAW_DATA, because we maintain no other of these features: the
    unknown ones by definition; and with BITMAPS and bitmaps the image is not opened for writing
    (supported.py).
    """
    kept = header.autoclear_features & AutoclearFeature.RAW_DATA
    if header.autoclear_features == kept:
        return None
    return _features_update(header, "autoclear_features", kept)


def _features_update(header: Header, field: str, features: int) -> HeaderUpdate:
    # In version 2 these bytes are header extensions.
    assert header.version >= 3, f"version {header.version} has no {field}"
    return HeaderUpdate(spec.HEADER_OFFSETS[field], features.to_bytes(8, "big"))

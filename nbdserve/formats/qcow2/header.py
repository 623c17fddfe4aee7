"""From the first cluster of a file to a `Header` that can be believed, or to a refusal.

`parse_header` answers whether this is a well-formed qcow2 image; whether *we* can open it is for
supported.py to say. Pure: bytes in, a value or an ImageError out, one sentence that names the file.
Whatever the bytes are, nothing else is raised, and neither memory nor time grows with a number
found in the header. Three steps: the plain fields (fields.py), the extensions (extensions.py), and
what they must agree on (consistency.py).

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

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.errors import ImageError
from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.consistency import (
    check_crypto,
    check_features,
    check_l1_covers_disk,
    check_regions,
    compression_type,
    consistent_bitmaps,
)
from nbdserve.formats.qcow2.extensions import Malformed, parse_extensions, text
from nbdserve.formats.qcow2.fields import parse_fields
from nbdserve.formats.qcow2.spec import AutoclearFeature, IncompatibleFeature

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.compressed import CompressionType
    from nbdserve.formats.qcow2.extensions import BitmapsExtension
    from nbdserve.formats.qcow2.fields import Fields
    from nbdserve.formats.qcow2.spec import FeatureType

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
    fields = parse_fields(data)
    cluster = data[: 1 << fields.cluster_bits]
    extensions_end = fields.backing_file_offset or len(cluster)
    extensions = parse_extensions(cluster, fields.header_length, extensions_end)
    check_features(fields, extensions.feature_names)
    check_crypto(fields, extensions.crypto_offset)
    check_l1_covers_disk(fields)
    bitmaps = consistent_bitmaps(fields, extensions)
    check_regions(fields, bitmaps, file_size)
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
        compression_type=compression_type(fields),
        crypt_method=fields.crypt_method,
        backing_file=_backing_file(fields, cluster),
        backing_format=extensions.backing_format,
        extensions=extensions.entries,
        feature_names=extensions.feature_names,
        bitmaps=bitmaps,
        data_file=extensions.data_file,
    )


def _backing_file(fields: Fields, cluster: bytes) -> str | None:
    start, length = fields.backing_file_offset, fields.backing_file_size
    if start == 0:
        return None
    room = min(spec.MAX_BACKING_FILE_NAME, len(cluster) - start)
    if length > room:
        raise Malformed(f"the backing file name is {length} bytes long, more than {room}")
    return text(cluster[start : start + length]) or None


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

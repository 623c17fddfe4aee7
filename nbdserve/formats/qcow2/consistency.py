"""What the fields and extensions of a header must agree on, before any of them is believed.

One function for each question, pure; each raises `Malformed`, which says what contradicts what, and
nothing else. Neither memory nor time grows with a number found in the header. Follows
``qcow2_do_open`` and ``qcow2_validate_table``; where it is stricter than QEMU header.py says.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.extensions import BitmapsExtension, Extensions, Malformed
from nbdserve.formats.qcow2.spec import (
    AutoclearFeature,
    CryptMethod,
    FeatureType,
    IncompatibleFeature,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdserve.formats.qcow2.compressed import CompressionType
    from nbdserve.formats.qcow2.fields import Fields

__all__ = [
    "check_crypto",
    "check_features",
    "check_l1_covers_disk",
    "check_regions",
    "compression_type",
    "consistent_bitmaps",
]


class _Region(NamedTuple):
    """A part of the file that something in the header points at; limit in bytes."""

    name: str
    offset: int
    nb_bytes: int
    limit: int


def check_features(fields: Fields, names: dict[tuple[FeatureType, int], str]) -> None:
    """Feature bits that are known here and fit each other. `names`: the image's own for them."""
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


def compression_type(fields: Fields) -> CompressionType:
    """The type, which its feature bit must confirm."""
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


def check_crypto(fields: Fields, crypto_offset: int | None) -> None:
    """LUKS and its header extension come together or not at all."""
    if (crypto_offset is not None) != (fields.crypt_method == CryptMethod.LUKS):
        raise Malformed(
            f"encryption method {fields.crypt_method} contradicts the encryption header"
            f" extension, which is {'missing' if crypto_offset is None else 'present'}"
        )
    if crypto_offset is not None and crypto_offset % (1 << fields.cluster_bits):
        raise Malformed(f"the encryption header is at offset {crypto_offset}, within a cluster")


def consistent_bitmaps(fields: Fields, extensions: Extensions) -> BitmapsExtension | None:
    """The bitmaps, None also if their autoclear bit declares them inconsistent."""
    bitmaps = extensions.bitmaps
    if bitmaps is None or not fields.autoclear_features & AutoclearFeature.BITMAPS:
        return None
    if not 1 <= bitmaps.nb_bitmaps <= spec.MAX_BITMAPS:
        raise Malformed(
            f"the bitmaps extension counts {bitmaps.nb_bitmaps} bitmaps,"
            f" not 1 to {spec.MAX_BITMAPS}"
        )
    return bitmaps


def check_l1_covers_disk(fields: Fields) -> None:
    """The L1 table reaches the end of the disk, and is not too large for that."""
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


def check_regions(fields: Fields, bitmaps: BitmapsExtension | None, file_size: int) -> None:
    """What the header points at is aligned, within the file and the limits, and apart."""
    regions = list(_regions(fields, bitmaps))
    for region in regions:
        _check_region(region, 1 << fields.cluster_bits, file_size)
    occupied = sorted((region for region in regions if region.nb_bytes), key=lambda r: r.offset)
    for region, following in itertools.pairwise(occupied):
        if region.offset + region.nb_bytes > following.offset:
            raise Malformed(
                f"the {following.name} at offset {following.offset}"
                f" overlaps the {region.name} at offset {region.offset}"
            )


def _regions(fields: Fields, bitmaps: BitmapsExtension | None) -> Iterator[_Region]:
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


def _check_region(region: _Region, cluster_size: int, file_size: int) -> None:
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

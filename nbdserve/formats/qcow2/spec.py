"""The qcow2 format as its specification gives it: structures, bits, limits. Nothing is done here.

Source: QEMU's docs/interop/qcow2 (called "the spec" in this package); section names are given. All
numbers are big endian. The limits are not in the spec but QEMU's (block/qcow2.h): an image beyond
them is one that QEMU cannot open, and they bound what a hostile header can make us allocate.

The structures are `construct` declarations, for the rare metadata. Tables of 64-bit entries (L1,
L2, refcount table) are read as whole arrays and have only their bits here. Results of `construct`
are untyped, so each user turns them into a dataclass at once (header.py).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from construct import (
    Aligned,
    Bytes,
    Const,
    FixedSized,
    GreedyBytes,
    If,
    Int8ub,
    Int16ub,
    Int32ub,
    Int64ub,
    NullStripped,
    Optional,
    Padded,
    Rebuild,
    Struct,
    len_,
    this,
)

MAGIC = b"QFI\xfb"

# --- Limits ------------------------------------------------------------------------------------

MIN_CLUSTER_BITS = 9
"""The spec's lower bound: a cluster is never smaller than the sector that offsets count in."""

MAX_CLUSTER_BITS = 21
"""QEMU's bound, 2 MiB: clusters are read whole for copy-on-write and decompression."""

EXTENDED_L2_MIN_CLUSTER_BITS = 14
"""32 subclusters of at least 512 bytes each."""

MAX_L1_BYTES = 32 << 20
"""Bytes: the L1 table is held in memory. Maps 2 PiB at 64 KiB clusters, 128 GiB at 512 bytes."""

MAX_REFCOUNT_TABLE_BYTES = 8 << 20
"""Bytes: the refcount table is held in memory. Enough for 2 PiB at 64 KiB clusters."""

MAX_REFCOUNT_ORDER = 6
"""Refcounts of 2**6 = 64 bits; the spec allows no wider."""

V2_REFCOUNT_ORDER = 4
"""Version 2 has no field for it: refcounts are 16 bits wide."""

MAX_BACKING_FILE_NAME = 1023
"""Bytes, by the spec: with its terminating NUL, a host path buffer of 1024."""

MAX_BACKING_FORMAT_NAME = 15
"""Bytes: QEMU holds the name in 16, and no block driver has a longer one."""

MAX_DATA_FILE_NAME = 1023
"""Bytes, of those that we write: as for backing files. The spec has no limit."""

MAX_SNAPSHOTS = 65536
"""QEMU's bound; the snapshot table is read whole, and an entry is at least 40 bytes."""

MAX_BITMAPS = 65535
"""QEMU's bound on persistent bitmaps."""

MAX_BITMAP_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
"""An average of 1 KiB for an entry, which is a 24-byte structure and a name."""

MAX_HEADER_EXTENSIONS = 256
"""Ours: six types are known and each may appear once, but a hostile 2 MiB header cluster has
room for 262144 empty ones."""

MAX_FEATURE_NAMES = 3 * 64
"""Entries of the feature name table that can mean anything: one for each bit of each bitmap."""

FEATURE_NAMES_MIN_CLUSTER_SIZE = 8192
"""QEMU leaves the feature name table out of smaller clusters, where the backing file name needs
the room (``qcow2_update_header``)."""

# --- Feature bits (spec: Header) ---------------------------------------------------------------


class IncompatibleFeature(IntFlag):
    """Whoever does not know one of these that is set must not open the image."""

    DIRTY = 1 << 0
    """Refcounts may be stale; the mapping is right. Rebuild them before writing."""
    CORRUPT = 1 << 1
    """Somebody found the metadata inconsistent. Repair before writing."""
    DATA_FILE = 1 << 2
    """Guest clusters are in another file, at the host offset that equals the guest offset."""
    COMPRESSION = 1 << 3
    """`compression_type` is present and is not zlib."""
    EXTENDED_L2 = 1 << 4
    """L2 entries are 16 bytes: each cluster has 32 subclusters with a bitmap of their own."""


class CompatibleFeature(IntFlag):
    """Whoever does not know one of these may ignore it."""

    LAZY_REFCOUNTS = 1 << 0
    """Refcount updates may be put off, under the protection of DIRTY."""


class AutoclearFeature(IntFlag):
    """Whoever writes without maintaining one of these must clear it first."""

    BITMAPS = 1 << 0
    """The bitmaps extension agrees with the guest's data."""
    RAW_DATA = 1 << 1
    """The external data file can also be read as a raw image."""


class FeatureType(IntEnum):
    """Which of the three bitmaps an entry of the feature name table speaks of."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


KNOWN_INCOMPATIBLE = sum(IncompatibleFeature)

FEATURE_NAMES: dict[tuple[FeatureType, int], str] = {
    (FeatureType.INCOMPATIBLE, 0): "dirty bit",
    (FeatureType.INCOMPATIBLE, 1): "corrupt bit",
    (FeatureType.INCOMPATIBLE, 2): "external data file",
    (FeatureType.INCOMPATIBLE, 3): "compression type",
    (FeatureType.INCOMPATIBLE, 4): "extended L2 entries",
    (FeatureType.COMPATIBLE, 0): "lazy refcounts",
    (FeatureType.AUTOCLEAR, 0): "bitmaps",
    (FeatureType.AUTOCLEAR, 1): "raw external data",
}
"""The names that QEMU gives the bits, in the order in which it writes them into new images."""

# --- Header (spec: Header, Additional fields) --------------------------------------------------

V2_HEADER_LENGTH = 72
V3_MIN_HEADER_LENGTH = 104
HEADER_LENGTH = 112
"""Of the header that we and QEMU write: with compression_type and its padding."""

_V2_FIELDS = (
    "magic" / Const(MAGIC),
    "version" / Int32ub,  # 2 or 3
    "backing_file_offset" / Int64ub,  # of the name, within the first cluster; 0: no backing file
    "backing_file_size" / Int32ub,  # of the name in bytes; it has no terminator
    "cluster_bits" / Int32ub,  # a cluster is 1 << cluster_bits bytes
    "size" / Int64ub,  # of the virtual disk in bytes
    "crypt_method" / Int32ub,  # CryptMethod
    "l1_size" / Int32ub,  # entries of the active L1 table, 8 bytes each
    "l1_table_offset" / Int64ub,  # cluster aligned, as all tables
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,  # length of the refcount table, in clusters
    "nb_snapshots" / Int32ub,  # internal snapshots
    "snapshots_offset" / Int64ub,  # of their table
)
_V3_FIELDS = (
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,  # a refcount is 1 << refcount_order bits
    "header_length" / Int32ub,  # of all these fields: at least 104, a multiple of 8
    # A field beyond header_length is absent and counts as 0. The rest of its 8 bytes is padding.
    "compression_type" / If(this.header_length > V3_MIN_HEADER_LENGTH, Padded(8, Int8ub)),
)

HEADER_V2 = Struct(*_V2_FIELDS)
HEADER_V3 = Struct(*_V2_FIELDS, *_V3_FIELDS)


def _field_offsets() -> dict[str, int]:
    offsets: dict[str, int] = {}
    position = 0
    for field in _V2_FIELDS + _V3_FIELDS[:-1]:
        offsets[field.name] = position
        position += field.sizeof()
    return offsets


HEADER_OFFSETS = _field_offsets()
"""Where in the file each field of the header is, for those that are rewritten alone."""


class CryptMethod(IntEnum):
    """The field crypt_method: how the guest's data (never the metadata) is encrypted."""

    NONE = 0
    AES = 1
    LUKS = 2


COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1

# --- Header extensions (spec: Header extensions and the sections that follow it) ---------------


class ExtensionType(IntEnum):
    """What follows the header, up to END or the backing file name. Unknown types are skipped."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO_HEADER = 0x0537BE77
    DATA_FILE = 0x44415441


HEADER_EXTENSION = Struct(
    "type" / Int32ub,
    "length" / Rebuild(Int32ub, len_(this.data)),
    "data" / Aligned(8, Bytes(this.length)),  # the padding is not counted in length
)

FEATURE_NAME = Struct(
    "type" / Int8ub,  # FeatureType
    "bit" / Int8ub,  # 0..63
    "name" / FixedSized(46, NullStripped(GreedyBytes)),  # NUL padded, if there is room
)

BITMAPS_EXTENSION = Struct(
    "nb_bitmaps" / Int32ub,  # at least 1
    "reserved" / Int32ub,  # 0
    "bitmap_directory_size" / Int64ub,  # of all entries together, in bytes
    "bitmap_directory_offset" / Int64ub,  # cluster aligned
)

CRYPTO_EXTENSION = Struct(
    "offset" / Int64ub,  # of the LUKS header in the image, cluster aligned
    "length" / Int64ub,  # in bytes; whole clusters are allocated for it
)

# --- Snapshot table (spec: Snapshots) ----------------------------------------------------------

SNAPSHOT_ENTRY_MIN_BYTES = 40

SNAPSHOT_ENTRY = Aligned(
    8,
    Struct(
        "l1_table_offset" / Int64ub,  # the snapshot's own L1 table, cluster aligned
        "l1_size" / Int32ub,  # its entries
        "id_size" / Rebuild(Int16ub, len_(this.id)),
        "name_size" / Rebuild(Int16ub, len_(this.name)),
        "date_sec" / Int32ub,  # when it was taken, since the Epoch
        "date_nsec" / Int32ub,
        "vm_clock_nsec" / Int64ub,  # how long the guest had run
        "vm_state_size" / Int32ub,  # bytes; obsolete where SNAPSHOT_EXTRA_DATA has it
        "extra_data_size" / Rebuild(Int32ub, len_(this.extra_data)),
        "extra_data" / Bytes(this.extra_data_size),  # SNAPSHOT_EXTRA_DATA
        "id" / Bytes(this.id_size),  # unique; neither string is terminated
        "name" / Bytes(this.name_size),
    ),
)

SNAPSHOT_EXTRA_DATA = Struct(
    "vm_state_size" / Optional(Int64ub),  # VM state lies behind the end of the virtual disk
    "disk_size" / Optional(Int64ub),  # version 3 has at least up to here
    "icount" / Optional(Int64ub),  # instructions executed, under record and replay
    "unknown" / GreedyBytes,  # kept when the table is rewritten
)

# --- Table entries (spec: Host cluster management, Cluster mapping) ----------------------------

COPIED = 1 << 63
"""L1 and L2 entries: the refcount of what they point at is exactly 1, so it is written in place."""

COMPRESSED = 1 << 62
"""L2 entries: the rest is a compressed cluster descriptor (compressed.py). Never with COPIED."""

ZERO = 1 << 0
"""Standard cluster descriptors, version 3: reads as zeroes, whatever the host offset."""

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""L1 and L2 entries: the host offset, bits 9 to 55. 0: nothing is allocated."""

REFCOUNT_BLOCK_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
"""Refcount table entries: the host offset, bits 9 to 63. 0: all these refcounts are 0."""

COMPRESSED_SECTOR = 512
"""Compressed data is measured in sectors of this many bytes, whatever the cluster size."""

"""The declarations agree with the byte positions that the specification gives."""

import struct

import pytest
from construct import StreamError

from nbdserve.formats.qcow2 import spec

# Byte positions and widths as the specification lists them, written down a second time.
FIELDS = {
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
}
BYTES = spec.MAGIC + bytes(range(4, 100)) + struct.pack(">I", 112) + b"\x01" + bytes(7)


@pytest.mark.parametrize(("name", "place"), FIELDS.items())
def test_header_fields_are_where_the_spec_has_them(name, place):
    offset, width = place
    assert spec.HEADER_OFFSETS[name] == offset
    assert spec.HEADER_V3.parse(BYTES)[name] == int.from_bytes(BYTES[offset:][:width], "big")


def test_the_header_of_version_2_ends_before_the_features():
    assert spec.HEADER_V2.sizeof() == spec.V2_HEADER_LENGTH
    assert set(FIELDS) - set(spec.HEADER_V2.parse(BYTES)) == {
        "incompatible_features",
        "compatible_features",
        "autoclear_features",
        "refcount_order",
        "header_length",
    }


def test_the_compression_type_is_there_only_if_the_header_is_long_enough():
    assert spec.HEADER_V3.parse(BYTES).compression_type == 1
    short = BYTES[:100] + struct.pack(">I", spec.V3_MIN_HEADER_LENGTH)
    assert spec.HEADER_V3.parse(short).compression_type is None
    with pytest.raises(StreamError):
        spec.HEADER_V3.parse(BYTES[:-8])


def test_header_round_trip():
    assert spec.HEADER_V3.build(spec.HEADER_V3.parse(BYTES)) == BYTES
    assert len(BYTES) == spec.HEADER_LENGTH


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_extensions_are_padded_to_8_bytes(length):
    data = bytes(range(1, length + 1))
    built = spec.HEADER_EXTENSION.build({"type": 0x12345678, "data": data})
    assert built == struct.pack(">II", 0x12345678, length) + data + bytes(-length % 8)
    assert spec.HEADER_EXTENSION.parse(built).data == data


def test_feature_names_use_all_46_bytes():
    name = b"n" * 46
    built = spec.FEATURE_NAME.build({"type": 2, "bit": 63, "name": name})
    assert built == b"\x02\x3f" + name
    assert spec.FEATURE_NAME.parse(built).name == name
    assert spec.FEATURE_NAME.parse(b"\x00\x01short".ljust(48, b"\0")).name == b"short"


def test_snapshot_entry():
    extra = struct.pack(">QQQ", 5 << 30, 10 << 30, 7) + b"later"
    head = struct.pack(">QIHHIIQII", 0x50000, 2, 1, 4, 1700000000, 5, 6, 0, len(extra))
    entry = head + extra + b"1" + b"base"
    entry += bytes(-len(entry) % 8)
    assert len(head) == spec.SNAPSHOT_ENTRY_MIN_BYTES
    parsed = spec.SNAPSHOT_ENTRY.parse(entry)
    assert (parsed.l1_table_offset, parsed.l1_size) == (0x50000, 2)
    assert (parsed.id, parsed.name, parsed.date_sec) == (b"1", b"base", 1700000000)
    more = spec.SNAPSHOT_EXTRA_DATA.parse(parsed.extra_data)
    assert (more.vm_state_size, more.disk_size, more.icount) == (5 << 30, 10 << 30, 7)
    assert more.unknown == b"later"
    assert spec.SNAPSHOT_ENTRY.build(parsed) == entry


def test_snapshot_extra_data_may_be_short():
    assert spec.SNAPSHOT_EXTRA_DATA.parse(b"").disk_size is None
    parsed = spec.SNAPSHOT_EXTRA_DATA.parse(struct.pack(">QQ", 1, 2))
    assert (parsed.vm_state_size, parsed.disk_size, parsed.icount) == (1, 2, None)


def test_bitmaps_and_crypto_extensions():
    bitmaps = spec.BITMAPS_EXTENSION.parse(struct.pack(">IIQQ", 3, 0, 96, 0x70000))
    assert (bitmaps.nb_bitmaps, bitmaps.bitmap_directory_size) == (3, 96)
    assert bitmaps.bitmap_directory_offset == 0x70000
    crypto = spec.CRYPTO_EXTENSION.parse(struct.pack(">QQ", 0x80000, 592))
    assert (crypto.offset, crypto.length) == (0x80000, 592)


def test_table_entry_bits():
    # Bits 9 to 55, and 9 to 63.
    assert sum(1 << bit for bit in range(9, 56)) == spec.OFFSET_MASK
    assert sum(1 << bit for bit in range(9, 64)) == spec.REFCOUNT_BLOCK_OFFSET_MASK
    assert spec.COPIED | spec.COMPRESSED == 0b11 << 62
    assert spec.KNOWN_INCOMPATIBLE == 0b11111


def test_feature_names_name_each_known_bit():
    known = {
        spec.FeatureType.INCOMPATIBLE: spec.IncompatibleFeature,
        spec.FeatureType.COMPATIBLE: spec.CompatibleFeature,
        spec.FeatureType.AUTOCLEAR: spec.AutoclearFeature,
    }
    bits = {(type_, bit.bit_length() - 1) for type_, flags in known.items() for bit in flags}
    assert set(spec.FEATURE_NAMES) == bits

"""Header extensions: kept whole, believed only as far as they make sense."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.extensions import (
    BitmapsExtension,
    Malformed,
    parse_extensions,
    text,
)
from nbdserve.formats.qcow2.spec import ExtensionType, FeatureType

CLUSTER_SIZE = 4096
START = 112


def area(*entries):
    """The extension area of a cluster: (type, data) of each."""
    return b"".join(
        struct.pack(">II", type_, len(data)) + data + bytes(-len(data) % 8)
        for type_, data in entries
    )


def parse(raw, end=CLUSTER_SIZE):
    return parse_extensions((bytes(START) + raw).ljust(CLUSTER_SIZE, b"\0"), START, end)


def feature_name(type_, bit, name):
    return bytes([type_, bit]) + name.ljust(46, b"\0")


def test_all_are_kept_in_order():
    entries = ((0x11111111, b"abc"), (ExtensionType.BACKING_FORMAT, b"raw"), (0x11111111, b""))
    extensions = parse(area(*entries, (ExtensionType.END, b""), (0x22222222, b"beyond the end")))
    assert extensions.entries == entries
    assert extensions.backing_format == "raw"


def test_none():
    extensions = parse(b"")
    assert extensions.entries == ()
    assert extensions.backing_format is None
    assert extensions.data_file is None
    assert extensions.bitmaps is None
    assert extensions.crypto_offset is None
    assert extensions.feature_names == {}


def test_the_end_marker_may_be_missing():
    raw = area((0x11111111, b"12345678"))
    assert parse(raw, end=START + len(raw)).entries == ((0x11111111, b"12345678"),)
    # The padding of the last may reach into the backing file name.
    raw = area((0x11111111, b"123"))
    assert parse(raw, end=START + 8 + 3).entries == ((0x11111111, b"123"),)


@pytest.mark.parametrize("length", [4096 - 112 - 7, 4096, 0x7FFFFFFF, 0xFFFFFFFF])
def test_one_that_runs_out_of_the_cluster(length):
    with pytest.raises(Malformed, match="extension at offset 112 runs beyond 4096"):
        parse(struct.pack(">II", 0x11111111, length))


def test_one_that_runs_into_the_backing_file_name():
    with pytest.raises(Malformed, match="extension at offset 112 runs beyond 130"):
        parse(area((0x11111111, b"12345678901")), end=130)
    with pytest.raises(Malformed, match="extension at offset 112 runs beyond 116"):
        parse(area((0x11111111, b"")), end=116)


@pytest.mark.parametrize("type_", [t for t in ExtensionType if t != ExtensionType.END])
def test_a_known_type_appears_once(type_):
    with pytest.raises(Malformed, match=f"{type_.name} appears 2 times"):
        parse(area((type_, b""), (type_, b"")))


def test_there_is_a_limit_to_their_number():
    many = [(0x11111111, b"")] * spec.MAX_HEADER_EXTENSIONS
    assert len(parse(area(*many)).entries) == spec.MAX_HEADER_EXTENSIONS
    with pytest.raises(Malformed, match="more than 256 header extensions"):
        parse(area(*many, (0x11111111, b"")))


def test_backing_format():
    assert parse(area((ExtensionType.BACKING_FORMAT, b"f" * 15))).backing_format == "f" * 15
    assert parse(area((ExtensionType.BACKING_FORMAT, b""))).backing_format is None
    with pytest.raises(Malformed, match="16 bytes long, more than 15"):
        parse(area((ExtensionType.BACKING_FORMAT, b"f" * 16)))


def test_data_file():
    assert parse(area((ExtensionType.DATA_FILE, b"disk.raw"))).data_file == "disk.raw"


def test_bitmaps():
    data = struct.pack(">IIQQ", 3, 0, 96, 0x70000)
    extensions = parse(area((ExtensionType.BITMAPS, data)))
    assert extensions.bitmaps == BitmapsExtension(3, 96, 0x70000)
    with pytest.raises(Malformed, match="23 bytes long, not 24"):
        parse(area((ExtensionType.BITMAPS, data[:-1])))
    with pytest.raises(Malformed, match="reserved"):
        parse(area((ExtensionType.BITMAPS, struct.pack(">IIQQ", 3, 1, 96, 0x70000))))


def test_crypto():
    data = struct.pack(">QQ", 0x80000, 592)
    assert parse(area((ExtensionType.CRYPTO_HEADER, data))).crypto_offset == 0x80000
    with pytest.raises(Malformed, match="24 bytes long, not 16"):
        parse(area((ExtensionType.CRYPTO_HEADER, data + bytes(8))))


def test_feature_names():
    table = (
        feature_name(0, 5, b"teleportation")
        + feature_name(2, 63, b"n" * 46)
        + feature_name(3, 1, b"no such bitmap")
        + feature_name(1, 64, b"no such bit")
        + b"\0\x06half an entry"
    )
    assert parse(area((ExtensionType.FEATURE_NAMES, table))).feature_names == {
        (FeatureType.INCOMPATIBLE, 5): "teleportation",
        (FeatureType.AUTOCLEAR, 63): "n" * 46,
    }


def test_feature_names_can_be_printed():
    table = feature_name(0, 5, b"two\nlines \x1b[31m\xff\0hidden")
    names = parse(area((ExtensionType.FEATURE_NAMES, table))).feature_names
    assert names == {(FeatureType.INCOMPATIBLE, 5): "two?lines ?[31m\N{REPLACEMENT CHARACTER}"}


def test_a_huge_table_of_feature_names_is_not_read_to_its_end():
    cluster_size = 1 << spec.MAX_CLUSTER_BITS
    entries = [feature_name(0, 1, b"last")] * spec.MAX_FEATURE_NAMES + [feature_name(0, 2, b"x")]
    table = area((ExtensionType.FEATURE_NAMES, b"".join(entries).ljust(cluster_size - 200, b"\0")))
    cluster = (bytes(START) + table).ljust(cluster_size, b"\0")
    names = parse_extensions(cluster, START, cluster_size).feature_names
    assert names == {(FeatureType.INCOMPATIBLE, 1): "last"}


def test_text_ends_at_a_nul_and_keeps_what_is_not_utf8():
    assert text(b"a\0b") == "a"
    assert text("ü".encode()) == "ü"
    assert text(b"\xff.img").encode("utf-8", "surrogateescape") == b"\xff.img"


@given(st.binary(max_size=600), st.integers(START, CLUSTER_SIZE))
def test_any_bytes_are_extensions_or_malformed(raw, end):
    try:
        extensions = parse(raw, end)
    except Malformed:
        return
    assert sum(8 + len(data) for _, data in extensions.entries) <= end - START

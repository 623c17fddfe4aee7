"""Any bytes are a `Header` whose tables can be read, or an ImageError that says why not."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import peers
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.create import create_image
from nbdserve.formats.qcow2.header import (
    HeaderUpdate,
    autoclear_update,
    header_bytes_wanted,
    incompatible_features_update,
    parse_header,
    refcount_table_update,
)
from nbdserve.formats.qcow2.spec import (
    AutoclearFeature,
    ExtensionType,
    FeatureType,
    IncompatibleFeature,
)

K = 1024
WIDE = {
    "backing_file_offset", "size", "l1_table_offset", "refcount_table_offset", "snapshots_offset",
    "incompatible_features", "compatible_features", "autoclear_features",
}  # fmt: skip
COMPRESSION_TYPE_OFFSET = 104


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """64 KiB clusters: header, refcount table, refcount block, an L1 table of two entries."""
    path = tmp_path_factory.mktemp("image") / "image.qcow2"
    create_image(str(path), 1 << 30, backing_file="base.raw", backing_format="raw")
    return path.read_bytes()


@pytest.fixture(scope="module")
def image_v2(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.qcow2"
    create_image(str(path), 1 << 30, version=2)
    return path.read_bytes()


def patched(image, compression_type=None, **fields):
    """The image with other values in its header."""
    changed = bytearray(image)
    for name, value in fields.items():
        offset, width = spec.HEADER_OFFSETS[name], 8 if name in WIDE else 4
        changed[offset : offset + width] = value.to_bytes(width, "big")
    if compression_type is not None:
        changed[COMPRESSION_TYPE_OFFSET] = compression_type
    return bytes(changed)


def parse(image, file_size=None):
    """As a caller does it: only as many bytes as are wanted."""
    wanted = header_bytes_wanted(image[:104])
    return parse_header(image[:wanted], "disk.img", len(image) if file_size is None else file_size)


# --- What is well-formed -------------------------------------------------------------------------


def test_header(image):
    header = parse(image)
    assert header.version == 3
    assert header.size == 1 << 30
    assert (header.cluster_bits, header.cluster_size) == (16, 64 * K)
    assert (header.l1_size, header.l1_table_offset) == (2, 3 * 64 * K)
    assert (header.refcount_table_clusters, header.refcount_table_offset) == (1, 64 * K)
    assert (header.refcount_order, header.refcount_bits) == (4, 16)
    assert header.nb_snapshots == 0
    assert header.header_length == 112
    assert header.compression_type == "zlib"
    assert header.crypt_method == 0
    assert (header.backing_file, header.backing_format) == ("base.raw", "raw")
    assert [type_ for type_, _ in header.extensions] == [
        ExtensionType.BACKING_FORMAT,
        ExtensionType.FEATURE_NAMES,
    ]
    assert header.feature_names == spec.FEATURE_NAMES
    assert header.bitmaps is None
    assert header.data_file is None


def test_more_bytes_than_wanted_do_no_harm(image):
    assert parse_header(image, "disk.img", len(image)) == parse(image)


def test_version_2_has_no_features_whatever_follows_its_header(image_v2):
    after = bytearray(image_v2)
    after[72:112] = bytes(8) + b"\xff" * 32  # an end marker, and then nobody's business
    header = parse(bytes(after))
    assert header.version == 2
    assert header.incompatible_features == header.autoclear_features == 0
    assert (header.refcount_bits, header.header_length) == (16, 72)
    assert header.compression_type == "zlib"


def test_a_short_header_has_no_compression_type(image):
    # What would be the compression type is the type of an extension.
    short = bytearray(patched(image, header_length=104, backing_file_offset=0))
    short[104:128] = bytes.fromhex("01234567 00000003 61626300 00000000") + bytes(8)
    header = parse(bytes(short))
    assert header.compression_type == "zlib"
    assert header.extensions == ((0x01234567, b"abc"),)


def test_a_longer_header_than_we_know(image):
    raw = patched(image, header_length=120)
    raw = raw[:112] + b"\xaa" * 8 + raw[112 : 64 * K - 8] + raw[64 * K :]
    raw = patched(raw, backing_file_offset=int.from_bytes(image[8:16], "big") + 8)
    header = parse(raw)
    assert header.header_length == 120
    assert (header.backing_file, header.backing_format) == ("base.raw", "raw")


@pytest.mark.parametrize("length", [0, 4])
def test_backing_file_names_end_at_their_length(image, length):
    assert parse(patched(image, backing_file_size=length)).backing_file == ("base"[:length] or None)


def test_a_backing_file_name_may_be_any_bytes(image):
    offset = int.from_bytes(image[8:16], "big")
    raw = image[:offset] + b"b\xffse\0raw" + image[offset + 8 :]
    assert parse(raw).backing_file == "b\udcffse"


def test_a_backing_file_name_of_1023_bytes_at_the_very_end_of_the_cluster(image):
    raw = patched(image, backing_file_offset=64 * K - 1023, backing_file_size=1023)
    raw = raw[: 64 * K - 1023] + b"n" * 1023 + raw[64 * K :]
    assert parse(raw).backing_file == "n" * 1023


def test_the_disk_ends_with_a_whole_sector(image):
    assert parse(patched(image, size=(1 << 20) - 1)).size == (1 << 20) - 512


def test_an_empty_disk_needs_no_l1_table(image):
    header = parse(patched(image, size=0, l1_size=0, l1_table_offset=0))
    assert (header.size, header.l1_size) == (0, 0)


def test_an_l1_table_may_have_more_entries_than_the_disk_needs(image):
    raw = patched(image, l1_size=spec.MAX_L1_BYTES // 8)
    assert parse(raw, file_size=3 * 64 * K + spec.MAX_L1_BYTES).l1_size == 4 << 20


def test_extended_l2_entries_map_half_as_much(image):
    fields = {"incompatible_features": IncompatibleFeature.EXTENDED_L2}
    assert parse(patched(image, **fields, size=512 << 20)).l1_size == 2
    with pytest.raises(ImageError, match=r"too small: 2 entries, .* needs 3"):
        parse(patched(image, **fields, size=(512 << 20) + 512))


def test_bitmaps_count_only_if_their_autoclear_bit_is_set(image):
    bitmaps = bytes.fromhex("23852875 00000018 00000003 00000000") + bytes.fromhex(
        "0000000000000060 0000000000040000"
    )
    raw = patched(image, backing_file_offset=0)
    raw = raw[:112] + bitmaps + bytes(8) + raw[112 + len(bitmaps) + 8 :]
    assert parse(raw).bitmaps is None
    raw = patched(raw, autoclear_features=AutoclearFeature.BITMAPS)
    found = parse(raw, file_size=5 * 64 * K).bitmaps
    assert (found.nb_bitmaps, found.directory_size, found.directory_offset) == (3, 96, 4 * 64 * K)
    with pytest.raises(ImageError, match="cut short: the bitmap directory is at bytes 262144 to"):
        parse(raw)
    with pytest.raises(ImageError, match="counts 0 bitmaps"):
        parse(raw.replace(bitmaps, bitmaps[:11] + b"\0" + bitmaps[12:]))


# --- What is refused -----------------------------------------------------------------------------

# Fields of the image above, and the words for what is wrong then.
MALFORMED = [
    ({"version": 0}, "qcow2 version 0 is not supported"),
    ({"version": 1}, "qcow2 version 1 is not supported"),
    ({"version": 4}, "qcow2 version 4 is not supported"),
    ({"cluster_bits": 8}, "cluster_bits is 8, not 9 to 21"),
    ({"cluster_bits": 22}, "cluster_bits is 22, not 9 to 21"),
    ({"cluster_bits": 0xFFFFFFFF}, "cluster_bits is 4294967295, not 9 to 21"),
    ({"header_length": 0}, "header says it is 0 bytes long"),
    ({"header_length": 96}, "header says it is 96 bytes long"),
    ({"header_length": 64 * K + 8}, "more than a cluster of 65536"),
    ({"header_length": 0xFFFFFFF8}, "more than a cluster of 65536"),
    ({"backing_file_offset": 64 * K + 1}, "backing file name is said to be at offset 65537"),
    ({"backing_file_offset": 2**63}, "backing file name is said to be at offset"),
    ({"backing_file_size": 1024}, "backing file name is 1024 bytes long, more than 1023"),
    ({"backing_file_size": 0xFFFFFFFF}, "backing file name is 4294967295 bytes long"),
    ({"refcount_order": 7}, "refcount_order is 7, not 0 to 6"),
    ({"refcount_order": 0xFFFFFFFF}, "refcount_order is 4294967295, not 0 to 6"),
    ({"incompatible_features": 1 << 5}, "not known here: bit 5$"),
    ({"incompatible_features": 1 << 63 | 1 << 7 | 1}, "not known here: bit 7, bit 63$"),
    ({"incompatible_features": 1 << 3}, "compression type 0 contradicts its feature bit"),
    ({"incompatible_features": 1 << 4, "cluster_bits": 13}, "extended L2 entries need clusters"),
    ({"compression_type": 1}, "compression type 1 contradicts its feature bit"),
    ({"compression_type": 2}, "compression type 2 is not supported"),
    (
        {"compression_type": 255, "incompatible_features": 1 << 3},
        "compression type 255 is not supported",
    ),
    ({"autoclear_features": 2}, "external data file is raw, but has none"),
    (
        {"autoclear_features": 2, "incompatible_features": 4, "backing_file_offset": 4096},
        "external data file is raw, but has a backing file",
    ),
    ({"refcount_table_clusters": 0}, "has no refcount table"),
    ({"refcount_table_clusters": 129}, "refcount table is too large: 8454144 bytes"),
    ({"refcount_table_clusters": 0xFFFFFFFF}, "refcount table is too large"),
    ({"refcount_table_offset": 64 * K + 8}, "refcount table is at offset 65544, within a cluster"),
    ({"refcount_table_offset": 2**64 - 64 * K}, "cut short: the refcount table is at bytes"),
    ({"l1_size": 1}, "L1 table is too small: 1 entries"),
    ({"l1_size": 0}, "L1 table is too small: 0 entries"),
    ({"l1_size": (4 << 20) + 1}, "L1 table is too large: 33554440 bytes, at most 33554432"),
    ({"l1_size": 0xFFFFFFFF}, "L1 table is too large"),
    ({"l1_table_offset": 3 * 64 * K + 512}, "L1 table is at offset 197120, within a cluster"),
    ({"l1_table_offset": 2**63}, "cut short: the L1 table"),
    ({"size": 1 << 60}, "virtual size of 1152921504606846976 bytes is too large for clusters"),
    ({"size": (2 << 50) + 1}, "virtual size of 2251799813685249 bytes is too large for clusters"),
    ({"size": 2 << 50}, "L1 table is too small: 2 entries, .* needs 4194304"),
    ({"size": 2**64 - 1}, "is too large for clusters of 65536"),
    ({"size": (1 << 30) + 1}, "L1 table is too small: 2 entries, .* needs 3"),
    ({"nb_snapshots": 65537}, "snapshot table is too large"),
    ({"nb_snapshots": 1, "snapshots_offset": 64 * K + 1}, "snapshot table is at offset 65537"),
    ({"crypt_method": 2}, "encryption method 2 contradicts the encryption header extension"),
]
# What QEMU opens all the same (it would read zeroes, or stop at the first write).
STRICTER = [
    ({"header_length": 113}, "header says it is 113 bytes long, not a multiple of 8"),
    ({"backing_file_offset": 111}, "backing file name is said to be at offset 111"),
    ({"refcount_table_offset": 0}, "refcount table at offset 0 overlaps the header"),
    ({"l1_table_offset": 0}, "overlaps the (header|L1 table)"),
    ({"l1_table_offset": 64 * K}, "table at offset 65536 overlaps the (L1|refcount) table"),
    ({"l1_size": 3}, "cut short: the L1 table is at bytes 196608 to 196632, but the file has only"),
    ({"l1_table_offset": 4 * 64 * K}, "cut short: the L1 table"),
    ({"nb_snapshots": 1, "snapshots_offset": 0}, "overlaps the (header|snapshot table)"),
    ({"snapshots_offset": 1}, "snapshot table is at offset 1, within a cluster"),
]


@pytest.mark.parametrize(("fields", "reason"), MALFORMED + STRICTER)
def test_malformed(image, fields, reason):
    with pytest.raises(ImageError, match=rf"^disk.img: .*({reason})"):
        parse(patched(image, **fields))


@pytest.mark.peer("qemu-io")
@pytest.mark.parametrize("fields", [fields for fields, _ in MALFORMED])
def test_qemu_refuses_that_too(image, fields, tmp_path):
    (tmp_path / "base.raw").write_bytes(bytes(512))
    path = tmp_path / "disk.img"
    command = ("qemu-io", "-r", "-f", "qcow2", "-c", "quit", path)
    path.write_bytes(image)
    assert peers.run(*command, check=False).returncode == 0
    path.write_bytes(patched(image, **fields))
    assert peers.run(*command, check=False).returncode != 0


@pytest.mark.parametrize("raw", [b"", b"QFI", b"\0" * 4096, b"QFI\xfa" + bytes(4096), b"#!/bin/sh"])
def test_other_files(raw):
    with pytest.raises(ImageError, match=r"^disk.img: not a qcow2 image$"):
        parse(raw)


@pytest.mark.parametrize("version", ["image", "image_v2"])
def test_files_cut_short_anywhere(version, request):
    raw = request.getfixturevalue(version)
    for length in [*range(4, 200), 512, 64 * K - 1, 64 * K, 128 * K - 1, 192 * K, len(raw) - 1]:
        with pytest.raises(ImageError, match=r"^disk.img: cut short: "):
            parse(raw[:length])
    assert parse(raw)


def test_unknown_features_have_the_names_the_image_gives_them(image):
    # Renames "extended L2 entries", bit 4, to be the name of bit 6.
    raw = image.replace(b"\x00\x04extended L2", b"\x00\x06quantum  L2")
    with pytest.raises(ImageError, match=r"not known here: bit 5, quantum  L2 entries$"):
        parse(patched(raw, incompatible_features=0b1100000))
    assert parse(raw).feature_names[FeatureType.INCOMPATIBLE, 6] == "quantum  L2 entries"


def test_tables_that_overlap(image):
    # Two refcount table clusters reach into the L1 table, if that is there.
    raw = patched(image, refcount_table_clusters=2, l1_table_offset=2 * 64 * K)
    with pytest.raises(ImageError, match="L1 table at offset 131072 overlaps the refcount table"):
        parse(raw)


def test_encryption_headers(image):
    raw = patched(image, crypt_method=2, backing_file_offset=0)
    pointer = bytes.fromhex("0537be77 00000010 0000000000040000 0000000000000250")
    luks = raw[:112] + pointer + bytes(8) + raw[112 + len(pointer) + 8 :]
    assert parse(luks).crypt_method == 2
    with pytest.raises(ImageError, match="encryption method 1 contradicts"):
        parse(patched(luks, crypt_method=1))
    with pytest.raises(ImageError, match="encryption header is at offset 262145, within"):
        parse(luks.replace(pointer, pointer[:15] + b"\x01" + pointer[16:]))


# --- Hostile bytes -------------------------------------------------------------------------------


def usable(header, file_size):
    """What callers rely on without looking again."""
    cluster_size = header.cluster_size
    tables = [
        (header.refcount_table_offset, header.refcount_table_clusters * cluster_size, 8 << 20),
        (header.l1_table_offset, header.l1_size * 8, 32 << 20),
        (header.snapshots_offset, header.nb_snapshots * 40, 40 * 65536),
    ]
    entry_size = 16 if header.incompatible_features & IncompatibleFeature.EXTENDED_L2 else 8
    return (
        512 <= cluster_size <= 2 << 20
        and all(
            offset % cluster_size == 0 and length <= limit
            and (length == 0 or cluster_size <= offset <= file_size - length)
            for offset, length, limit in tables
        )
        and header.size <= header.l1_size * (cluster_size // entry_size) * cluster_size
        and header.refcount_bits in (1, 2, 4, 8, 16, 32, 64)
        and header.incompatible_features < 1 << 5
        and len(header.backing_file or "") <= 1023
        and len(header.backing_format or "") <= 15
    )  # fmt: skip


def is_header_or_image_error(raw, file_size):
    try:
        header = parse(raw, file_size)
    except ImageError as error:
        said = str(error)
    else:
        assert usable(header, file_size)
        return
    assert said.startswith("disk.img: ")
    assert "\n" not in said


# Mostly large enough, so that the other checks are reached.
SIZES = st.sampled_from([1 << 40, 196624, 2**63 - 1]) | st.integers(0, 1 << 20)
FIELDS = st.sampled_from(sorted(spec.HEADER_OFFSETS.keys() - {"magic", "version"}))
VALUES = st.sampled_from([0, 1, 2, 8, 9, 16, 21, 72, 104, 112, 512, 65536, 196608, 2**32 - 1]) | (
    st.integers(0, 2**32 - 1)
)


@given(st.dictionaries(FIELDS, VALUES, max_size=5), SIZES)
def test_any_fields(image, fields, file_size):
    is_header_or_image_error(patched(image, **fields), file_size)


@given(st.dictionaries(st.integers(4, 0x240), st.integers(0, 255), max_size=12), SIZES)
def test_any_changed_bytes(image, changes, file_size):
    raw = bytearray(image)
    for position, value in changes.items():
        raw[position] = value
    is_header_or_image_error(bytes(raw), file_size)


@given(
    st.sampled_from([2, 3]),
    st.integers(8, 12),
    st.binary(min_size=48, max_size=400),
    SIZES,
)
def test_any_bytes_after_the_version(version, cluster_bits, raw, file_size):
    header = spec.MAGIC + version.to_bytes(4, "big") + raw[:12] + cluster_bits.to_bytes(4, "big")
    is_header_or_image_error((header + raw[12:]).ljust(4096, b"\0"), file_size)


@given(st.binary(max_size=200))
def test_any_bytes(raw):
    is_header_or_image_error(raw, len(raw))
    is_header_or_image_error(spec.MAGIC + raw, len(raw) + 4)


def test_how_much_is_wanted(image):
    assert header_bytes_wanted(image[:104]) == 64 * K
    assert header_bytes_wanted(patched(image, cluster_bits=9)[:104]) == 512
    assert header_bytes_wanted(patched(image, cluster_bits=21)[:104]) == 2 << 20
    for cluster_bits in (0, 8, 22, 2**32 - 1):
        assert header_bytes_wanted(patched(image, cluster_bits=cluster_bits)[:104]) == 112
    assert header_bytes_wanted(b"") == 112


# --- What is written -----------------------------------------------------------------------------


def applied(image, update):
    return image[: update.offset] + update.data + image[update.offset + len(update.data) :]


def test_refcount_table_update(image):
    update = refcount_table_update(2 * 64 * K, 1)
    before, after = parse(image), parse(applied(image, update))
    assert after == dataclasses.replace(before, refcount_table_offset=2 * 64 * K)
    assert update == HeaderUpdate(48, bytes.fromhex("0000000000020000 00000001"))


def test_incompatible_features_update(image):
    update = incompatible_features_update(parse(image), IncompatibleFeature.CORRUPT)
    before, after = parse(image), parse(applied(image, update))
    assert after == dataclasses.replace(before, incompatible_features=IncompatibleFeature.CORRUPT)


def test_autoclear_update(image):
    assert autoclear_update(parse(image)) is None
    raw = patched(image, autoclear_features=1 << 63 | AutoclearFeature.BITMAPS)
    assert parse(applied(raw, autoclear_update(parse(raw)))) == parse(image)


def test_version_2_has_no_features_to_update(image_v2):
    header = parse(image_v2)
    assert autoclear_update(header) is None
    with pytest.raises(AssertionError, match="version 2 has no incompatible_features"):
        incompatible_features_update(header, IncompatibleFeature.CORRUPT)


@pytest.mark.peer("qemu-img")
def test_qemu_reads_the_corrupt_bit(image, tmp_path):
    path = tmp_path / "disk.img"
    raw = patched(image, backing_file_offset=0, autoclear_features=1 << 9)
    raw = applied(raw, autoclear_update(parse(raw)))
    raw = applied(raw, incompatible_features_update(parse(raw), IncompatibleFeature.CORRUPT))
    path.write_bytes(raw)
    said = json.loads(peers.qemu_img("info", "-f", "qcow2", "--output=json", path))
    assert said["format-specific"]["data"]["corrupt"] is True


# --- Images of QEMU's making ---------------------------------------------------------------------


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize(
    ("compat", "refcount_bits", "compression_type"),
    [("0.10", 16, "zlib"), *(("1.1", 1 << n, "zlib") for n in range(7)), ("1.1", 16, "zstd")],
)
def test_what_qemu_img_creates(tmp_path, compat, cluster_size, refcount_bits, compression_type):
    path = tmp_path / "disk.img"
    options = f"compat={compat},cluster_size={cluster_size},refcount_bits={refcount_bits}"
    peers.qemu_img(
        "create", "-q", "-f", "qcow2", "-o", f"{options},compression_type={compression_type}",
        "-u", "-b", "bäse.raw", "-F", "raw", path, "100M",
    )  # fmt: skip
    header = parse(path.read_bytes())
    assert header.version == (2 if compat == "0.10" else 3)
    assert header.size == 100 << 20
    assert header.cluster_size == cluster_size
    assert header.refcount_bits == refcount_bits
    assert header.compression_type == compression_type
    assert (header.backing_file, header.backing_format) == ("bäse.raw", "raw")
    assert header.l1_size == -(-(100 << 20) // (cluster_size * cluster_size // 8))
    names = spec.FEATURE_NAMES if compat == "1.1" and cluster_size > 4096 else {}
    assert header.feature_names == names


@pytest.mark.peer("qemu-img")
def test_an_image_with_every_kind_of_extension(tmp_path):
    path = tmp_path / "disk.img"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "100M")
    peers.qemu_img("bitmap", "--add", path, "one")
    peers.qemu_img("bitmap", "--add", "--disable", path, "two")
    peers.qemu_img("snapshot", "-c", "first", path)
    header = parse(path.read_bytes())
    assert header.bitmaps.nb_bitmaps == 2
    assert header.nb_snapshots == 1
    assert header.compatible_features == 1


@pytest.mark.peer("qemu-img")
def test_an_image_with_a_data_file(tmp_path):
    path, data_file = tmp_path / "disk.img", tmp_path / "data"
    options = f"data_file={data_file},data_file_raw=on"
    peers.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    header = parse(path.read_bytes())
    assert header.data_file == str(data_file)
    assert header.incompatible_features == IncompatibleFeature.DATA_FILE
    assert header.autoclear_features == AutoclearFeature.RAW_DATA
    assert header.has_data_file
    assert header.data_file_is_raw
    assert autoclear_update(header) is None

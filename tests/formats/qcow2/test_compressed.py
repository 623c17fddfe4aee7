"""Compressed clusters: located as QEMU locates them, and never more than one cluster of data."""

import contextlib
import errno
import json
import random
import re
import struct
import sys
import threading
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import peers
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.compressed import Decompressor, compressed_extent
from nbdserve.formats.qcow2.header import parse_header

CLUSTER_SIZE = 65536
DATA = (b"some of it repeats, some of it does not: " + random.Random(1).randbytes(100)) * 1000
CLUSTER = DATA[:CLUSTER_SIZE]


def deflate(data, window_bits=12):
    """Raw deflate, with QEMU's window unless told otherwise."""
    stream = zlib.compressobj(-1, zlib.DEFLATED, -window_bits, 9)
    return stream.compress(data) + stream.flush()


def zstd(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


COMPRESS = {"zlib": deflate, "zstd": zstd}


@pytest.fixture(params=["zlib", "zstd"])
def compression(request):
    return request.param


@pytest.fixture
def decompress(compression):
    return Decompressor("disk.img", compression, CLUSTER_SIZE)


# --- Where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "cluster_bits", "extent"),
    [
        # 64 KiB clusters: 54 bits of offset, 8 bits of additional sectors.
        (1 << 62 | 0x50000, 16, (0x50000, 512)),
        (1 << 62 | 3 << 54 | 0x50000, 16, (0x50000, 4 * 512)),
        (1 << 62 | 3 << 54 | 0x50001, 16, (0x50001, 4 * 512 - 1)),
        (1 << 62 | 255 << 54 | 0x501FF, 16, (0x501FF, 256 * 512 - 511)),
        # 512 bytes: 61 bits and 1. 2 MiB: 49 bits and 13.
        (1 << 62 | 1 << 61 | 0x600, 9, (0x600, 1024)),
        (1 << 62 | (1 << 61) - 1, 9, ((1 << 61) - 1, 1)),
        (1 << 62 | 8191 << 49 | (1 << 49) - 512, 21, ((1 << 49) - 512, 8192 * 512)),
    ],
)
def test_extent(entry, cluster_bits, extent):
    assert compressed_extent(entry, cluster_bits) == extent
    assert compressed_extent(entry & ~spec.COMPRESSED, cluster_bits) == extent


@given(st.integers(0, 2**64 - 1), st.integers(spec.MIN_CLUSTER_BITS, spec.MAX_CLUSTER_BITS))
def test_an_extent_is_never_empty_and_never_beyond_two_clusters(entry, cluster_bits):
    offset, nb_bytes = compressed_extent(entry, cluster_bits)
    assert 0 <= offset < 1 << 61
    assert 1 <= nb_bytes <= 2 << cluster_bits
    assert (offset + nb_bytes) % 512 == 0


# --- What ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [b"", bytes(511), b"\xff" * 512, b"\x28\xb5\x2f\xfd junk"])
@pytest.mark.parametrize(
    "cluster", [CLUSTER, bytes(CLUSTER_SIZE), random.Random(2).randbytes(CLUSTER_SIZE)]
)
def test_what_follows_the_stream_is_ignored(compression, decompress, cluster, padding):
    data = COMPRESS[compression](cluster) + padding
    assert decompress(data, 0) == cluster
    assert decompress(memoryview(bytearray(data)), 0) == cluster


@pytest.mark.parametrize("window_bits", [9, 12, 15])
def test_any_deflate_window(window_bits):
    cluster = random.Random(3).randbytes(16384) * 4  # only the largest window sees it repeat
    data = deflate(cluster, window_bits)
    assert Decompressor("disk.img", "zlib", CLUSTER_SIZE)(data, 0) == cluster


@pytest.mark.parametrize("level", [1, 3, 19])
def test_zstd_streams_that_do_not_say_how_long_they_are(level):
    stream = zstandard.ZstdCompressor(level=level).compressobj()
    data = stream.compress(CLUSTER) + stream.flush()
    assert zstandard.get_frame_parameters(data).content_size == zstandard.CONTENTSIZE_UNKNOWN
    assert Decompressor("disk.img", "zstd", CLUSTER_SIZE)(data + bytes(100), 0) == CLUSTER


def test_a_cluster_of_several_zstd_frames():
    parts = (CLUSTER[:1000], b"", CLUSTER[1000:40000], CLUSTER[40000:])
    data = b"".join(zstd(part, write_checksum=True) for part in parts)
    assert Decompressor("disk.img", "zstd", CLUSTER_SIZE)(data + bytes(512), 0) == CLUSTER


def test_decompression_stops_when_the_cluster_is_full(compression, decompress):
    assert decompress(COMPRESS[compression](DATA), 0) == CLUSTER


@pytest.mark.parametrize("kept", [0, 1, 2, 100, -100])
def test_streams_cut_short(compression, decompress, kept):
    data = COMPRESS[compression](random.Random(4).randbytes(CLUSTER_SIZE))[:kept]
    said = f"disk.img: cannot decompress the {compression} cluster at guest offset 0x70000: "
    with pytest.raises(CorruptImage, match=f"^{re.escape(said)}"):
        decompress(data, 0x70000)


@pytest.mark.parametrize("padding", [b"", bytes(512)])
def test_streams_that_hold_less_than_a_cluster(compression, decompress, padding):
    with pytest.raises(CorruptImage):
        decompress(COMPRESS[compression](CLUSTER[:-1]) + padding, 0)


def test_garbage(decompress):
    with pytest.raises(CorruptImage, match=r"^disk.img: cannot decompress"):
        decompress(b"\xff" * 4096, 0)


def test_zstd_checksums_are_verified():
    data = bytearray(zstd(CLUSTER, write_checksum=True))
    data[-1] ^= 1
    with pytest.raises(CorruptImage, match="checksum"):
        Decompressor("disk.img", "zstd", CLUSTER_SIZE)(data, 0)


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_bytes(raw, kept):
    for compression, compress in COMPRESS.items():
        decompress = Decompressor("disk.img", compression, 4096)
        with contextlib.suppress(CorruptImage):
            assert len(decompress(compress(CLUSTER[:4096])[:kept] + raw, 0)) == 4096


def peak_memory(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_yields_one_cluster(compression, decompress):
    bomb = COMPRESS[compression](bytes(32 << 20))
    assert len(decompress(bomb, 0)) == CLUSTER_SIZE
    assert peak_memory(lambda: decompress(bomb, 0)) < 4 * CLUSTER_SIZE + len(bomb)


def test_a_zstd_frame_that_demands_a_huge_window_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = stream.compress(CLUSTER) + stream.flush()
    with pytest.raises(CorruptImage, match="requires too much memory"):
        Decompressor("disk.img", "zstd", CLUSTER_SIZE)(data, 0)


def test_a_zstd_frame_that_lies_about_its_length():
    # A single segment's header: magic, descriptor, content size of 8 bytes; its window is as large.
    header = b"\x28\xb5\x2f\xfd" + b"\xe0" + (1 << 60).to_bytes(8, "little")
    with pytest.raises(CorruptImage):
        Decompressor("disk.img", "zstd", CLUSTER_SIZE)(header + bytes(512), 0)


def test_several_threads_at_once(compression, decompress):
    clusters = [random.Random(seed).randbytes(1024) * 64 for seed in range(4)]
    wrong = []

    def work(cluster):
        data = COMPRESS[compression](cluster)
        for _ in range(50):
            if decompress(data, 0) != cluster:
                wrong.append(cluster)

    threads = [threading.Thread(target=work, args=(cluster,)) for cluster in clusters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- Clusters of QEMU's making -------------------------------------------------------------------


def l2_entries(raw, header):
    """(guest offset, entry) of all that are not zero."""
    nb_entries = header.cluster_size // 8
    l1_table = struct.unpack_from(f">{header.l1_size}Q", raw, header.l1_table_offset)
    for l1_index, l1_entry in enumerate(l1_table):
        if table_offset := l1_entry & spec.OFFSET_MASK:
            l2_table = struct.unpack_from(f">{nb_entries}Q", raw, table_offset)
            for index, entry in enumerate(l2_table):
                if entry:
                    yield (l1_index * nb_entries + index) * header.cluster_size, entry


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_what_qemu_img_compresses(tmp_path, compression, cluster_size):
    source = tmp_path / "source"
    size = 4 << 20 if cluster_size > 512 else 1 << 18
    plain = (json.dumps([n * n for n in range(400000)]).encode() + bytes(size))[:size]
    source.write_bytes(plain)
    path = tmp_path / "image"
    options = f"cluster_size={cluster_size},compression_type={compression}"
    peers.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, path)
    raw = path.read_bytes()
    header = parse_header(raw, "image", len(raw))
    assert header.compression_type == compression
    decompress = Decompressor("image", header.compression_type, cluster_size)
    nb_compressed = 0
    for guest_offset, entry in l2_entries(raw, header):
        if entry & spec.COMPRESSED:
            nb_compressed += 1
            offset, nb_bytes = compressed_extent(entry, header.cluster_bits)
            cluster = decompress(raw[offset : offset + nb_bytes], guest_offset)
            assert cluster == plain[guest_offset : guest_offset + cluster_size]
    assert nb_compressed == -(-len(plain.rstrip(b"\0")) // cluster_size)


def test_without_isal_it_is_pythons_own_zlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "isal", None)
    decompress = Decompressor("disk.qcow2", "zlib", CLUSTER_SIZE)
    assert decompress(deflate(DATA) + b"what follows", 0) == CLUSTER
    with pytest.raises(CorruptImage, match="cannot decompress the zlib cluster"):
        decompress(b"\xff" * 100, 0)


def test_without_zstandard_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(OSError, match="python3-zstandard") as raised:
        Decompressor("disk.qcow2", "zstd", CLUSTER_SIZE)
    assert raised.value.errno == errno.ENOTSUP

"""New images are what qemu-img makes, and nothing is destroyed for one that cannot be."""

import errno
import json
import os

import pytest

import peers
from nbdserve.block.units import align_up
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.create import create_image
from nbdserve.formats.qcow2.header import parse_header

K, M, G, T = (1 << 10 * n for n in range(1, 5))


def parse(path):
    raw = path.read_bytes()
    return parse_header(raw, str(path), len(raw))


def qemu_options(options):
    """qemu-img's spelling of `create_image`'s options."""
    compat = {2: "0.10", 3: "1.1"}[options.get("version", 3)]
    words = [f"compat={compat}"]
    words += [
        f"{name}={'on' if value is True else value}"
        for name, value in options.items()
        if name not in ("version", "backing_file", "backing_format")
    ]
    arguments = ["-o", ",".join(words)]
    if "backing_file" in options:
        arguments += ["-b", options["backing_file"], "-F", options["backing_format"]]
    return arguments


OPTIONS = [
    {},
    {"version": 2},
    *({"refcount_bits": bits} for bits in (1, 2, 4, 8, 16, 32, 64)),
    {"compression_type": "zlib", "lazy_refcounts": True},
    {"compression_type": "zstd", "refcount_bits": 64},
    {"backing_file": "back.raw", "backing_format": "raw"},
    {"backing_file": "x/../back.qcow2", "backing_format": "qcow2", "version": 2},
    {"data_file": "data"},
    {"data_file": "data", "data_file_raw": True, "compression_type": "zstd"},
    {"data_file": "data", "backing_file": "back.raw", "backing_format": "raw"},
]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("cluster_size", [512, 4 * K, 8 * K, 64 * K, 2 * M])
@pytest.mark.parametrize("options", OPTIONS)
def test_same_bytes_as_qemu_img(tmp_path, monkeypatch, options, cluster_size):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "back.raw").touch()
    (tmp_path / "x").mkdir()
    create_image("back.qcow2", 0)
    options = options | {"cluster_size": cluster_size}
    # Up to sizes for which one refcount block is enough.
    data = tmp_path / "data"
    for size in (0, 513, cluster_size * cluster_size // 8 + 1):
        peers.qemu_img("create", "-q", "-f", "qcow2", *qemu_options(options), "qemu", str(size))
        if data.exists():
            data.write_bytes(b"old")
        create_image("ours", size, **options)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "qemu").read_bytes()
        if "data_file" in options:
            assert data.stat().st_size == align_up(size, 512)
            assert data.stat().st_blocks == 0


LARGE = [
    (64 * K, 16, 16 * T),
    (512, 16, 128 * G),
    (512, 64, 128 * G),
    (512, 1, 128 * G),
    (4 * K, 64, T),
    (2 * M, 64, 2 << 60),
    (64 * K, 2, 2 << 50),
]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(("cluster_size", "refcount_bits", "size"), LARGE)
def test_large_images_count_all_their_metadata(tmp_path, cluster_size, refcount_bits, size):
    path = tmp_path / "large"
    create_image(str(path), size, cluster_size=cluster_size, refcount_bits=refcount_bits)
    peers.qemu_img_check(path)
    said = json.loads(peers.qemu_img("info", "--output=json", path))
    assert said["virtual-size"] == size
    assert said["cluster-size"] == cluster_size
    assert said["format-specific"]["data"]["refcount-bits"] == refcount_bits


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("refcount_bits", [1, 16, 64])
def test_qemu_writes_to_it(tmp_path, refcount_bits):
    path = tmp_path / "image"
    create_image(str(path), 100 * M, cluster_size=512, refcount_bits=refcount_bits)
    peers.qemu_io(path, "write -P 0x5a 0 1M", "write -P 0xa5 99M 1M", "read -P 0x5a 0 1M")
    peers.qemu_img_check(path)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("size", [0, G, 5 * G])
def test_refcounts_are_1_up_to_the_end_of_the_file_and_0_behind(tmp_path, size, refcount_bits):
    path = tmp_path / "image"
    create_image(str(path), size, cluster_size=512, refcount_bits=refcount_bits)
    raw = path.read_bytes()
    header = parse(path)
    table_end = header.refcount_table_offset + header.refcount_table_clusters * 512
    table = raw[header.refcount_table_offset : table_end]
    offsets = [int.from_bytes(table[at : at + 8], "big") for at in range(0, len(table), 8)]
    blocks = b"".join(raw[offset : offset + 512] for offset in offsets if offset)
    if refcount_bits < 8:
        mask = (1 << refcount_bits) - 1
        counts = [byte >> at & mask for byte in blocks for at in range(0, 8, refcount_bits)]
    else:
        width = refcount_bits // 8
        starts = range(0, len(blocks), width)
        counts = [int.from_bytes(blocks[at : at + width], "big") for at in starts]
    nb_clusters = -(-len(raw) // 512)
    assert counts[:nb_clusters] == [1] * nb_clusters
    assert not any(counts[nb_clusters:])


def test_a_data_file_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipe").mkdir()
    for name, reason in (("pipe", "Is a directory"), ("no/data", "No such file"),
                         ("/dev/null", "not a regular file")):
        with pytest.raises(ImageError, match=f"^{name}: cannot create: {reason}"):
            create_image("image", M, data_file=name)
        assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("existed", [False, True])
def test_an_image_that_cannot_be_made_leaves_no_data_file(tmp_path, existed):
    data = tmp_path / "data"
    if existed:
        data.touch()
    with pytest.raises(ImageError, match="cannot create"):
        create_image(str(tmp_path / "no" / "image"), M, data_file=str(data))
    assert data.exists() is existed


@pytest.mark.peer("qemu-img", "qemu-io")
def test_every_cluster_of_a_raw_data_file_is_mapped(tmp_path):
    path, data = tmp_path / "image", tmp_path / "data"
    size = 3 * M + 512  # 97 L2 tables, the last for a single, partial cluster
    create_image(str(path), size, cluster_size=512, data_file=str(data), data_file_raw=True)
    [extent] = json.loads(peers.qemu_img("map", "--output=json", path))
    assert (extent["length"], extent["data"], extent["offset"]) == (size, True, 0)
    peers.qemu_io(path, "write -P 1 1M 1M", f"write -P 2 {size - 10} 10")
    peers.qemu_img_check(path)
    assert data.read_bytes() == bytes(M) + b"\1" * M + bytes(M + 502) + b"\2" * 10


REFUSED = [
    ({"size": -1}, "size: -1 is negative"),
    ({"size": 128 * G + 1, "cluster_size": 512}, "size: .* too large for cluster_size=512"),
    ({"size": (2 << 50) + 1}, "size: .* too large for cluster_size=65536, which reaches to"),
    ({"size": 2**63 - 1, "cluster_size": 2 * M}, "size: .* too large"),
    ({"size": 10**4000}, "size: .* too large"),
    ({"cluster_size": 0}, "cluster_size: 0 is not a power of two from 512 to 2M"),
    ({"cluster_size": 256}, "cluster_size: 256 is not"),
    ({"cluster_size": 1000}, "cluster_size: 1000 is not"),
    ({"cluster_size": 4 * M}, "cluster_size: 4194304 is not"),
    ({"version": 1}, "compat: there is no qcow2 version 1"),
    ({"version": 4}, "compat: there is no qcow2 version 4"),
    ({"refcount_bits": 0}, "refcount_bits: 0 is not"),
    ({"refcount_bits": 3}, "refcount_bits: 3 is not"),
    ({"refcount_bits": 128}, "refcount_bits: 128 is not"),
    ({"refcount_bits": 8, "version": 2}, "refcount_bits: 8 needs version 3"),
    ({"compression_type": "lz4"}, "compression_type: 'lz4' is neither zlib nor zstd"),
    ({"compression_type": "zstd", "version": 2}, "compression_type: zstd needs version 3"),
    ({"lazy_refcounts": True, "version": 2}, "lazy_refcounts: needs version 3"),
    ({"backing_format": "raw"}, "backing_format: needs a backing file"),
    ({"data_file": "data", "version": 2}, "data_file: needs version 3"),
    ({"data_file": ""}, "data_file: '' is empty"),
    ({"data_file": "d" * 1024}, "data_file: the name is 1024 bytes long, at most 1023"),
    ({"data_file": "d" * 500, "cluster_size": 512}, "data_file: the name is 500 bytes long, too"),
    ({"data_file_raw": True}, "data_file_raw: needs a data file"),
    (
        {"data_file": "d", "data_file_raw": True, "backing_file": "b", "backing_format": "raw"},
        "data_file_raw: cannot be used with a backing file",
    ),
    ({"backing_file": "base"}, "backing_file: the format of the backing file must be given"),
    ({"backing_file": "", "backing_format": "raw"}, "backing_file: '' is empty"),
    ({"backing_file": "a\0b", "backing_format": "raw"}, "backing_file: .* NUL byte"),
    ({"backing_file": "\ud800", "backing_format": "raw"}, "backing_file: .* not valid Unicode"),
    ({"backing_file": "n" * 1024, "backing_format": "raw"}, "backing_file: the name is 1024 bytes"),
    (
        {"backing_file": "n" * 377, "backing_format": "raw", "cluster_size": 512},
        "backing_file: the name is 377 bytes long, but 376 are left in a header cluster of 512",
    ),
    ({"backing_file": "base", "backing_format": "f" * 16}, "backing_format: the name is 16 bytes"),
    ({"backing_file": "image", "backing_format": "raw"}, "backing_file: 'image' is the image"),
    ({"backing_file": "./link", "backing_format": "raw"}, "backing_file: './link' is the image"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_a_refused_image_leaves_the_file_as_it_was(tmp_path, options, reason):
    path = tmp_path / "image"
    path.write_bytes(b"precious")
    (tmp_path / "link").symlink_to("image")
    with pytest.raises(ConfigError, match=f"^{reason}"):
        create_image(str(path), **({"size": M} | options))
    assert path.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["image", "link"]


def test_the_largest_sizes_are_not_refused(tmp_path):
    path = tmp_path / "image"
    create_image(str(path), 128 * G, cluster_size=512)
    assert parse(path).l1_size * 8 == spec.MAX_L1_BYTES


@pytest.mark.parametrize(("length", "cluster_size"), [(376, 512), (1023, 4 * K)])
def test_the_longest_backing_file_names(tmp_path, length, cluster_size):
    path, name = tmp_path / "image", "n" * length
    create_image(
        str(path), M, backing_file=name, backing_format="raw", cluster_size=cluster_size
    )
    assert parse(path).backing_file == name


def test_backing_file_names_are_bytes(tmp_path):
    path = tmp_path / "image"
    create_image(str(path), M, backing_file="b\udcffse-ü", backing_format="raw")
    assert "b\udcffse-ü".encode("utf-8", "surrogateescape") in path.read_bytes()
    assert parse(path).backing_file == "b\udcffse-ü"


def test_a_backing_file_need_not_be_a_path(tmp_path):
    path = tmp_path / "image"
    create_image(str(path), M, backing_file="nbd://localhost/x", backing_format="raw")
    assert parse(path).backing_file == "nbd://localhost/x"


def test_an_old_image_is_overwritten_through_its_links(tmp_path):
    path, link = tmp_path / "image", tmp_path / "link"
    path.write_bytes(b"\xff" * M)
    path.chmod(0o600)
    link.symlink_to("image")
    before = path.stat()
    create_image(str(link), 0)
    after = path.stat()
    assert link.is_symlink()
    assert (after.st_ino, after.st_mode, after.st_size) == (
        before.st_ino, before.st_mode, 3 * 64 * K
    )  # fmt: skip
    assert b"\xff" not in path.read_bytes().replace(spec.MAGIC, b"")


def test_errors_of_the_system_name_the_file(tmp_path):
    path = str(tmp_path / "no" / "image")
    with pytest.raises(ImageError, match=f"^{path}: cannot create: No such file") as raised:
        create_image(path, M)
    assert raised.value.errno == errno.ENOENT


def full_after(calls, monkeypatch):
    """The disk is full at the n-th write."""
    pwrite = os.pwrite
    left = iter(range(calls))

    def limited(fd, data, offset):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)


@pytest.mark.parametrize("calls", range(5))
@pytest.mark.parametrize("existed", [False, True])
def test_what_a_full_disk_leaves(tmp_path, monkeypatch, calls, existed):
    path = tmp_path / "image"
    if existed:
        create_image(str(path), G)
    full_after(calls, monkeypatch)
    with pytest.raises(ImageError, match="cannot create: No space left on device"):
        create_image(str(path), 2 * G)
    assert path.exists() == existed
    if existed:
        assert not path.read_bytes().startswith(spec.MAGIC)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    create_image(str(tmp_path / "whole"), 64 * G)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5000], offset))
    create_image(str(tmp_path / "pieces"), 64 * G)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_header_is_written_last_behind_a_flush(tmp_path, monkeypatch):
    calls = []
    pwrite, fsync = os.pwrite, os.fsync

    def record_pwrite(fd, data, offset):
        calls.append("header" if bytes(data[:4]) == spec.MAGIC else "write")
        return pwrite(fd, data, offset)

    def record_fsync(fd):
        calls.append("fsync")
        fsync(fd)

    monkeypatch.setattr(os, "pwrite", record_pwrite)
    monkeypatch.setattr(os, "fsync", record_fsync)
    create_image(str(tmp_path / "image"), G)
    assert calls[-3:] == ["fsync", "header", "fsync"]
    assert set(calls[:-3]) == {"write"}

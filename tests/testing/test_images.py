"""Images for tests are what was asked for, by QEMU's judgement and by ours."""

import json

import pytest

import peers
from nbdserve.errors import ConfigError, ImageError
from nbdserve.powercut.content import Content
from nbdserve.testing import fill, make_image, offsets, random, read_image, zeroes
from nbdserve.testing.images import InMemory, NewDisk, free_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk.qcow2"


def info(path):
    return json.loads(peers.qemu_img("info", "--output=json", path))


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_content_is_where_it_was_put(path, format):
    text = b"at an odd place"
    make_image(path, "8M", format=format, content={
        0: offsets("2M"), "3M": random("64k", seed=3), (4 << 20) + 5: text, "6M": fill(70000, 9),
    })  # fmt: skip
    disk = read_image(path, format=format)
    assert len(disk) == 8 << 20
    wanted = bytearray(8 << 20)
    wanted[: 2 << 20] = offsets(0).at(0, 2 << 20)
    wanted[3 << 20 : (3 << 20) + 65536] = random(0, seed=3).at(3 << 20, 65536)
    wanted[(4 << 20) + 5 :][: len(text)] = text
    wanted[(4 << 20) + 5 : (4 << 20) + 5 + len(text)] = text
    wanted[6 << 20 : (6 << 20) + 70000] = b"\x09" * 70000
    assert disk == wanted


@pytest.mark.peer("qemu-img")
def test_qemu_finds_it_clean(path):
    make_image(path, "1G", content={"512M": random("1M")})
    peers.qemu_img_check(path)
    assert info(path)["virtual-size"] == 1 << 30


def test_the_size_is_that_of_the_content(path):
    make_image(path, content={"1M": b"x" * 512})
    assert len(read_image(path)) == (1 << 20) + 512
    make_image(path, content=b"y" * 1024)
    assert read_image(path) == b"y" * 1024


def test_a_chain(path, tmp_path):
    base, middle = tmp_path / "base.raw", tmp_path / "middle.qcow2"
    make_image(base, "1M", format="raw", content={0: fill("128k", 1)})
    make_image(middle, backing=base, backing_format="raw", content={"64k": fill("64k", 2)})
    make_image(path, "2M", backing=middle, content={"96k": zeroes("32k")})
    disk = read_image(path)
    assert [disk[at << 10] for at in (0, 63, 64, 95, 96, 127, 128)] == [1, 1, 2, 2, 0, 0, 0]
    assert len(disk) == 2 << 20
    assert len(read_image(middle)) == 1 << 20


def test_the_backing_file_is_found_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_image("base.qcow2", content=b"x" * 512)
    (tmp_path / "below").mkdir()
    make_image("below/top.qcow2", backing="base.qcow2")
    monkeypatch.chdir("/")
    assert read_image(tmp_path / "below/top.qcow2") == b"x" * 512


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cluster_size": 4096}, {"cluster-size": 4096}),
        ({"version": 2}, {"compat": "0.10"}),
        ({"refcount_bits": 64}, {"refcount-bits": 64}),
        ({"lazy_refcounts": True}, {"lazy-refcounts": True}),
        ({"compression_type": "zstd"}, {"compression-type": "zstd"}),
    ],
)
def test_options_are_those_of_create(path, options, said):
    make_image(path, "4M", content={"1M": offsets("1M")}, **options)
    told = info(path)
    told |= told["format-specific"]["data"]
    assert said.items() <= told.items()
    assert read_image(path)[1 << 20 : 2 << 20] == offsets(0).at(1 << 20, 1 << 20)


def test_a_data_file(path, tmp_path):
    data = tmp_path / "data.raw"
    make_image(path, "1M", content={0: fill("64k", 5)}, data_file=str(data), data_file_raw=True)
    assert data.read_bytes()[:65536] == b"\x05" * 65536


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs a size"),
        ({"size": "1M", "format": "vmdk"}, "'vmdk' is neither qcow2 nor raw"),
        ({"size": "1M", "format": "raw", "cluster_size": 512}, "a raw image has neither"),
        ({"size": "1M", "content": {"1M": b"x"}}, "content: 1 bytes at 1048576 are beyond the end"),
        ({"size": "huge"}, "huge"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_made(path, arguments, said):
    with pytest.raises(ConfigError, match=said):
        make_image(path, **arguments)
    assert not path.exists()


def test_what_is_not_there_cannot_be_read(path):
    with pytest.raises(ImageError, match=r"disk\.qcow2"):
        read_image(path)


def test_the_whole_disk_is_read_though_it_ends_within_a_piece(path):
    make_image(path, (3 << 20) + 512, content={(3 << 20): b"e" * 512})
    assert read_image(path)[-512:] == b"e" * 512


def test_paths_are_given_once(tmp_path):
    (tmp_path / "disk1.raw").touch()
    names = [free_path(tmp_path, "disk", ".raw").name for _ in range(3)]
    assert names == ["disk0.raw", "disk2.raw", "disk3.raw"]


def test_disks_that_a_server_makes(tmp_path):
    made = NewDisk("1M", {0: b"new"}).make(tmp_path, "raw")
    assert made.read_bytes()[:3] == b"new"
    saved = InMemory(Content.of(b"old"), "x").save(tmp_path, "raw")
    assert saved.read_bytes() == b"old"
    assert saved.parent == made.parent == tmp_path

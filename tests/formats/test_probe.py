"""Probing: what is served, what is refused, and that QEMU's own images and judgement agree."""

import json

import pytest

import peers
from nbdserve.errors import ImageError
from nbdserve.formats.probe import (
    PROBE_SIZE,
    RAW_PROBED_WARNING,
    looks_like_format,
    probe_format,
)

# Written out byte by byte rather than taken from the table they test.
VDI = b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + bytes.fromhex("7f10dabe")
BOCHS = (
    b"Bochs Virtual HD Image".ljust(32, b"\0")
    + b"Redolog".ljust(16, b"\0")
    + b"Growing".ljust(16, b"\0")
)
CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"

SIGNED = [
    ("qcow", b"QFI\xfb\0\0\0\x01"),
    ("qcow2", b"QFI\xfb\0\0\0\x02"),
    ("qcow2", b"QFI\xfb\0\0\0\x03"),
    ("qed", b"QED\0"),
    ("vdi", VDI),
    ("vhdx", b"vhdxfile"),
    ("vpc", b"conectix"),
    ("luks", b"LUKS\xba\xbe\0\x01"),
    ("parallels", b"WithoutFreeSpace\x02\0\0\0"),
    ("parallels", b"WithouFreSpacExt\x02\0\0\0"),
    ("bochs", BOCHS + b"\0\0\x01\0"),
    ("bochs", BOCHS + b"\0\0\x02\0"),
    ("vmdk", b"KDMV"),
    ("vmdk", b"COWD"),
    ("vmdk", b"# Disk DescriptorFile\nversion=1\n"),
    ("vmdk", b"version=2\r\n"),
    ("vmdk", b"# a comment\r\n   \r\n \n#\nversion=3\n"),
    ("cloop", CLOOP),
]

RAW = [
    pytest.param(b"", id="empty"),
    pytest.param(b"Q", id="one byte"),
    pytest.param(bytes(PROBE_SIZE), id="zeroes"),
    pytest.param(b"\0QFI\xfb\0\0\0\x03", id="qcow2 magic not at the start"),
    pytest.param(b"QFI\xfa\0\0\0\x03", id="nearly qcow2"),
    pytest.param(b"LUKS\xba\xbe\0\x02", id="LUKS 2"),
    pytest.param(b"WithoutFreeSpace\x03\0\0\0", id="parallels 3"),
    pytest.param(BOCHS + b"\0\0\x03\0", id="bochs 3"),
    pytest.param(b"# comment\nversion=4\n", id="vmdk 4"),
    pytest.param(b"# comment\nversion=1", id="vmdk unfinished line"),
    pytest.param(b"\nversion=1\n", id="vmdk after an empty line"),
    pytest.param(b"# a comment to the end".ljust(PROBE_SIZE, b"#"), id="only a comment"),
    pytest.param(CLOOP[:-1], id="cloop cut off"),
    pytest.param(b"#".ljust(PROBE_SIZE - 1) + b"\nversion=1\n", id="vmdk beyond the first sector"),
]

each_signed = pytest.mark.parametrize(
    ("name", "start"), SIGNED, ids=[f"{n}-{i}" for i, (n, _) in enumerate(SIGNED)]
)


@each_signed
def test_signature(name, start):
    assert looks_like_format(start.ljust(PROBE_SIZE, b"\0")) == name
    assert looks_like_format(start) == name
    assert looks_like_format(start[:-1]) in (None, "qcow2")


@each_signed
def test_only_qcow2_is_taken(name, start):
    if name == "qcow2":
        assert probe_format(start, "a.img") == "qcow2"
        return
    with pytest.raises(ImageError) as caught:
        probe_format(start, "a.img")
    assert str(caught.value) == (
        f"a.img: looks like an image in {name} format, which nbdserve does not serve;"
        " use -f raw to serve its bytes as they are"
    )


@pytest.mark.parametrize("start", RAW)
def test_raw(start):
    assert looks_like_format(start) is None
    assert probe_format(start, "a.img") == "raw"


@pytest.mark.parametrize("version", [0, 4, 2**32 - 1])
def test_an_unknown_qcow2_version_is_for_the_driver_to_refuse(version):
    assert probe_format(b"QFI\xfb" + version.to_bytes(4, "big"), "a.img") == "qcow2"


def test_a_name_ending_in_dmg():
    with pytest.raises(ImageError, match="dmg format"):
        probe_format(bytes(PROBE_SIZE), "/x/disk.dmg")
    assert probe_format(b"QFI\xfb\0\0\0\x03", "/x/disk.dmg") == "qcow2"
    assert probe_format(bytes(PROBE_SIZE), ".dmg") == "raw"
    assert probe_format(b"", "disk.dmg") == "raw"


def test_the_warning_names_the_file_in_one_line():
    warning = RAW_PROBED_WARNING.format(filename="/x/a{0}.img")
    assert warning.startswith("/x/a{0}.img: ")
    assert "-f raw" in warning
    assert "\n" not in warning


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "name", ["qcow", "qcow2", "qed", "vdi", "vhdx", "vpc", "parallels", "vmdk", "raw"]
)
def test_images_made_by_qemu_img(tmp_path, name):
    image = tmp_path / "image"
    peers.qemu_img("create", "-q", "-f", name, image, "8M")
    start = image.read_bytes()[:PROBE_SIZE]
    assert looks_like_format(start) == (None if name == "raw" else name)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("start", [pytest.param(s, id=f"{n}-{i}")
                                   for i, (n, s) in enumerate(SIGNED)] + RAW[1:])
def test_qemu_img_sees_the_same(tmp_path, start):
    """The judgement of QEMU itself: it takes for raw just what has no signature for us."""
    image = tmp_path / "image"
    image.write_bytes(start.ljust(64 * 1024, b"\0"))
    done = peers.run("qemu-img", "info", "--output=json", image, check=False)
    # A lone signature is no valid image, so most of them fail to open: that too says "not raw".
    judged_raw = done.returncode == 0 and json.loads(done.stdout)["format"] == "raw"
    assert judged_raw == (looks_like_format(start) is None)

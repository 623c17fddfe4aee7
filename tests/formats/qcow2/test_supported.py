"""Every reason to refuse an image: named, and only where it holds."""

import dataclasses

import pytest

import peers
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.create import create_image
from nbdserve.formats.qcow2.extensions import BitmapsExtension
from nbdserve.formats.qcow2.header import parse_header
from nbdserve.formats.qcow2.spec import IncompatibleFeature
from nbdserve.formats.qcow2.supported import check_supported


def parse(path):
    raw = path.read_bytes()
    return parse_header(raw, str(path), len(raw))


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "disk.img"
    create_image(str(path), 1 << 20)
    return parse(path)


def incompatible(feature):
    return {"incompatible_features": feature}


# What differs in the header, the words for it, whether the image may be read.
REFUSED = [
    ({"crypt_method": 1}, "is encrypted", False),
    ({"crypt_method": 2}, "is encrypted", False),
    (incompatible(IncompatibleFeature.EXTENDED_L2), "extended L2", False),
    (incompatible(IncompatibleFeature.CORRUPT), "marked corrupt; .* qemu-img check -r all", True),
    (incompatible(IncompatibleFeature.DIRTY), "not closed cleanly, .*qemu-img check -r all", True),
    ({"nb_snapshots": 1}, "internal snapshots; .* qemu-img snapshot -d", True),
    (
        {"bitmaps": BitmapsExtension(1, 32, 65536)},
        "persistent bitmaps.* qemu-img bitmap --remove",
        True,
    ),
]


@pytest.mark.parametrize(("changes", "reason", "may_read"), REFUSED)
def test_refused(header, changes, reason, may_read):
    changed = dataclasses.replace(header, **changes)
    with pytest.raises(ImageError, match=f"^disk.img: .*{reason}"):
        check_supported(changed, "disk.img", read_only=False)
    if may_read:
        check_supported(changed, "disk.img", read_only=True)
    else:
        with pytest.raises(ImageError, match=f"^disk.img: .*{reason}"):
            check_supported(changed, "disk.img", read_only=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"version": 2},
        incompatible(IncompatibleFeature.COMPRESSION) | {"compression_type": "zstd"},
        {"compatible_features": 2**64 - 1},
        {"autoclear_features": 1 << 5},
        {"backing_file": "base"},
        incompatible(IncompatibleFeature.DATA_FILE) | {"data_file": "data"},
        {"extensions": ((0x12345678, b"unknown"),)},
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_not_refused(header, changes, read_only):
    check_supported(dataclasses.replace(header, **changes), "disk.img", read_only=read_only)


AES = "encrypt.format=aes,encrypt.key-secret=key"
MADE_BY_QEMU = [
    (["create", "-o", "extended_l2=on"], [], "extended L2", False),
    (["create", "--object", "secret,id=key,data=x", "-o", AES], [], "is encrypted", False),
    (["create"], ["snapshot", "-c", "one", "{image}"], "internal snapshots", True),
    (["create"], ["bitmap", "--add", "{image}", "one"], "persistent bitmaps", True),
]


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(("create", "then", "reason", "may_read"), MADE_BY_QEMU)
def test_what_qemu_makes(tmp_path, create, then, reason, may_read):
    image = tmp_path / "disk.img"
    for command in ([*create, "-q", "-f", "qcow2", "{image}", "1M"], then):
        if command:
            peers.qemu_img(*(word.format(image=image, folder=tmp_path) for word in command))
    header = parse(image)
    for read_only in (False, True):
        if read_only and may_read:
            check_supported(header, "disk.img", read_only=True)
        else:
            with pytest.raises(ImageError, match=reason):
                check_supported(header, "disk.img", read_only=read_only)

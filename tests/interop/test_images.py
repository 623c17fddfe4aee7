"""Every kind of image that qemu-img makes: read through our server, changed through it, and read
by QEMU again."""

import filecmp
import json
import random

import pytest

import peers
from interop.images import KIB, MIB, RECIPES, make
from interop.tools import ZERO, client, map_of, sha256, side_by_side

SPAN = 16 * MIB
"""Operations fall into the first and the last SPAN of a disk."""

matrix = pytest.mark.parametrize("name", RECIPES)


def raw_copy(image, path):
    peers.qemu_img("convert", "-f", "qcow2", "-O", "raw", image, path)
    return path


@matrix
@pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd", "nbdcopy", "nbdinfo")
def test_it_reads_as_qemu_reads_it(tmp_path, served, name):
    image = make(RECIPES[name], tmp_path / "disk.qcow2")
    digest = sha256(image)
    with peers.qemu_nbd(image, "-r") as qemu:
        theirs = map_of(qemu.uri)
    with served(image) as server:
        peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", server.uri, tmp_path / "out.qcow2")
        ours = map_of(server.uri)
        if RECIPES[name].size <= SPAN:
            peers.run("nbdcopy", server.uri, tmp_path / "out.raw")
    peers.qemu_img_compare(image, tmp_path / "out.qcow2")
    assert sha256(image) == digest  # it was open for writing, but nothing was written
    if RECIPES[name].size <= SPAN:
        raw = raw_copy(image, tmp_path / "raw")
        assert filecmp.cmp(raw, tmp_path / "out.raw", shallow=False)
        assert_same_map(ours, theirs, raw)


def assert_same_map(ours, theirs, raw):
    """Ours may know more: QEMU looks for holes inside data clusters only if it finds the image
    preallocated."""
    disk = raw.read_bytes()
    for offset, length, mine, other in side_by_side(ours, theirs):
        if mine & ZERO:
            assert not any(disk[offset:offset + length])
        if mine != other:
            assert (mine, other) == (ZERO, 0), (offset, length, mine, other)


@matrix
@pytest.mark.peer("qemu-img", "qemu-io", "python3-libnbd")
def test_changes_arrive_and_leave_a_clean_image(tmp_path, served, name):
    image = make(RECIPES[name], tmp_path / "disk.qcow2")
    below = {path: sha256(path) for path in tmp_path.glob("below/**/*.*")}
    model = raw_copy(image, tmp_path / "model")
    operations = tmp_path / "operations"
    operations.write_text(json.dumps(random_operations(RECIPES[name].size, name)))
    with served(image) as server:
        client("apply", server.uri, operations, model)
        peers.qemu_img_compare(server.uri, model)
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, model)
    if RECIPES[name].data_file == "raw":
        assert filecmp.cmp(f"{image}.data", model, shallow=False)
    assert {path: sha256(path) for path in below} == below


def random_operations(size, seed):
    """Writes, zeroes, trims and reads: a few bytes, parts of clusters, whole and many clusters."""
    rng = random.Random(seed)
    kinds = {"write": 40, "write-fua": 4, "zero": 12, "zero-no-hole": 8, "zero-fua": 2,
             "trim": 14, "read": 15, "flush": 5}
    lengths = (1, 511, 512, 3 * KIB, 4 * KIB, 60 * KIB, 64 * KIB, 200 * KIB, MIB, 3 * MIB)
    weights = (4, 4, 12, 12, 20, 20, 12, 12, 3, 1)
    operations = []
    for number in range(120):
        length = min(rng.choices(lengths, weights)[0], size)
        start = rng.choice((0, max(size - SPAN, 0)))
        offset = rng.randrange(start, min(start + SPAN, size) - length + 1)
        offset -= offset % rng.choice((1, 512, 512, 4 * KIB, 64 * KIB))
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        operations.append((kind, offset, length, number))
    # The last bytes of a disk are where tables and files end.
    last = min(size, 5000)
    return [*operations, ("write", size - last, last, 1), ("trim", size - last, last, 0)]

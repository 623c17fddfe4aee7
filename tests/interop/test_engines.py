"""Every engine with every cache mode it may have: programs of others find what they should."""

import json
import random

import pytest

import peers
from interop.images import KIB, MIB, Recipe, make
from interop.tools import client, refused

MATRIX = [
    (aio, cache)
    for aio in ("threads", "io_uring", "native")
    for cache in ("writeback", "none", "directsync")
    if not (aio == "native" and cache == "writeback")
]
matrix = pytest.mark.parametrize(("aio", "cache"), MATRIX)

SIZE = 8 * MIB


@matrix
@pytest.mark.parametrize("cluster_size", ["512", "64k"])
@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_changes_arrive(tmp_path, aio, cache, cluster_size):
    image = make(Recipe(size=SIZE, options=f"cluster_size={cluster_size}"), tmp_path / "d.qcow2")
    model = tmp_path / "model"
    peers.qemu_img("convert", "-O", "raw", image, model)
    rng = random.Random(cluster_size)
    operations = []
    for number in range(60):
        length = rng.choice((1, 511, 512, 4 * KIB, 64 * KIB, 200 * KIB))
        offset = rng.randrange(SIZE - length)
        offset -= offset % rng.choice((1, 512, 4 * KIB, 64 * KIB))
        kind = rng.choice(("write", "write", "write-fua", "zero", "trim", "read", "flush"))
        operations.append((kind, offset, length, number))
    (tmp_path / "operations").write_text(json.dumps(operations))
    with peers.served(image, f"--aio={aio}", f"--cache={cache}") as server:
        client("apply", server.uri, tmp_path / "operations", model)
        peers.qemu_img_compare(server.uri, model)
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, model)


@matrix
@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_overlapping_requests(tmp_path, aio, cache):
    image = make(Recipe(size=2 * MIB, fill=1), tmp_path / "d.qcow2")
    with peers.served(image, f"--aio={aio}", f"--cache={cache}") as server:
        peers.qemu_io(server.uri, "write -P 0 0 2M", options=("-f", "raw"))
        client("overlap", server.uri, 3, 4)
    peers.qemu_img_check(image)


def test_native_aio_needs_o_direct(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(512))
    assert "needs O_DIRECT" in refused("--aio=native", tmp_path / "raw")

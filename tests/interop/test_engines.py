"""Each engine, with the page cache and without it, where it is tried hardest: edges that are not
aligned, ends of files, every write durable at once, and QEMU with the same options beside it.

What all other tests do with each engine, they do by the fixture `served`."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal

import pytest

import peers
from interop.images import KIB, MIB, RECIPES, Recipe, make, write_disk
from interop.tools import client, refused, wait_until

# What a guardian locks, as /proc/PID/fdinfo says it (drivers/locks.py).
GUARDIANS_LOCK = re.compile(r"^lock:.* 301$", re.M)

SIZE = 8 * MIB


def random_operations(size, *kinds):
    rng = random.Random(size)
    lengths = (1, 511, 512, 4 * KIB, 64 * KIB, 200 * KIB)
    operations = []
    for number in range(60):
        length = min(rng.choice(lengths), size)
        offset = rng.randrange(size - length + 1)
        offset -= offset % rng.choice((1, 512, 4 * KIB, 64 * KIB))
        operations.append((rng.choice(kinds), offset, length, number))
    # The last bytes of a disk are where files end.
    last = min(size, 700)
    return [*operations, ("write", size - last, last, 1), ("write", size - 1, 1, 2)]


def write_operations(path, operations):
    path.write_text(json.dumps(operations))
    return path


CHANGES = ("write", "write", "write-fua", "zero")


# --- the fixture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "qemu-nbd"])
@pytest.mark.peer("qemu-img")
def test_the_server_has_the_engine_and_the_mode(tmp_path, served, command):
    image = make(Recipe(SIZE, backing=Recipe(SIZE)), tmp_path / "disk.qcow2")
    options = ("-t",) if command == "qemu-nbd" else ()
    with served(image, *options, command=command) as server:
        assert opened_direct(server.process.pid, tmp_path) == [served.direct] * 2
        server.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: "statistics engine" in server.stderr())
        engines = re.findall(r"statistics engine name=(\w+)", server.stderr())
        assert engines == [served.aio]


def opened_direct(pid, folder):
    """Of each file in the folder that a process has open for itself, not for its guardian: whether
    with O_DIRECT."""
    found = []
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, so it is no image
            if os.readlink(link).startswith(f"{folder}/"):
                said = pathlib.Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
                if GUARDIANS_LOCK.search(said):
                    continue
                flags = int(re.search(r"^flags:\s*([0-7]+)$", said, re.M)[1], 8)
                found.append(bool(flags & os.O_DIRECT))
    return found


def test_native_aio_needs_o_direct(tmp_path):
    (tmp_path / "raw").write_bytes(bytes(512))
    assert "needs O_DIRECT" in refused("--aio=native", tmp_path / "raw")


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", ["512", "64k"])
@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_changes_without_a_write_cache(tmp_path, served, cluster_size):
    image = make(Recipe(SIZE, f"cluster_size={cluster_size}"), tmp_path / "disk.qcow2")
    model = tmp_path / "model"
    peers.qemu_img("convert", "-O", "raw", image, model)
    operations = random_operations(SIZE, *CHANGES, "trim", "read", "flush")
    write_operations(tmp_path / "operations", operations)
    with served(image, write_cache=False) as server:
        client("apply", server.uri, tmp_path / "operations", model)
        peers.qemu_img_compare(server.uri, model)
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, model)


@pytest.mark.parametrize(("length", "offset"), [
    (512, 0), (4096 + 512, 0), (MIB + 1, 0), (3 * MIB + 4095, 0), (2 * MIB + 123, 70_001),
])
@pytest.mark.peer("nbdcopy", "python3-libnbd")
def test_raw_disks_of_any_length(tmp_path, served, length, offset):
    """Lengths are rounded up to sectors, as QEMU does, and what was never written reads as
    zeroes."""
    image, model = tmp_path / "disk.raw", tmp_path / "model"
    write_disk(image, length)
    before = image.read_bytes()
    size = -(-length // 512) * 512 - offset
    model.write_bytes(before[offset:])
    os.truncate(model, size)
    write_operations(
        tmp_path / "operations", random_operations(size, *CHANGES, "trim", "read", "flush"))
    with served(image, "-f", "raw", f"--offset={offset}") as server:
        client("apply", server.uri, tmp_path / "operations", model)
        client("neighbours", server.uri, model)
        peers.run("nbdcopy", server.uri, tmp_path / "found")
    assert (tmp_path / "found").read_bytes() == model.read_bytes()
    assert image.read_bytes() == before[:offset] + model.read_bytes()


@pytest.mark.parametrize("name", ["empty-512", "full", "zlib", "chain-of-4", "on-longer-raw"])
@pytest.mark.peer("qemu-img", "qemu-io", "python3-libnbd")
def test_unaligned_neighbours_lose_nothing(tmp_path, served, name):
    image = make(RECIPES[name], tmp_path / "disk.qcow2")
    model = tmp_path / "model"
    peers.qemu_img("convert", "-O", "raw", image, model)
    with served(image) as server:
        client("neighbours", server.uri, model)
        peers.qemu_img_compare(server.uri, model)
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, model)


@pytest.mark.parametrize("name", ["v2-512", "zlib-v2-4k", "chain-of-3"])
@pytest.mark.peer("qemu-img", "qemu-io", "qemu-nbd", "python3-libnbd")
def test_qemu_nbd_makes_the_same_of_the_same_requests(tmp_path, served, name):
    image = make(RECIPES[name], tmp_path / "ours" / "disk.qcow2")
    other = make(RECIPES[name], tmp_path / "theirs" / "disk.qcow2")
    model = tmp_path / "model"
    operations = write_operations(
        tmp_path / "operations", random_operations(RECIPES[name].size, *CHANGES, "read", "flush"))
    with served(image) as ours, peers.qemu_nbd(other, *served.options()) as theirs:
        for server in (ours, theirs):
            peers.qemu_img("convert", "-f", "raw", "-O", "raw", server.uri, model)
            client("apply", server.uri, operations, model)
        peers.qemu_img_compare(ours.uri, theirs.uri)
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, other)

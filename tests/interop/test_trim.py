"""A trim in the guest shrinks the image on the host, and only where it is meant to."""

import contextlib
import os
import subprocess

import pytest

import peers
from interop.images import MIB, Recipe, make, write_disk
from interop.tools import CLIENT, map_of, wait_until

SIZE = 32 * MIB
TRIMMED = 24 * MIB
KEPT = SIZE - TRIMMED


@pytest.fixture
def image(tmp_path):
    """Full of data; all of it on the host."""
    return make(Recipe(SIZE, fill=1), tmp_path / "disk.qcow2")


def allocated(path):
    """Bytes that the host's file system holds for the file."""
    return os.stat(path).st_blocks * 512


def shrunk(path):
    """Whether what was trimmed is gone; the rest is what was kept and metadata, which takes 8 MiB
    with the largest clusters."""
    return allocated(path) <= KEPT + 9 * MIB


@contextlib.contextmanager
def request(uri, kind, *then, offset=0, length=TRIMMED):
    """One request of a client that stays and is silent while the body runs."""
    argv = [peers.SYSTEM_PYTHON, "-I", CLIENT, "single", uri, kind, str(offset), str(length), *then]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout.readline() == b"\n", "the request failed"
        yield
        client.stdin.close()
    assert client.returncode == 0


@pytest.mark.parametrize("options", ["compat=v3", "compat=0.10", "cluster_size=512",
                                     "cluster_size=2M"])
@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_a_flush_gives_the_room_back(tmp_path, served, options):
    image = make(Recipe(SIZE, options, fill=1), tmp_path / "disk.qcow2")
    assert allocated(image) >= SIZE
    with served(image) as server, request(server.uri, "trim", "flush"):
        assert shrunk(image)
        assert [(e.length, e.flags) for e in map_of(server.uri)] == [(TRIMMED, 3), (KEPT, 0)]
    peers.qemu_img_check(image)
    peers.qemu_io(image, f"read -P 0 0 {TRIMMED}")


@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_without_a_flush_it_comes_back_a_little_later(served, image):
    with served(image) as server, request(server.uri, "trim"):
        wait_until(lambda: shrunk(image))
    peers.qemu_img_check(image)


@pytest.mark.parametrize(("command", "options"), [
    ("serve", ["--discard=ignore"]), ("serve", ["--discard=off"]), ("qemu-nbd", ["-t"])])
@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_ignored_it_changes_nothing(served, image, command, options):
    before = image.read_bytes()
    with (served(image, *options, command=command) as server,
          request(server.uri, "trim", "flush")):
        pass
    assert image.read_bytes() == before
    assert allocated(image) >= SIZE


@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_the_drop_in_discards_when_told(served, image):
    with (served(image, "-t", "--discard=unmap", command="qemu-nbd") as server,
          request(server.uri, "trim", "flush")):
        assert shrunk(image)
    peers.qemu_img_check(image)


@pytest.mark.parametrize(("kind", "shrinks"), [("zero", True), ("zero-no-hole", False)])
@pytest.mark.peer("qemu-img", "qemu-io", "python3-libnbd")
def test_write_zeroes_frees_unless_the_client_wants_the_room(served, image, kind, shrinks):
    with served(image) as server, request(server.uri, kind, "flush"):
        assert shrunk(image) == shrinks
    peers.qemu_img_check(image)
    peers.qemu_io(image, f"read -P 0 0 {TRIMMED}")


@pytest.mark.parametrize(("detect", "shrinks"), [("off", False), ("on", False), ("unmap", True)])
@pytest.mark.peer("qemu-img", "qemu-io", "python3-libnbd")
def test_zeroes_that_are_written_as_data(served, image, detect, shrinks):
    with (served(image, f"--detect-zeroes={detect}") as server,
          request(server.uri, "write-zeroes", "flush")):
        assert shrunk(image) == shrinks
        seen_as_zeroes = map_of(server.uri)[0].flags & 2
        assert bool(seen_as_zeroes) == (detect != "off")
    peers.qemu_img_check(image)
    peers.qemu_io(image, f"read -P 0 0 {TRIMMED}")


@pytest.mark.peer("qemu-img", "python3-libnbd", "nbdcopy")
def test_what_was_freed_is_used_again(tmp_path, served, image):
    length = image.stat().st_size
    source = tmp_path / "source"
    write_disk(source, SIZE, 0.9)
    with served(image) as server:
        with request(server.uri, "trim", "flush", length=SIZE):
            assert allocated(image) < 2 * MIB
        peers.run("nbdcopy", source, server.uri)
    assert image.stat().st_size <= length + MIB
    peers.qemu_img_check(image)
    peers.qemu_img_compare(image, source)


@pytest.mark.peer("qemu-img", "qemu-io", "python3-libnbd")
def test_over_a_backing_file_zeroes_take_its_place(tmp_path, served):
    base = Recipe(SIZE, fill=0, commands=(f"write -P 1 0 {SIZE}",))
    image = make(Recipe(SIZE, backing=base, commands=(f"write -P 2 0 {SIZE}",)),
                 tmp_path / "disk.qcow2")
    with served(image) as server, request(server.uri, "trim", "flush"):
        assert shrunk(image)
    peers.qemu_img_check(image)
    peers.qemu_io(image, f"read -P 0 0 {TRIMMED}", f"read -P 2 {TRIMMED} {KEPT}")


@pytest.mark.parametrize(("options", "shrinks"), [((), True), (("--discard=ignore",), False)])
@pytest.mark.peer("qemu-io", "python3-libnbd")
def test_a_raw_image(tmp_path, served, options, shrinks):
    image = tmp_path / "disk.raw"
    write_disk(image, SIZE, 1)
    with (served(image, "-f", "raw", *options) as server,
          request(server.uri, "trim", "flush")):
        assert shrunk(image) == shrinks
    assert image.stat().st_size == SIZE
    if shrinks:
        peers.qemu_io(image, f"read -P 0 0 {TRIMMED}", options=("-f", "raw"))

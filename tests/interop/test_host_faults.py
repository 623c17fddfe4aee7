"""The host's file system fails under a server: it is full, somebody cuts the file, or it dies.

The client gets the error of its request, other exports and later requests are served, the server
stops in order, and the image leaks at most.
"""

import contextlib
import os
import signal
import subprocess

import pytest

import peers
from facilities import small_file_system
from interop.images import KIB, MIB, Recipe, make
from interop.tools import Client, wait_until

EIO, ENOSPC = 5, 28
PIECE = 256 * KIB


@pytest.fixture
def small():
    with small_file_system(12 * MIB) as folder:
        yield folder


@pytest.mark.parametrize("aio", ["threads", pytest.param(
    "io_uring", marks=pytest.mark.peer(peers.IO_URING))])
@pytest.mark.peer("qemu-img")
def test_a_full_file_system(small, tmp_path, aio):
    image = make(Recipe(64 * MIB, fill=0), small / "disk.qcow2")
    other = make(Recipe(MIB, fill=0), tmp_path / "other.qcow2")
    ballast = small / "ballast"
    ballast.write_bytes(bytes(4 * MIB))
    written = {}
    with peers.served(image, f"--aio={aio}", f"--export=other={other}") as server:
        client, beside = Client(server.socket_path), Client(server.socket_path, export=b"other")
        for offset in range(0, 64 * MIB, PIECE):
            data = bytes([1 + offset // PIECE % 255]) * PIECE
            error = client.write(offset, data)
            if error:
                break
            written[offset] = data
        assert error == ENOSPC
        assert len(written) > 10
        assert client.flush() == 0
        assert client.write(0, b"again" * 1000) == 0  # where there is room already
        written[0] = b"again" * 1000 + written[0][5000:]
        assert beside.write(0, b"x" * 512) == 0
        ballast.unlink()
        assert client.write(offset, data) == 0
        written[offset] = data
        for at, content in written.items():
            assert client.perform(client.READ, at, PIECE) == (0, content)
        assert client.flush() == 0
        client.close()
        beside.close()
    peers.qemu_img_check(image)
    reads = [f"read -P {1 + at // PIECE % 255} {at} {PIECE}" for at in written if at]
    peers.qemu_io(image, *reads, options=("-r",))


@pytest.mark.peer("qemu-img")
def test_somebody_cuts_the_file(served, tmp_path):
    image = make(Recipe(8 * MIB, fill=1.0), tmp_path / "disk.qcow2")
    with served(image) as server:
        client = Client(server.socket_path)
        error, first = client.perform(client.READ, 0, PIECE)
        assert not error
        os.truncate(image, 2 * MIB)
        assert client.perform(client.READ, 0, PIECE) == (0, first)
        assert client.perform(client.READ, 6 * MIB, PIECE)[0] == EIO
        assert client.write(6 * MIB, b"y" * PIECE) == 0
        assert client.perform(client.READ, 6 * MIB, PIECE) == (0, b"y" * PIECE)
        client.close()
        assert "somebody has cut it" in server.stderr()
    assert image.stat().st_size > 6 * MIB


@contextlib.contextmanager
def mounted(path, socket_path):
    """A file that is what an NBD server serves, by FUSE."""
    path.touch()
    process = subprocess.Popen(["nbdfuse", path, "--unix", socket_path], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: path.stat().st_size)
        yield
    finally:
        peers.run("umount", "--lazy", path, check=False)
        process.kill()
        process.wait()


@pytest.mark.peer("qemu-img", "nbdkit", "nbdfuse")
def test_the_file_system_dies(tmp_path):
    below = make(Recipe(32 * MIB, fill=1.0), tmp_path / "disk.qcow2")
    other = make(Recipe(MIB, fill=0), tmp_path / "other.qcow2")
    image = tmp_path / "far.qcow2"
    with (
        peers.nbdkit("file", str(below)) as kit,
        mounted(image, kit.socket_path),
        peers.served(image, f"--export=other={other}") as server,
    ):
        client, beside = Client(server.socket_path), Client(server.socket_path, export=b"other")
        assert client.write(0, b"x" * 512) == 0
        assert client.flush() == 0
        kit.kill()
        assert client.perform(client.READ, 20 * MIB, PIECE)[0] == EIO
        assert client.write(20 * MIB, b"y" * 512) == EIO
        assert beside.write(0, b"z" * 512) == 0
        assert beside.flush() == 0
        client.close()
        beside.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(peers.STOP_SECONDS) in (0, 1)
        assert "Traceback" not in server.stderr()
        server.kill()  # it has ended; how was just looked at
    peers.qemu_img_check(below)
    peers.qemu_img_check(other)
    peers.qemu_io(below, "read -P 0x78 0 512", options=("-r",))

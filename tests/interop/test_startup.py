"""How a server begins, and how `qemu-nbd` ends by itself: what readiness means, and the life cycle,
beside qemu-nbd's own."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import urllib.parse

import pytest

import peers
from interop.images import MIB, Recipe, make
from interop.tools import NBDSERVE, PATIENCE, BareClient, wait_until

BOTH = pytest.mark.parametrize(
    "program", [["qemu-nbd"], [*NBDSERVE, "qemu-nbd"]], ids=["qemu-nbd", "ours"])


@pytest.fixture
def image(tmp_path):
    return make(Recipe(4 * MIB, fill=0, commands=("write -P 1 0 3M",)), tmp_path / "disk.qcow2")


@pytest.fixture
def folder():
    """With a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as made:
        yield pathlib.Path(made)


def connect_once(uri):
    """Connect without a second try, and be greeted."""
    parts = urllib.parse.urlsplit(uri)
    path = urllib.parse.parse_qs(parts.query).get("socket")
    with socket.socket(socket.AF_UNIX if path else socket.AF_INET) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path[0] if path else (parts.hostname, parts.port))
        assert sock.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"


# --- readiness ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [["-k", "s"], ["-p", "0"]], ids=["unix", "tcp"])
@pytest.mark.peer("qemu-img", "qemu-io")
def test_whoever_reads_the_uri_can_connect(image, folder, where):
    for _ in range(3):
        argv = [*NBDSERVE, "serve", *where, "--pid-file", "pid", image]
        with subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
            uri = server.stdout.readline().strip()
            connect_once(uri)
            assert int((folder / "pid").read_text()) == server.pid
            server.terminate()
        assert server.returncode == 0
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "qemu-nbd"])
@pytest.mark.peer("qemu-img", "qemu-io")
def test_fork_returns_when_clients_are_accepted(image, folder, command):
    for _ in range(3):
        peers.run(*NBDSERVE, command, "--fork", "--pid-file", folder / "pid", "-k", folder / "s",
                  image)
        pid = int((folder / "pid").read_text())
        try:
            connect_once(f"nbd+unix:///?socket={folder}/s")
            done = peers.run("qemu-img", "info", image, check=False)
            assert "lock" in done.stderr  # the image is open in the process that stayed
        finally:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: list(folder.iterdir()) == [])
        peers.qemu_img_check(image)


# --- the life cycle of qemu-nbd -------------------------------------------------------------------


@contextlib.contextmanager
def running(program, image, folder, *options):
    """qemu-nbd, or ours in its place, once it greets."""
    path = folder / "s"
    argv = [*program, "-k", path, "-f", "qcow2", *options, image]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as server:
        try:
            wait_until(lambda: path.exists() or server.poll() is not None)
            wait_until(lambda: can_connect(path))
            yield server
        finally:
            server.kill()


def can_connect(path):
    """Whether somebody listens.  A client that leaves at once does not count as the last one."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def ended(server):
    """Whether it ends by itself and as it should; qemu-nbd then still says who disconnected."""
    status = server.wait(PATIENCE)
    said = server.stderr.read()
    return status == 0 and (not said or server.args[0] == "qemu-nbd")


def is_served(path):
    """Whether the server greets a client now, not only once another has left."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0.5)
        sock.connect(str(path))
        try:
            return sock.recv(8) == b"NBDMAGIC"
        except TimeoutError:
            return False


@BOTH
@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")
def test_it_ends_when_its_client_leaves(image, folder, program):
    with running(program, image, folder) as server:
        one = BareClient(folder / "s")
        assert server.poll() is None
        one.close()
        assert ended(server)
        assert not (folder / "s").exists()
    peers.qemu_img_check(image)


@BOTH
@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")
def test_a_client_that_only_looked_does_not_count(image, folder, program):
    uri = f"nbd+unix:///?socket={folder}/s"
    with running(program, image, folder) as server:
        BareClient(folder / "s", negotiate=False).close()
        assert json.loads(peers.run("nbdinfo", "--list", "--json", "--no-content", uri).stdout)
        BareClient(folder / "s").close()
        assert ended(server)


@BOTH
@pytest.mark.clock
@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")
def test_persistent_it_stays(image, folder, program):
    with running(program, image, folder, "-t") as server:
        for _ in range(3):
            BareClient(folder / "s").close()
        assert is_served(folder / "s")
        server.terminate()
        assert ended(server)
        assert not (folder / "s").exists()


@BOTH
@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")
def test_the_second_client_waits(image, folder, program):
    with running(program, image, folder, "-t") as server:
        one = BareClient(folder / "s")
        assert not is_served(folder / "s")
        one.close()
        BareClient(folder / "s").close()
        server.terminate()
        assert ended(server)


@BOTH
@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io")
def test_shared_by_two_it_ends_with_the_last(image, folder, program):
    with running(program, image, folder, "-e", "2") as server:
        one, two = BareClient(folder / "s"), BareClient(folder / "s")
        assert not is_served(folder / "s")
        one.close()
        # Served at all: it took the place of the first. It negotiates, as one that only looked
        # and is noticed to be gone after the last real client would keep qemu-nbd running.
        three = BareClient(folder / "s")
        three.close()
        assert server.poll() is None
        two.close()
        assert ended(server)


@BOTH
@pytest.mark.parametrize("options", [["-e", "1"], ["-e", "0"], ["-e", "5"], ["-r"],
                                     ["-x", "name"], ["-x", ""], ["-o", "1000448"]],
                         ids=" ".join)
@pytest.mark.peer("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")
def test_what_clients_are_told(image, folder, program, options):
    """The same expectations of both: qemu-nbd shows that they are its own."""
    name = "name" if "name" in options else ""
    with running(program, image, folder, "-t", *options):
        uri = f"nbd+unix:///{name}?socket={folder}/s"
        (said,) = json.loads(
            peers.run("nbdinfo", "--json", "--no-content", uri).stdout)["exports"]
        offset = int(options[1]) if "-o" in options else 0
        assert said["export-size"] == 4 * MIB - offset
        assert said["is_read_only"] == ("-r" in options)
        assert said["can_multi_conn"] == (options in (["-e", "0"], ["-e", "5"]))
        peers.qemu_io(uri, f"read -P 1 0 {3 * MIB - offset}", f"read -P 0 {3 * MIB - offset} 1M",
                      options=("-r", "-f", "raw"))

"""kill -9 of a busy server at any moment, in every cache mode: nothing acknowledged is lost.

A client keeps requests in flight on all parts of a small disk and notes which were answered. After
some number of answers the server is killed; the requests still in flight may have happened or not,
sector by sector. Then, at once:

* somebody opens the image: our server, which waits for the guardian, or QEMU's tools, which are
  asked again until the lock is gone;
* qemu-img check finds leaks at most;
* each sector holds what was acknowledged last, or what was in flight.

Then the same image goes on being served, so that what one death left is the start of the next.
"""

import json
import os
import pathlib
import random
import signal
import subprocess

import pytest

import peers
from interop.images import KIB, MIB, Recipe, make
from interop.tools import NBDSERVE, BareClient, wait_until

KILLS = 40 if os.environ.get("NBDSERVE_SOAK") == "1" else 2
SIZE = 6 * MIB
SECTOR = 512
WINDOW = 24  # requests in flight
LONGEST = 128 * KIB
GUARDIAN = "qcow2-guardian"

IMAGES = {
    "plain": Recipe(SIZE, fill=0),
    "small clusters": Recipe(SIZE, options="cluster_size=512,refcount_bits=64", fill=0),
    "overlay": Recipe(SIZE, options="cluster_size=4096", backing=Recipe(SIZE, format="raw")),
    "compressed": Recipe(SIZE, options="cluster_size=16k", compressed=True, fill=0.7),
    "data file": Recipe(SIZE, options="cluster_size=4096", data_file="external", fill=0),
}

CASES = [
    ("threads", "writeback", "plain"),
    ("io_uring", "writeback", "overlay"),
    ("io_uring", "none", "small clusters"),
    ("native", "none", "data file"),
    ("threads", "writethrough", "small clusters"),
    ("io_uring", "directsync", "compressed"),
    ("threads", "unsafe", "overlay"),
    ("io_uring", "unsafe", "small clusters"),
]


NEEDS = {"io_uring": [peers.IO_URING], "native": [peers.LINUX_AIO]}
PAST_THE_CACHE = {"none": [peers.O_DIRECT], "directsync": [peers.O_DIRECT]}


def marks(aio, cache):
    needed = NEEDS.get(aio, []) + PAST_THE_CACHE.get(cache, [])
    return pytest.mark.peer(*needed)


@pytest.fixture(params=[
    pytest.param(case, id="-".join(case).replace(" ", "-"), marks=marks(*case[:2]))
    for case in CASES
])
def case(request):
    return request.param


class Load:
    """Requests of all kinds, some in flight, none of which overlap; and what the disk must hold."""

    def __init__(self, disk: bytearray, seed: int) -> None:
        self.disk = disk
        self.in_flight: dict[int, tuple[int, int, bytes]] = {}  # by cookie: (offset, length, data)
        self._chooser = random.Random(seed)
        self._cookie = 0

    def run(self, client: BareClient, nb_answers: int, kill) -> None:
        """Keep WINDOW requests in flight; `kill` after a number of answers."""
        replies = client.replies()
        while len(self.in_flight) < WINDOW:
            client.sock.sendall(self._request(client))
        for number in range(nb_answers):
            cookie, error = next(replies)
            assert not error
            self._done(cookie)
            if number == nb_answers - 1:
                kill()
            else:
                client.sock.sendall(self._request(client))
        # What was answered before the end is in the socket.
        try:
            for cookie, error in replies:
                assert not error
                self._done(cookie)
        except (ConnectionError, AssertionError):  # the last reply was cut off
            pass

    def _done(self, cookie: int) -> None:
        offset, length, data = self.in_flight.pop(cookie)
        self.disk[offset : offset + length] = data

    def _request(self, client: BareClient) -> bytes:
        chooser = self._chooser
        self._cookie += 1
        kind, flags = chooser.choices(
            [(client.WRITE, 0), (client.WRITE, client.FUA), (client.WRITE_ZEROES, 0),
             (client.WRITE_ZEROES, client.NO_HOLE), (client.TRIM, 0), (client.FLUSH, 0)],
            (20, 1, 2, 2, 2, 1))[0]
        if kind == client.FLUSH:
            self.in_flight[self._cookie] = (0, 0, b"")
            return client.request(kind, self._cookie, 0, 0)
        offset, length = self._free_range(whole=kind == client.TRIM)
        data = chooser.randbytes(length) if kind == client.WRITE else bytes(length)
        self.in_flight[self._cookie] = (offset, length, data)
        payload = data if kind == client.WRITE else length
        return client.request(kind, self._cookie, offset, payload, flags)

    def _free_range(self, *, whole: bool) -> tuple[int, int]:
        """Where nothing is in flight; of whole clusters, whatever their size, for a trim: then it
        zeroes."""
        unit = 64 * KIB if whole else SECTOR
        while True:
            length = unit * self._chooser.choice((1, 1, 2, 8))
            offset = self._chooser.randrange(0, SIZE - LONGEST, unit)
            length = min(length, LONGEST)
            if all(
                offset + length <= start or start + taken <= offset
                for start, taken, _ in self.in_flight.values()
            ):
                return offset, length

    def check(self, actual: bytes) -> None:
        """After the death: old or new where something was in flight, and exactly so elsewhere."""
        for offset, length, data in self.in_flight.values():
            for at in range(0, length, SECTOR):
                place = slice(offset + at, offset + at + SECTOR)
                if actual[place] == data[at : at + SECTOR]:
                    self.disk[place] = actual[place]
        self.in_flight.clear()
        wrong = [
            at for at in range(0, SIZE, SECTOR)
            if actual[at : at + SECTOR] != self.disk[at : at + SECTOR]
        ]
        assert not wrong, f"{len(wrong)} sectors differ, the first at {wrong[0]:#x}"


def leaks_at_most(image: pathlib.Path) -> bool:
    """By qemu-img check; it is asked until the image is free."""
    found = []

    def unlocked() -> bool:
        found[:] = [peers.run("qemu-img", "check", "--output=json", image, check=False)]
        return "lock" not in found[0].stderr

    wait_until(unlocked)
    report = json.loads(found[0].stdout)
    return found[0].returncode in (0, 3) and not report.get("corruptions")


def content(image: pathlib.Path, folder: pathlib.Path) -> bytes:
    raw = folder / "raw"
    peers.qemu_img("convert", "-O", "raw", image, raw)
    return raw.read_bytes()


def guardian_of(server: peers.Server) -> int:
    """The process id of a server's guardian."""
    children = pathlib.Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    for pid in children.read_text().split():
        if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == GUARDIAN:
            return int(pid)
    raise AssertionError("no guardian")


@pytest.mark.peer("qemu-img")
def test_nothing_acknowledged_is_lost(case, tmp_path):
    aio, cache, kind = case
    image = make(IMAGES[kind], tmp_path / "disk.qcow2")
    chooser = random.Random("-".join(case))
    load = Load(bytearray(content(image, tmp_path)), chooser.getrandbits(32))
    options = (f"--aio={aio}", f"--cache={cache}")
    for number in range(KILLS):
        with peers.served(image, *options) as server:
            client = BareClient(server.socket_path)
            load.run(client, chooser.randint(1, 600), server.kill)
            client.close()
        if number % 2:
            assert leaks_at_most(image)
        # Else the next to open it is our server, at once.
        with peers.served(image, *options):
            pass
        assert leaks_at_most(image)
        load.check(content(image, tmp_path))


@pytest.mark.peer("qemu-img")
def test_without_the_guardian_something_is_lost(tmp_path):
    """The test above sees what it is there to see."""
    image = make(IMAGES["small clusters"], tmp_path / "disk.qcow2")
    load = Load(bytearray(SIZE), 5)
    with peers.served(image, "--cache=writeback") as server:
        client = BareClient(server.socket_path)

        def kill_both() -> None:
            os.kill(guardian_of(server), signal.SIGKILL)
            server.kill()

        load.run(client, 200, kill_both)
        client.close()
    assert leaks_at_most(image)
    with pytest.raises(AssertionError, match="sectors differ"):
        load.check(content(image, tmp_path))


@pytest.mark.peer("qemu-img")
def test_two_exports_of_one_server(tmp_path):
    images = [make(IMAGES["plain"], tmp_path / name) for name in ("one.qcow2", "two.qcow2")]
    loads = [Load(bytearray(SIZE), 1), Load(bytearray(SIZE), 2)]
    with peers.served(images[0], f"--export=two={images[1]}") as server:
        clients = [BareClient(server.socket_path, export=name) for name in (b"", b"two")]
        loads[0].run(clients[0], 100, lambda: loads[1].run(clients[1], 100, server.kill))
        for client in clients:
            client.close()
    for image, load in zip(images, loads, strict=True):
        assert leaks_at_most(image)
        load.check(content(image, tmp_path))


@pytest.mark.peer("qemu-img")
def test_signals_that_end_servers_do_not_end_the_guardian(tmp_path):
    image = make(IMAGES["plain"], tmp_path / "disk.qcow2")
    load = Load(bytearray(SIZE), 3)
    with peers.served(image) as server:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(guardian_of(server), number)
        assert os.getsid(guardian_of(server)) != os.getsid(server.process.pid)
        client = BareClient(server.socket_path)
        load.run(client, 50, server.kill)
        client.close()
    assert leaks_at_most(image)
    load.check(content(image, tmp_path))


def test_a_guardian_ends_with_its_server(tmp_path):
    image = tmp_path / "disk.qcow2"
    peers.run(*NBDSERVE, "create", "-q", image, "1M")
    with peers.served(image) as server:
        pid = guardian_of(server)
    assert not pathlib.Path(f"/proc/{pid}").exists()


def test_without_one_the_server_goes_on_and_says_so(tmp_path):
    image = tmp_path / "disk.qcow2"
    peers.run(*NBDSERVE, "create", "-q", image, "1M")
    with peers.served(image) as server:
        os.kill(guardian_of(server), signal.SIGKILL)
        client = BareClient(server.socket_path)
        client.ask(client.request(client.WRITE, 1, 0, b"x" * 512))
        client.close()
        server.stop()
        assert server.stderr().count("\n") == 1
        assert "no guardian" in server.stderr()


@pytest.mark.peer("qemu-img")
def test_the_caller_of_a_killed_server_is_not_held_up(tmp_path):
    """Nothing of a guardian's keeps the server's pipes open once its work is done."""
    image = make(IMAGES["plain"], tmp_path / "disk.qcow2")
    server = subprocess.Popen(
        [*NBDSERVE, "serve", "-k", "s", image], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline()
    server.kill()
    assert server.communicate(timeout=20)[1] == b""
    assert leaks_at_most(image)

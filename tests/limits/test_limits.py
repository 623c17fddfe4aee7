"""A server among many bad clients: its memory is bounded, the honest are served, nothing is left.

The bounds are sums of what budget.py promises, not what was measured. Where the real budget of
256 MiB would make a test expensive the server is started with a small one.
"""

from __future__ import annotations

import resource
import sys
import time

import pytest

import peers
from facilities import lacking
from limits import crowd, measure
from nbdserve.nbd import budget
from nbdserve.server import SHUTDOWN_TIMEOUT

KIB, MIB = 1 << 10, 1 << 20
SMALL_BUDGET = 32 * MIB


def with_budget(nb_bytes):
    """How to start our server with another one."""
    return [
        sys.executable, "-c",
        "import nbdserve.nbd.budget as budget\n"
        f"budget.LIMIT = {nb_bytes}\n"
        "import runpy\n"
        "runpy.run_module('nbdserve', run_name='__main__')",
    ]  # fmt: skip


# What a connection costs that holds nothing: a task or its buffers' heads, its account, 20 KiB in
# all; and room for the interpreter's own.
IDLE = 40 * KIB
FLOOR = 16 * MIB

# Beside an idle one's, of one that has what everybody may have: received, under way, unread, as
# much again in a page's copy, and requests that were parsed.
BUSY = IDLE + 5 * budget.SMALL

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")


@pytest.fixture(autouse=True)
def descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2200:
        lacking(f"RLIMIT_NOFILE is {hard}, and a thousand clients need more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2200), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("limits") / "disk.qcow2"
    peers.qemu_img("create", "-f", "qcow2", path, "64M")
    peers.qemu_io(path, "write -P 1 0 64M")
    return path


def be_served(honest, rounds=50):
    """Requests of each size, done and right."""
    for number in range(rounds):
        assert honest.read(number * 4 * KIB, 4 * KIB) == b"\1" * 4 * KIB
        honest.write(number * 4 * KIB, b"\1" * 4 * KIB)
    for length in (64 * KIB, 256 * KIB, MIB):
        assert honest.read(MIB, length) == b"\1" * length
        honest.write(MIB, b"\1" * length)


def besiege(server, kind, number, bound):
    """`number` clients of a kind come, stay, and leave: the server grows by `bound` at most."""
    pid = server.process.pid
    with crowd.Honest(server.socket_path) as honest:
        be_served(honest)
        memory, fds = measure.resident(pid), measure.descriptors(pid)
        with crowd.crowd(kind, server.socket_path, number):
            measure.settled(pid)
            assert measure.descriptors(pid) <= fds + number  # some may have been dropped
            grown = measure.resident(pid) - memory
            assert grown <= bound, f"{grown / MIB:.0f} MiB for {number} clients: {kind}"
            be_served(honest)
        measure.wait_until(lambda: measure.descriptors(pid) == fds, "the descriptors are back")
        be_served(honest)


@pytest.mark.parametrize(
    "kind",
    [
        "silent, before the handshake",
        "idle, in transmission",
        "64 MiB announced, a byte at a time",
    ],
)
def test_a_thousand_that_send_next_to_nothing(image, kind):
    with peers.served(image) as server:
        besiege(server, kind, 1000, FLOOR + 1000 * IDLE)


@pytest.mark.parametrize(
    ("kind", "longest"),
    [
        ("most of a write, never the rest", 8 * MIB),
        ("reads of 256 KiB, nothing read", 0),
        ("reads of 4 MiB, nothing read", 4 * MIB),
        ("half-closed, nothing read", 0),
    ],
)
def test_many_that_hold_what_they_can(image, kind, longest):
    """Each would hold a megabyte or more."""
    number = 250
    with peers.served(image, program=with_budget(SMALL_BUDGET)) as server:
        besiege(server, kind, number, FLOOR + SMALL_BUDGET + 2 * longest + number * BUSY)


def test_of_the_test_without_a_budget_they_hold_it(image):
    kind, longest, number = "reads of 4 MiB, nothing read", 4 * MIB, 100
    with (
        peers.served(image, program=with_budget(1 << 60)) as server,
        pytest.raises(AssertionError, match=r"^\d+ MiB for 100 clients"),
    ):
        besiege(server, kind, number, FLOOR + SMALL_BUDGET + 2 * longest + number * BUSY)


def test_the_stop_waits_for_none_of_them(image):
    """Of a thousand, none of which reads what it asked for."""
    with peers.served(image) as server:
        with crowd.crowd("reads of 256 KiB, nothing read", server.socket_path, 1000):
            start = time.monotonic()
            server.stop()
            assert time.monotonic() - start < 2 * SHUTDOWN_TIMEOUT
        assert server.stderr().count("were cut off") == 1
    peers.qemu_img_check(image)


def test_without_descriptors_clients_wait_and_nothing_else_happens(image):
    with peers.served(image) as server, crowd.Honest(server.socket_path) as honest:
        pid = server.process.pid
        few = measure.descriptors(pid) + 20
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, few))
        served = [crowd.dial(server.socket_path) for _ in range(20)]
        waiting = []
        for _ in range(20):
            sock = crowd.socket.socket(crowd.socket.AF_UNIX)
            sock.settimeout(60)
            sock.connect(str(server.socket_path))
            waiting.append(sock)
        measure.wait_until(lambda: "cannot accept a client" in server.stderr(), "a word of it")
        before = measure.cpu_seconds(pid)
        start = time.monotonic()
        time.sleep(0.5)  # several attempts
        assert measure.cpu_seconds(pid) - before <= (time.monotonic() - start) / 4
        assert server.stderr().count("cannot accept a client") == 1
        be_served(honest, 5)
        for sock in served:
            sock.close()
        for sock in waiting:
            assert crowd.exactly(sock, 18).startswith(b"NBDMAGIC")
            sock.close()
        be_served(honest, 5)

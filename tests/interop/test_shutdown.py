"""How a server ends: asked to, whatever its clients do, in order and soon; killed, with nothing
lost that was flushed."""

import json
import os
import random
import signal
import socket
import struct
import subprocess
import time

import pytest

import peers
from interop.images import KIB, MIB, Recipe, make
from interop.tools import CLIENT, NBDSERVE, BareClient, client, wait_until

SIGNALS = [signal.SIGTERM, signal.SIGINT]
SOON = 4.0
"""Seconds; the server waits 5 for clients that hold it up, so less means that nobody did."""


@pytest.fixture
def image(tmp_path):
    return make(Recipe(64 * MIB, fill=0), tmp_path / "disk.qcow2")


def stop_soon(server, signum=signal.SIGTERM):
    start = time.monotonic()
    server.stop(signum)
    assert not server.socket_path.exists()
    return time.monotonic() - start


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.peer("qemu-img", "qemu-io")
def test_what_was_answered_is_in_the_image(served, image, signum):
    with served(image) as server:
        one = BareClient(server.socket_path)
        requests = [one.request(one.WRITE, number, number * 100_000, bytes([number]) * 70_000)
                    for number in range(1, 120)]
        one.sock.setblocking(False)
        sent = one.sock.send(b"".join(requests))  # what the socket takes: more than is parsed
        one.sock.setblocking(True)
        stop_soon(server, signum)
        answered = [cookie for cookie, error in one.replies() if not error]
        one.close()
    assert len(answered) <= sent // 70_000
    peers.qemu_img_check(image)
    reads = [f"read -P {number} {number * 100_000} 70000" for number in answered]
    peers.qemu_io(image, *reads, options=("-r",))


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_in_the_midst_of_four_busy_connections(served, image, signum):
    with served(image) as server:
        busy = subprocess.Popen(
            [peers.SYSTEM_PYTHON, "-I", CLIENT, "overlap", server.uri, "4", "1000000"],
            stderr=subprocess.DEVNULL)
        time.sleep(0.6)
        assert busy.poll() is None
        assert stop_soon(server, signum) < SOON
        assert busy.wait(peers.STOP_SECONDS) == 1  # its connections were closed under it
    peers.qemu_img_check(image)


@pytest.mark.peer("qemu-img")
def test_idle_clients_hold_nothing_up(image):
    with peers.served(image) as server:
        negotiated = BareClient(server.socket_path)
        silent = BareClient(server.socket_path, negotiate=False)
        halfway = BareClient(server.socket_path)
        halfway.sock.sendall(halfway.request(halfway.WRITE, 1, 0, bytes(MIB))[:5000])
        header = BareClient(server.socket_path)
        header.sock.sendall(header.request(header.READ, 1, 0, 512)[:20])
        assert stop_soon(server) < SOON
        for one in (negotiated, silent, halfway, header):
            assert list(one.replies()) == []
            one.close()
    peers.qemu_img_check(image)


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_client_that_does_not_read_its_replies_is_cut_off(served, image):
    peers.qemu_io(image, "write -P 1 0 64M")
    with served(image) as server:
        deaf = BareClient(server.socket_path)
        deaf.sock.sendall(b"".join(deaf.request(deaf.READ, n, n * MIB, MIB) for n in range(60)))
        time.sleep(0.3)
        start = time.monotonic()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # more change nothing
            server.process.send_signal(signum)
            time.sleep(0.05)
        server.stop()
        assert time.monotonic() - start < 3 * SOON
        assert not server.socket_path.exists()
        deaf.close()
    peers.qemu_img_check(image)


@pytest.mark.peer("qemu-img")
def test_clients_that_vanish_harm_nobody(served, image):
    rng = random.Random(0)
    with served(image) as server:
        for number in range(30):
            one = BareClient(server.socket_path)
            requests = [one.request(one.WRITE, n, rng.randrange(60) * MIB, bytes([n + 1]) * 300_000)
                        for n in range(4)]
            requests.append(one.request(one.READ, 9, 0, MIB))
            data = b"".join(requests)
            one.sock.setblocking(False)
            one.sock.send(data[:rng.randrange(len(data))])
            if number % 2:
                one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()
        peers.qemu_img("info", server.uri)
        assert server.stderr().count("Traceback") == 0
    peers.qemu_img_check(image)


@pytest.mark.parametrize("options", ["compat=v3", "compat=0.10,cluster_size=512",
                                     "cluster_size=2M,refcount_bits=1", "lazy_refcounts=on"])
@pytest.mark.peer("qemu-img", "python3-libnbd", "nbdcopy")
def test_killed_it_leaves_leaks_at_most_and_all_that_was_flushed(tmp_path, served, options):
    image = make(Recipe(64 * MIB, options, fill=0), tmp_path / "disk.qcow2")
    flushed = [("write", number * 300_000, 50_000, number) for number in range(40)]
    flushed += [("trim", 5 * 300_000, 300_000, 0), ("zero", 7 * 300_000, 40_000, 0)]
    model, operations = tmp_path / "model", tmp_path / "operations"
    operations.write_text(json.dumps([*flushed, ("flush", 0, 0, 0)]))
    end_of_flushed = 30 * MIB
    for delay in (0.0, 0.05, 0.15, 0.3):
        make(Recipe(64 * MIB, options, fill=0), image)
        model.write_bytes(b"")
        os.truncate(model, 64 * MIB)
        with served(image) as server:
            client("apply", server.uri, operations, model)
            one = BareClient(server.socket_path)
            one.sock.setblocking(False)
            one.sock.send(b"".join(
                one.request(one.WRITE, n, end_of_flushed + n * 70_000, bytes([n + 1]) * 50_000)
                for n in range(200)))
            time.sleep(delay)
            server.kill()
            one.close()
        # The kernel still ends what was in its io_uring, and the lock says so.
        wait_until(lambda: not is_locked(image))
        leaks = leaks_at_most(image)
        peers.qemu_img("convert", "-O", "raw", image, tmp_path / "out")
        with open(tmp_path / "out", "rb") as found, open(model, "rb") as expected:
            assert found.read(end_of_flushed) == expected.read(end_of_flushed)
        # The next server serves it, and leaves no new leak.
        with served(image) as server:
            client("read", server.uri, tmp_path / "out", "structured", 1)
            peers.run("nbdcopy", tmp_path / "out", server.uri)
        assert leaks_at_most(image) <= leaks


def is_locked(image):
    return "lock" in peers.run("qemu-img", "info", image, check=False).stderr


def leaks_at_most(image):
    """How many clusters are leaked, in an image that has nothing worse."""
    done = peers.run("qemu-img", "check", "--output=json", image, check=False)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert not report.get("corruptions"), report
    assert not report["check-errors"], report
    return report.get("leaks", 0)


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_socket_left_by_a_killed_server_is_replaced(image):
    with peers.served(image) as server:
        server.kill()
        assert server.socket_path.exists()
        argv = [*NBDSERVE, "serve", "-k", server.socket_path, image]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as again:
            assert again.stdout.readline().startswith(b"nbd+unix:")
            peers.qemu_io(server.uri, f"write 0 {64 * KIB}", options=("-f", "raw"))
            again.terminate()
        assert again.returncode == 0
    peers.qemu_img_check(image)

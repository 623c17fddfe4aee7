"""The numbers that a server logs on SIGUSR1 and at its end, against what real clients did."""

import os
import re
import signal

import pytest

import peers
from interop.images import KIB, MIB, Recipe, make
from interop.tools import NBDSERVE, BareClient, client, wait_until

DONE = "statistics engine"  # begins the last line


@pytest.fixture
def image(tmp_path):
    return make(Recipe(64 * MIB, fill=0), tmp_path / "disk.qcow2")


def parsed(line):
    """(kind, {key: value}), numbers as such."""
    kind, *_ = line.split()
    pairs = re.findall(r'(\S+?)=("(?:[^"\\]|\\.)*"|\S+)', line)
    return kind, {key: int(value) if value.isdigit() else value for key, value in pairs}


def reports(server):
    """What was logged each time: lists of (kind, counters)."""
    found = [[]]
    for line in server.stderr().splitlines():
        if line.startswith("nbdserve: statistics "):
            kind, counters = parsed(line.removeprefix("nbdserve: statistics "))
            found[-1].append((kind, counters))
            if kind == "engine":
                found.append([])
    return found[:-1]


def ask(server):
    """Have the statistics logged now."""
    number = len(reports(server))
    server.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(reports(server)) > number)
    return reports(server)[-1]


def only(report, kind, **names):
    [found] = [
        counters
        for which, counters in report
        if which == kind and names.items() <= counters.items()
    ]
    return found


def requests(counters):
    """The counters of requests."""
    return {
        key: value
        for key, value in counters.items()
        if re.fullmatch(r"[a-z_]+_(operations|bytes)", key)
    }


def in_histogram(counters, kind):
    bins = str(counters[f"{kind}_us_bins"]).split(",")
    return sum(int(pair.split(":")[1]) for pair in bins)


EVERY = {
    "wr_operations": 7, "wr_bytes": 3 * 4096 + 3 * 64 * KIB + 2 * MIB,
    "rd_operations": 5, "rd_bytes": 4 * 10_000 + MIB,
    "zero_operations": 2, "zero_bytes": 256 * KIB,
    "unmap_operations": 1, "unmap_bytes": MIB,
    "status_operations": 1, "status_bytes": 8 * MIB,
    "prefetch_operations": 1, "prefetch_bytes": 64 * KIB,
    "flush_operations": 3,
    "invalid_rd_operations": 1,
}  # fmt: skip
"""What `client.py every` does."""


@pytest.mark.parametrize("options", [(), ("--cache=none",), ("--cache=writethrough",)], ids=str)
@pytest.mark.peer("qemu-img", "python3-libnbd")
def test_every_request_of_a_client_is_counted(image, options):
    with peers.served(image, *options) as server:
        client("every", server.uri)
        wait_until(lambda: "clients" not in only(ask(server), "server"))
        report = ask(server)
        export = only(report, "export")
        assert requests(export) == EVERY
        for kind in ("rd", "wr", "zero", "unmap", "flush"):
            assert in_histogram(export, kind) == EVERY[f"{kind}_operations"]
            assert export[f"{kind}_total_time_ns"] > 0
        assert only(report, "server")["accepted"] == 1
        assert only(report, "node", node="root")["filename"] == str(image)


@pytest.mark.parametrize("command", ["serve", "qemu-nbd"])
@pytest.mark.peer("qemu-img")
def test_two_connections_each_have_their_own(image, command):
    options = ("-t", "-e", "0") if command == "qemu-nbd" else ()
    with peers.served(image, *options, command=command) as server:
        one, other = BareClient(server.socket_path), BareClient(server.socket_path)
        one.sock.sendall(b"".join(
            one.request(one.WRITE, number, number * 100_000, bytes(1000 + number))
            for number in range(40)))
        for _ in range(40):
            assert one.sock.recv(16)
        other.sock.sendall(b"".join(
            other.request(other.READ, number, number * 100_000, 512) for number in range(25)))
        for _ in range(25):
            assert len(other._receive(16 + 512)) == 528
        report = ask(server)
        written = {"wr_operations": 40, "wr_bytes": 40 * 1000 + sum(range(40))}
        read = {"rd_operations": 25, "rd_bytes": 25 * 512}
        found = [requests(counters) for kind, counters in report if kind == "connection"]
        assert sorted(found, key=str) == sorted([written, read], key=str)
        assert requests(only(report, "export")) == written | read
        one.close()
        wait_until(lambda: only(ask(server), "server").get("clients") == 1)
        report = ask(server)
        assert requests(only(report, "left")) == written
        assert requests(only(report, "connection")) == read
        assert requests(only(report, "export")) == written | read
        other.close()


def test_flushes_are_told_apart(tmp_path):
    """Two writes and flushes that reach the disk, and three flushes with nothing to do."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(2 * MIB))
    with peers.served(image, "-f", "raw") as server:
        one = BareClient(server.socket_path)
        everything = [one.request(one.WRITE, 1, MIB, b"x" * 512), one.request(one.FLUSH, 2, 0, 0),
                      one.request(one.FLUSH, 3, 0, 0)]
        for message in everything * 2 + everything[-1:]:
            one.sock.sendall(message)
            assert len(one._receive(16)) == 16
        report = ask(server)
        assert only(report, "export")["flush_operations"] == 5
        node = only(report, "node", node="root.file")
        assert (node["flush.requested"], node["flush.clean"], node["flush.done"]) == (5, 3, 2)
        assert "flush.failed" not in node
        one.close()


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_verbose_server_says_it_all_at_the_end(image):
    with peers.served(image, "-v") as server:
        peers.qemu_io(server.uri, "write -P 1 0 64k", options=("-f", "raw"))
        server.stop()
        [report] = reports(server)
    assert requests(only(report, "export"))["wr_bytes"] == 64 * KIB
    assert only(report, "node", node="root.file")["flush.done"] >= 1
    assert "connection" not in [kind for kind, _ in report]


@pytest.mark.peer("qemu-img")
def test_in_the_background_too(image, tmp_path):
    """With --fork -v stderr stays; without -v it does not, and the signal harms nothing."""
    for verbose in (True, False):
        pid_file, socket = tmp_path / f"pid{verbose}", tmp_path / f"socket{verbose}"
        log = tmp_path / f"log{verbose}"
        options = ["--fork", "--pid-file", pid_file, "-k", socket, *(["-v"] if verbose else [])]
        argv = " ".join(map(str, [*NBDSERVE, "serve", *options, image]))
        peers.run("sh", "-c", f"{argv} >/dev/null 2>{log}")
        pid = int(pid_file.read_text())
        one = BareClient(socket)
        os.kill(pid, signal.SIGUSR1)
        if verbose:
            wait_until(lambda: DONE in log.read_text())  # noqa: B023
        one.sock.sendall(one.request(one.READ, 1, 0, 512))
        assert len(one._receive(528)) == 528
        one.close()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not pid_file.exists())  # noqa: B023 - waited for here
        assert (DONE in log.read_text()) is verbose


@pytest.mark.peer("qemu-img")
def test_a_storm_of_signals_disturbs_no_client(image):
    with peers.served(image) as server:
        one = BareClient(server.socket_path)
        for number in range(300):
            server.process.send_signal(signal.SIGUSR1)
            one.sock.sendall(one.request(one.WRITE, number, number * 4096, b"x" * 99))
            assert len(one._receive(16)) == 16
        assert only(ask(server), "export")["wr_operations"] == 300
        one.close()

"""The throttle by the clock on the wall: real clients, and QEMU's own throttle beside ours."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import peers
from interop.images import KIB, MIB, Recipe, make
from interop.tools import BareClient, refused

IOPS = 200
REQUESTS = 20_000
BENCH = re.compile(r"Run completed in ([0-9.]+) seconds")
SOON = 4.0
"""Seconds; the server waits 5 for requests in flight, so less means that it let them go."""


@pytest.fixture
def image(tmp_path):
    """Its first 8 MiB are data: qemu-nbd does not count reads of what it knows to be zeroes."""
    recipe = Recipe(64 * MIB, fill=0, commands=("write -P 1 0 8M",))
    return make(recipe, tmp_path / "disk.qcow2")


def bench(uri, number, *options):
    """Seconds that `qemu-img bench` needs for that many requests of 4 KiB, 16 at a time."""
    said = peers.qemu_img(
        "bench", "-f", "raw", "-c", str(number), "-d", "16", "-s", "4096", *options, uri)
    return float(BENCH.search(said)[1])


def export_uri(uri, name):
    """The URI of another export of the same server."""
    return uri.replace("nbd+unix:///", f"nbd+unix:///{name}", 1)


@pytest.mark.clock
@pytest.mark.parametrize("options", [(), ("-w",)], ids=["read", "write"])
@pytest.mark.peer("qemu-img", "qemu-nbd")
def test_400_requests_take_as_long_as_with_qemus_throttle(image, options):
    throttle = {"driver": "throttle", "throttle-group": "g",
                "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}}
    name = "json:" + json.dumps({"driver": "raw", "file": throttle})
    group = ("--object", f"throttle-group,id=g,x-iops-total={IOPS}")
    with peers.qemu_nbd(name, *group, format="raw") as qemu:
        theirs = bench(qemu.uri, 400, *options)
    with peers.served(image, "--throttle", f"iops-total={IOPS}") as server:
        ours = bench(server.uri, 400, *options)
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours == pytest.approx(1.9, rel=0.05)


@pytest.mark.clock
@pytest.mark.peer("qemu-img")
def test_1000_requests_take_five_seconds(image):
    with peers.served(image, "--throttle", f"throttling.iops-total={IOPS}", "-t",
                      command="qemu-nbd") as server:
        assert bench(server.uri, 1000) == pytest.approx(4.95, rel=0.03)


@pytest.mark.clock
@pytest.mark.peer("qemu-img")
def test_exports_of_one_group_share_evenly_and_the_rate_holds_for_ten_seconds(image, tmp_path):
    other = make(Recipe(64 * MIB, fill=0, commands=("write -P 1 0 8M",)), tmp_path / "b.qcow2")
    with (
        peers.served(image, "--export", f"b={other}",
                     "--object", f"throttle-group,id=g,x-iops-total={IOPS}",
                     "--throttle", "group=g") as server,
        ThreadPoolExecutor(2) as clients,
    ):
        uris = [server.uri, export_uri(server.uri, "b")]
        first, second = clients.map(lambda uri: bench(uri, 1000), uris)
    # With fair turns nobody is done before the other has done nearly as much.
    assert max(first, second) == pytest.approx((2000 - 21) / IOPS, rel=0.03)
    assert min(first, second) == pytest.approx(max(first, second), rel=0.03)


@pytest.mark.clock
@pytest.mark.peer("qemu-img")
def test_who_waits_for_his_turn_does_not_slow_down_another_export(image, tmp_path):
    other = make(Recipe(64 * MIB, fill=0, commands=("write -P 1 0 8M",)), tmp_path / "b.qcow2")
    throttled = f"driver=throttle,throttle-group=g,file.driver=qcow2,file.file.filename={other}"
    with peers.served(
        f"driver=qcow2,file.filename={image}", "--image-opts", "--export", f"b={throttled}",
        "--object", "throttle-group,id=g,x-iops-total=1",
    ) as server:
        alone = min(bench(server.uri, REQUESTS) for _ in range(3))
        slow = BareClient(server.socket_path, export=b"b")
        slow.sock.sendall(b"".join(slow.request(slow.READ, n, 0, 512) for n in range(64)))
        beside = min(bench(server.uri, REQUESTS) for _ in range(3))
        slow.close()
    # Spinning, a queue shared, or a task that runs for those who wait would cost a multiple.
    assert beside < 1.5 * alone


@pytest.mark.clock
@pytest.mark.peer("qemu-img")
def test_bytes_are_limited_and_writethrough_pays_once(image):
    """2 MiB/s: a tenth of a second's worth at once, the rest at the rate."""
    with peers.served(image, "--throttle", "bps-write=2M", "--cache=writethrough") as server:
        seconds = bench(server.uri, 1024, "-w")
        assert seconds == pytest.approx((4 - 0.2) / 2, rel=0.05)
        assert bench(server.uri, 1024) < seconds / 2  # reads are not


@pytest.mark.peer("qemu-img")
def test_a_flush_is_not_held_up_and_a_stop_lets_go_what_is(image):
    with peers.served(image, "--throttle", "iops-total=1") as server:
        one = BareClient(server.socket_path)
        writes = [one.request(one.WRITE, n, n * 64 * KIB, bytes([n]) * 512) for n in range(1, 40)]
        start = time.monotonic()
        one.sock.sendall(b"".join(writes) + one.request(one.FLUSH, 99, 0, 0))
        replies = one.replies()
        early = [next(replies), next(replies), next(replies)]  # the flush, and what fits in
        assert (99, 0) in early
        server.stop()
        assert time.monotonic() - start < SOON
        rest = list(replies)
        one.close()
    assert sorted(early + rest) == [(n, 0) for n in (*range(1, 40), 99)]
    peers.qemu_io(image, *(f"read -P {n} {n * 64}k 512" for n in range(1, 40)), options=("-r",))
    peers.qemu_img_check(image)


@pytest.mark.peer("qemu-img")
def test_contradictions_are_refused_in_one_line(image):
    for command in ("serve", "qemu-nbd"):
        said = refused("--throttle", "bps-total=1M,bps-read=1M", image, command=command)
        assert "bps-total and bps-read cannot both be set" in said

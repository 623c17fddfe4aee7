"""nbdkit's own filters in front of the plugin."""

import filecmp

import pytest

import peers
from interop.images import MIB, Recipe, make, write_disk
from interop.tools import BareClient, sha256
from strace import Kind, Log

from .conftest import BY_HAND

SIZE = 8 * MIB
WRITES = ("write -P 1 0 1M", "write -P 2 3M 70k", "write -z 512k 64k", "discard 5M 1M",
          "write -f -P 3 1M 4k", "flush")
READS = ("read -P 1 0 512k", "read -P 0 512k 64k", "read -P 2 3M 70k", "read -P 3 1M 4k")


@pytest.fixture
def image(tmp_path):
    return make(Recipe(SIZE, commands=("write -P 9 2M 1M",), fill=0), tmp_path / "disk.qcow2")


@pytest.fixture
def served():
    return BY_HAND


def change(uri):
    peers.qemu_io(uri, *WRITES, *READS, "read -P 9 2M 1M", options=("-f", "raw", "-d", "unmap"))


@pytest.mark.peer("nbdkit", "qemu-io", "qemu-img", peers.SYSTEM_TRIO)
def test_cow_leaves_the_image_as_it_is(served, image):
    digest = sha256(image)
    with peers.nbdkit("--filter=cow", *served.plugin, f"file={image}") as server:
        change(server.uri)
    assert sha256(image) == digest


@pytest.mark.parametrize("options", [
    ("--filter=cache",),
    ("--filter=cache", "cache=writethrough"),  # the filter's parameter: it hears it first
    ("--filter=rate", "rate=400M"),
    ("--filter=fua", "fuamode=discard"),
    ("--filter=fua", "fuamode=pass"),
    ("--filter=fua", "fuamode=emulate"),
    ("--filter=fua", "fuamode=native"),
    ("--filter=fua", "fuamode=force"),
    ("--filter=blocksize", "--filter=cache", "minblock=4096"),
    ("--filter=nozero",),
    ("--filter=noextents", "--filter=log", "logfile=/dev/null"),
], ids=" ".join)
@pytest.mark.peer("nbdkit", "qemu-io", "qemu-img", peers.SYSTEM_TRIO)
def test_what_is_written_through_filters_arrives(served, image, options):
    filters = [word for word in options if word.startswith("--")]
    parameters = [word for word in options if not word.startswith("--")]
    with peers.nbdkit(*filters, *served.plugin, f"file={image}", *parameters) as server:
        change(server.uri)
    peers.qemu_img_check(image)
    peers.qemu_io(image, *READS, "read -P 9 2M 1M")


@pytest.mark.peer("nbdkit", "nbdcopy", "qemu-img", peers.SYSTEM_TRIO)
def test_a_copy_through_a_stack_of_filters(served, image, tmp_path):
    source = tmp_path / "source"
    write_disk(source, SIZE)
    with peers.nbdkit("--filter=cache", "--filter=rate", "--filter=fua", *served.plugin,
                      f"file={image}", "fuamode=emulate", "rate=4G") as server:
        peers.run("nbdcopy", "--flush", source, server.uri)
        peers.run("nbdcopy", server.uri, tmp_path / "out")
    assert filecmp.cmp(source, tmp_path / "out", shallow=False)
    peers.qemu_img_check(image)
    peers.qemu_img_compare(source, image)


@pytest.mark.peer("nbdkit", "qemu-io", peers.SYSTEM_TRIO)
def test_the_error_filter_stops_what_it_stops_and_no_more(served, image):
    with peers.nbdkit("--filter=error", *served.plugin, f"file={image}",
                      "error-pwrite=ENOSPC", "error-pwrite-rate=100%") as server:
        said = peers.run("qemu-io", "-f", "raw", "-c", "write 0 4k", server.uri, check=False)
        assert "No space left on device" in said.stdout + said.stderr
        peers.qemu_io(server.uri, "read -P 9 2M 1M", "write -z 0 64k", options=("-f", "raw"))
    peers.qemu_img_check(image)


@pytest.mark.parametrize(("fuamode", "flags", "is_durable"), [
    (None, BareClient.FUA, True),  # our own
    ("emulate", BareClient.FUA, True),
    ("native", BareClient.FUA, True),
    ("force", 0, True),
    (None, 0, False),  # it sees the difference
])
@pytest.mark.peer("nbdkit", peers.STRACE, peers.SYSTEM_TRIO)
def test_a_fua_write_is_durable_when_it_is_answered(
    served, image, tmp_path, fuamode, flags, is_durable
):
    """Whatever was written to the image by the time of the answer was synced by then, too."""
    log = Log(tmp_path / "trace")
    fua = [] if fuamode is None else ["--filter=fua"]
    mode = [] if fuamode is None else [f"fuamode={fuamode}"]
    with peers.nbdkit(*fua, *served.plugin, f"file={image}", "aio=threads", *mode,
                      program=(*log.command(), "nbdkit")) as server:
        client = BareClient(server.socket_path)
        for number in range(3):  # the first is followed by a flush, whatever it is
            offset = 2 * MIB + number * 4096
            client.ask(client.request(client.WRITE, number, offset, b"x" * 4096, flags))
        calls = sorted(log.accesses(image), key=lambda call: call.place)
        client.close()
    assert [call for call in calls if call.kind is Kind.WRITE]
    unsynced = []
    for call in calls:
        if call.kind is Kind.SYNC:
            unsynced.clear()
        elif call.kind is Kind.WRITE and not call.dsync:
            unsynced.append(call)
    assert (not unsynced) == is_durable

"""Faults as real clients see them, through a server process whose options say them."""

import errno
import json
import time

import pytest

import peers
from interop.images import KIB, MIB, Recipe, make
from interop.tools import NBDSERVE, Client, refused, wait_until

SOON = 4.0
"""Seconds; the server waits 5 for requests in flight, so less means that it let them go."""

# A client that does what it is told, [[what, offset, length], ...], and prints for each the name of
# the error, "", or what was read.
SCRIPT = """
import errno, json, sys, nbd
handle = nbd.NBD()
handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
handle.connect_uri(sys.argv[1])
said = []
for what, offset, length in json.loads(sys.argv[2]):
    calls = {
        "read": lambda: handle.pread(length, offset).hex(),
        "write": lambda: handle.pwrite(b"w" * length, offset),
        "fua": lambda: handle.pwrite(b"w" * length, offset, nbd.CMD_FLAG_FUA),
        "write-zeroes": lambda: handle.zero(length, offset),
        "discard": lambda: handle.trim(length, offset),
        "flush": handle.flush,
        "block-status": lambda: handle.block_status(length, offset, lambda *_: 0),
    }
    try:
        said.append(calls[what]() or "")
    except nbd.Error as error:
        said.append(error.errno or "no errno")
    if handle.aio_is_dead() or handle.aio_is_closed():
        said.append("dead")
        break
else:
    handle.shutdown()
print(json.dumps(said))
"""

FAILING = {
    "read": "EIO", "write": "ENOSPC", "write-zeroes": "EPERM", "discard": "ENOMEM",
    "flush": "EINVAL", "block-status": "EOPNOTSUPP",
}  # fmt: skip

libnbd = pytest.mark.peer(peers.LIBNBD, "qemu-img")


def perform(uri, *requests):
    requests = [(what, *rest) if rest else (what, 0, 64 * KIB) for what, *rest in requests]
    return json.loads(peers.libnbd(SCRIPT, uri, json.dumps(requests)))


@pytest.fixture
def image(tmp_path):
    """Its first MiB is data."""
    return make(Recipe(8 * MIB, fill=0, commands=("write -P 1 0 1M",)), tmp_path / "disk.qcow2")


def above(image, *options):
    """--image-opts with the faults above the format."""
    return f"driver=fault,{','.join(options)},file.driver=qcow2,file.file.filename={image}"


def below(image, *options):
    """--image-opts with the faults below the format."""
    text = "".join(f"file.{option}," for option in options)
    return f"driver=qcow2,file.driver=fault,{text}file.file.filename={image}"


def faulty(tree, *options):
    """A server of such a tree, which says what it does."""
    return peers.served(tree, "--image-opts", "-v", *options)


@libnbd
def test_each_operation_fails_with_an_error_of_its_own_and_then_no_more(image):
    """On one connection, which an error does not end."""
    options = [f"faults.{number}.{option}" for number, (op, name) in enumerate(FAILING.items())
               for option in (f"ops={op}", f"error={name}", "count=2")]  # fmt: skip
    with faulty(above(image, *options)) as server:
        said = perform(server.uri, *[(op,) for op in FAILING] * 3)
        names = [{"EOPNOTSUPP": "ENOTSUP"}.get(name, name) for name in FAILING.values()]
        assert said[:12] == names * 2
        assert said[13:] == [""] * 5
        assert len(said[12]) == 128 * KIB  # what was read
        for number, (op, name) in enumerate(FAILING.items()):
            request = op if op == "flush" else f"{op} of 65536 bytes at 0"
            assert f"{image}: {request} fails with {name} [fault {number}, match 2]" in (
                server.stderr()
            )
    peers.qemu_img_check(image)


NBD_ERRORS = {
    "EROFS": "EPERM", "EACCES": "EPERM", "EDQUOT": "ENOSPC", "EFBIG": "ENOSPC",
    "ESHUTDOWN": "ESHUTDOWN", "EOVERFLOW": "EOVERFLOW", "ETIMEDOUT": "EIO", "ENOENT": "EIO",
}  # fmt: skip


@libnbd
def test_what_other_errors_become(image):
    """The table in docs/faults.md."""
    options = [f"faults.{number}.{option}" for number, name in enumerate(NBD_ERRORS)
               for option in (f"error={name}", "count=1", "ops=write")]  # fmt: skip
    with faulty(above(image, *options)) as server:
        assert perform(server.uri, *[("write",)] * 9) == [*NBD_ERRORS.values(), ""]


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_fault_in_a_range(image):
    options = ("faults.0.error=EIO", "faults.0.offset=128k", "faults.0.length=512")
    with faulty(above(image, *options)) as server:
        peers.qemu_io(server.uri, "read -P 1 0 128k", "read -P 1 131584 64k", "flush",
                      "write -P 2 64k 64k", options=("-f", "raw"))  # fmt: skip
        for command in ("read 128k 512", "read 0 1M", "write 131583 1"):
            done = peers.run("qemu-io", "-f", "raw", "-c", command, server.uri, check=False)
            assert "failed: Input/output error" in done.stdout + done.stderr


@libnbd
def test_a_fault_that_a_file_switches_on_and_off(image, tmp_path):
    broken = tmp_path / "broken"
    options = ("faults.0.ops=write+flush", "faults.0.error=EIO", f"faults.0.if-file={broken}")
    with faulty(above(image, *options)) as server:
        for _ in range(2):
            assert perform(server.uri, ("write",), ("flush",)) == ["", ""]
            broken.touch()
            assert perform(server.uri, ("write",), ("flush",)) == ["EIO", "EIO"]
            broken.unlink()
    peers.qemu_img_check(image)


@libnbd
def test_stuck_until_the_file_is_gone(image, tmp_path):
    broken = tmp_path / "broken"
    broken.touch()
    options = ("faults.0.ops=write", "faults.0.stuck=on", f"faults.0.if-file={broken}")
    with faulty(above(image, *options)) as server:
        one = Client(server.socket_path)
        for number in range(3):
            one.sock.sendall(one.request(one.WRITE, number, number * 512, b"s" * 512))
        wait_until(lambda: server.stderr().count("is stuck") == 3)
        assert perform(server.uri, ("read", 0, 4)) == ["01010101"]
        broken.unlink()
        replies = one.replies()
        assert sorted(next(replies) for _ in range(3)) == [(0, 0), (1, 0), (2, 0)]
        assert one.flush() == 0
        one.close()
        assert perform(server.uri, ("read", 1024, 2)) == ["7373"]
    peers.qemu_img_check(image)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("place", [above, below])
def test_a_stop_lets_go_what_is_stuck_and_what_is_held_up(image, place):
    """Below the format the closing of the image writes too, and is not stuck either."""
    options = ("faults.0.ops=write", "faults.0.stuck=on", "faults.1.ops=flush",
               "faults.1.delay=1000")  # fmt: skip
    with faulty(place(image, *options)) as server:
        one = Client(server.socket_path)
        one.sock.sendall(one.request(one.WRITE, 1, 4 * MIB, b"s" * 512))
        wait_until(lambda: "is stuck" in server.stderr())
        one.sock.sendall(one.request(one.FLUSH, 2, 0, 0))
        if place is above:
            wait_until(lambda: "is held up for 1000" in server.stderr())
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < SOON
        assert sorted(one.replies()) == [(1, 0), (2, 0)]
        one.close()
    peers.qemu_img_check(image)
    peers.qemu_io(image, "read -P 115 4M 512", options=("-r",))


@pytest.mark.peer("qemu-img")
def test_a_client_that_goes_while_its_request_is_stuck_does_not_keep_the_server(image):
    with faulty(above(image, "faults.0.ops=write", "faults.0.stuck=on")) as server:
        one, other = Client(server.socket_path), Client(server.socket_path)
        one.sock.sendall(one.request(one.WRITE, 1, 0, b"s" * 512))
        wait_until(lambda: "is stuck" in server.stderr())
        one.close()
        wait_until(lambda: "the client closed the connection" in server.stderr())
        assert other.perform(other.READ, 0, 512) == (0, b"\1" * 512)
        other.close()
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < SOON
    peers.qemu_img_check(image)


@libnbd
def test_a_disconnect_is_the_end_for_one_client_and_no_other(image):
    options = ("faults.0.ops=write", "faults.0.disconnect=on", "faults.0.after=2",
               "faults.0.count=1")  # fmt: skip
    with faulty(above(image, *options)) as server:
        beside = Client(server.socket_path)
        said = perform(server.uri, *[("write", n * 512, 512) for n in range(5)])
        assert said[:2] == ["", ""]
        assert said[2] != ""
        assert said[3:] == ["dead"]
        assert beside.perform(beside.READ, 1024, 512) == (0, b"\1" * 512)  # it was not done
        assert beside.write(1024, b"x" * 512) == 0
        beside.close()
        assert perform(server.uri, ("write", 0, 512)) == [""]
    peers.qemu_img_check(image)


@libnbd
@pytest.mark.parametrize("silent", ["on", "off"])
def test_a_torn_write(image, silent):
    with faulty(above(image, "seed=3", "faults.0.torn=on", f"faults.0.silent={silent}")) as server:
        said = perform(server.uri, ("write", 0, 4096), ("flush",), ("read", 0, 4096))
        assert said[:2] == ["" if silent == "on" else "EIO", ""]
        data = bytes.fromhex(said[2])
        sectors = [data[start : start + 512] for start in range(0, 4096, 512)]
        assert set(sectors) == {b"w" * 512, b"\1" * 512}
    peers.qemu_img_check(image)
    peers.qemu_io(image, *(
        f"read -P {sector[0]} {number * 512} 512" for number, sector in enumerate(sectors)
    ), options=("-r",))  # fmt: skip


@libnbd
def test_a_short_write_and_one_that_is_lost(image):
    options = ("faults.0.ops=write", "faults.0.short=2", "faults.0.error=ENOSPC",
               "faults.0.count=1", "faults.1.ops=write", "faults.1.lost=on")  # fmt: skip
    with faulty(above(image, *options)) as server:
        said = perform(server.uri, ("write", 0, 4096), ("read", 1020, 8), ("fua", 4096, 512),
                       ("read", 4096, 4))  # fmt: skip
        assert said == ["ENOSPC", "7777777701010101", "", "01010101"]
    peers.qemu_img_check(image)


@libnbd
def test_bits_are_flipped_on_the_way_and_not_in_the_image(image):
    options = ("faults.0.flip-bits=2", "faults.0.offset=64k", "faults.0.length=4")
    with faulty(above(image, *options)) as server:
        said = perform(server.uri, ("read", 64 * KIB, 4), ("read", 64 * KIB, 4), ("read", 0, 4))
        assert said[0] == said[1]
        assert bin(int(said[0], 16) ^ 0x01010101).count("1") == 2
        assert said[2] == "01010101"
    peers.qemu_io(image, "read -P 1 0 1M", options=("-r",))


@libnbd
def test_no_room(image):
    """The image's first MiB is data, so 256 KiB of room are four clusters more."""
    with faulty(above(image, "room=256k")) as server:
        said = perform(
            server.uri, *[("write", 4 * MIB + n * 64 * KIB, 64 * KIB) for n in range(6)],
            ("write", 0, 64 * KIB), ("fua", 4 * MIB, 64 * KIB), ("flush",),
            ("discard", 128 * KIB, 64 * KIB), ("write", 5 * MIB, 64 * KIB),
            ("write", 6 * MIB, 1), ("write-zeroes", 0, 64 * KIB), ("write", 6 * MIB, 1),
        )  # fmt: skip
        assert said == [*[""] * 4, *["ENOSPC"] * 2, *[""] * 5, "ENOSPC", "", ""]
    peers.qemu_img_check(image)


@libnbd
def test_delay_and_bandwidth(image):
    """By the clock, but only by what must have passed."""
    options = ("faults.0.ops=flush", "faults.0.delay=0.2", "faults.1.ops=write", "faults.1.bps=1M")
    with faulty(above(image, *options)) as server:
        start = time.monotonic()
        perform(server.uri, ("flush",))
        assert time.monotonic() - start > 0.2
        start = time.monotonic()
        perform(server.uri, *[("write", 0, 128 * KIB)] * 4)
        assert time.monotonic() - start > (3 * 128 - 103) / 1024


@pytest.mark.peer("qemu-img", "qemu-io")
@pytest.mark.parametrize("fault", [
    ("error=ENOSPC", "count=9"), ("error=EIO", "probability=0.4"), ("torn=on", "count=5"),
    ("short=1", "after=2"),
], ids=["full", "now and then", "torn", "short"])  # fmt: skip
def test_below_the_format_it_is_the_file_that_fails_and_the_image_stays_sound(
    image, tmp_path, fault
):
    """While it does, and once it does no more; whatever was acknowledged and flushed is there."""
    broken = tmp_path / "broken"
    broken.touch()
    options = [f"faults.0.{option}" for option in
               ("ops=write+write-zeroes", f"if-file={broken}", *fault)]  # fmt: skip
    written = {}
    with faulty(below(image, *options)) as server:
        client = Client(server.socket_path)
        for number in range(60):
            offset, value = (number * 7 % 64) * 96 * KIB % (7 * MIB), 2 + number
            error = client.write(offset, bytes([value]) * 10_000)
            assert error in (0, errno.EIO, errno.ENOSPC)
            if number % 8 == 0:
                client.flush()
            for at in [at for at in written if abs(at - offset) < 10_000]:
                del written[at]
            if not error:
                written[offset] = value
        assert "[fault 0, match " in server.stderr()
        broken.unlink()
        assert client.write(0, b"\1" * 512) == 0
        assert client.flush() == 0
        for offset, value in written.items():
            if offset:
                assert client.perform(client.READ, offset, 10_000) == (0, bytes([value]) * 10_000)
        client.close()
    peers.qemu_img_check(image)
    peers.qemu_io(image, *(
        f"read -P {value} {offset} 10000" for offset, value in written.items() if offset
    ), options=("-r",))  # fmt: skip


@libnbd
def test_the_short_form_and_beside_image_opts(image):
    """It is what clients see: above all nodes, and above the window of --offset."""
    faults = ("--fault", "write,error=EIO,length=64k", "--fault=ops=read,flip-bits=1,offset=64k")
    with peers.served(image, "--offset=512k", *faults) as server:
        said = perform(server.uri, ("write", 0, 512), ("write", 64 * KIB, 512), ("read", 0, 2),
                       ("read", 64 * KIB, 2))  # fmt: skip
        assert said[:3] == ["EIO", "", "0101"]
        assert bin(int(said[3], 16) ^ 0x7777).count("1") == 1
    tree = above(image, "faults.0.ops=write", "faults.0.error=ENOSPC", "faults.0.count=1")
    with peers.served(tree, "--image-opts", "--fault=write,error=EROFS,count=1") as server:
        assert perform(server.uri, *[("write",)] * 3) == ["EPERM", "ENOSPC", ""]


def test_what_makes_no_sense_is_refused_in_one_line(image):
    line = refused(image, "--fault", "read,torn=on")
    assert line == "nbdserve: --fault: torn: read cannot have it, only write+write-zeroes\n"
    line = refused(above(image, "faults.0.error=EIO,faults.1.delay=long"), "--image-opts")
    assert line.startswith("nbdserve: --image-opts: faults.1.delay: 'long' is not a number of")
    said = peers.run(*NBDSERVE, "serve", "--help").stdout
    assert "--fault" in said


@libnbd
def test_a_seed_tells_what_happens(image, tmp_path):
    """Two servers, the same requests: the same fate. Another seed: another."""
    def fate(seed):
        options = (f"seed={seed}", "faults.0.ops=write", "faults.0.error=EIO",
                   "faults.0.probability=0.5")  # fmt: skip
        with faulty(above(image, *options)) as server:
            assert f"faults by seed {seed}" in server.stderr()
            return perform(server.uri, *[("write", 0, 512)] * 32)

    first = fate(7)
    assert set(first) == {"", "EIO"}
    assert first == fate(7) != fate(8)

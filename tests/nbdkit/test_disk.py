"""A disk as nbdkit's threads call it: all ways of a request, where no trio runs."""

import errno
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import peers
from nbdserve.config import CACHE_MODES, ImageConfig
from nbdserve.errors import ImageError
from nbdserve.faults import parse_fault
from nbdserve.formats.qcow2.create import create_image
from nbdserve.nbdkit.disk import Disk
from nbdserve.nbdkit.loop import Loop

MIB = 1 << 20
SIZE = 8 * MIB
DIRECT = pytest.mark.peer(peers.O_DIRECT)


@pytest.fixture
def loop():
    """Closes what a failed test left open."""
    loop, images = Loop(), []
    loop.start()
    open_image, close_image = loop.open, loop.close

    def opened(config):
        images.append(open_image(config))
        return images[-1]

    def closed(image):
        images.remove(image)
        close_image(image)

    loop.open, loop.close = opened, closed
    yield loop
    for image in [*images]:
        closed(image)
    loop.stop()


@pytest.fixture
def path(tmp_path):
    create_image(str(tmp_path / "disk.qcow2"), SIZE)
    return tmp_path / "disk.qcow2"


@pytest.fixture(params=[
    "writeback", "writethrough", "unsafe",
    pytest.param("none", marks=DIRECT), pytest.param("directsync", marks=DIRECT),
])
def disk(request, loop, path):
    image = loop.open(ImageConfig(str(path), cache=CACHE_MODES[request.param]))
    disk = Disk(loop, image)
    yield disk
    disk.close()
    loop.close(image)


@pytest.mark.parametrize("aio", ["threads", pytest.param("io_uring", marks=pytest.mark.peer(
    peers.IO_URING))])
def test_threads_at_once_on_parts_of_their_own(loop, path, aio):
    """Allocations, overwrites, zeroes, trims, flushes: each thread reads what it wrote."""
    image = loop.open(ImageConfig(str(path), aio=aio))
    disk = Disk(loop, image)

    def work(number):
        rng = random.Random(number)
        first = number * MIB
        model = bytearray(MIB)
        for _ in range(60):
            length = rng.choice([512, 4096, 70_000])
            at = rng.randrange(0, MIB - length, 512)
            kind = rng.choice(["write", "write", "fua", "zero", "flush", "read", "trim"])
            if kind in ("write", "fua"):
                data = rng.randbytes(length)
                disk.write(first + at, memoryview(data), fua=kind == "fua")
                model[at : at + length] = data
            elif kind in ("zero", "trim"):  # without a backing file a trim of ours leaves zeroes
                disk.zero(first + at, length, may_trim=kind == "trim", fast=False, fua=False)
                model[at : at + length] = bytes(length)
            elif kind == "flush":
                disk.flush()
            else:
                buffer = bytearray(length)
                disk.read(first + at, memoryview(buffer))
                assert buffer == model[at : at + length]
        whole = bytearray(MIB)
        disk.read(first, memoryview(whole))
        assert whole == model
        return number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
    counted = disk.backend.accounts.total().operations
    assert counted["rd"].succeeded
    assert counted["wr"].succeeded
    assert not counted["wr"].failed
    disk.close()
    loop.close(image)


def test_what_resolves_is_done_in_the_calling_thread(loop, path, monkeypatch):
    image = loop.open(ImageConfig(str(path)))
    disk = Disk(loop, image)
    disk.write(0, memoryview(b"1" * 4096), fua=False)  # the tables are in memory now

    def fail(*_args: object) -> None:
        raise AssertionError("a hop")

    monkeypatch.setattr(loop, "call", fail)
    disk.write(0, memoryview(b"2" * 4096), fua=False)
    disk.write(5 * MIB, memoryview(b"3" * 4096), fua=False)  # allocates
    buffer = bytearray(4096)
    disk.read(0, memoryview(buffer))
    assert buffer == b"2" * 4096
    disk.read(2 * MIB, memoryview(buffer))
    assert buffer == bytes(4096)
    monkeypatch.undo()
    disk.flush()
    disk.flush()
    monkeypatch.setattr(loop, "call", fail)
    disk.flush()
    monkeypatch.undo()
    disk.close()
    loop.close(image)


def test_every_kind_of_request_in_every_mode(disk):
    disk.write(0, memoryview(b"a" * 5000), fua=False)
    disk.write(MIB, memoryview(b"b" * 4096), fua=True)
    disk.write(MIB, memoryview(b"c" * 4096), fua=True)
    disk.zero(0, 1000, may_trim=True, fast=False, fua=True)
    disk.trim(3 * MIB, MIB, fua=False)
    disk.cache(0, 2 * MIB)
    disk.flush()
    buffer = bytearray(5000)
    disk.read(0, memoryview(buffer))
    assert buffer == bytes(1000) + b"a" * 4000
    pieces = disk.extents(0, SIZE, one=False)
    assert sum(piece.length for piece in pieces) == SIZE
    assert not pieces[-1].data
    assert len(disk.extents(0, SIZE, one=True)) == 1


def test_what_a_foreign_thread_frees_is_settled(loop, path):
    """The node's background task is woken though no trio runs in the thread that wakes it."""
    image = loop.open(ImageConfig(str(path)))
    node = image.backend.root
    flushed = threading.Event()
    flush = node.flush

    async def noted() -> None:
        await flush()
        flushed.set()

    node.flush = noted
    loop.turn.enter()
    node.wanted.set()
    loop.turn.leave()
    assert flushed.wait(20)
    node.flush = flush
    loop.close(image)


def test_errors_come_with_their_number(loop, path):
    faults = (parse_fault("ops=write,error=ENOSPC"), parse_fault("ops=read,error=EIO"))
    image = loop.open(ImageConfig(str(path), faults=faults))
    disk = Disk(loop, image)
    with pytest.raises(OSError, match="a fault") as raised:
        disk.write(0, memoryview(b"x" * 512), fua=False)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="a fault") as raised:
        disk.read(0, memoryview(bytearray(512)))
    assert raised.value.errno == errno.EIO
    counted = image.backend.accounts.total().operations
    assert (counted["wr"].failed, counted["rd"].failed) == (1, 1)
    disk.close()
    loop.close(image)


def test_a_bad_image_is_refused_and_the_loop_goes_on(loop, path, tmp_path):
    (tmp_path / "bad").write_bytes(b"QFI\xfb")
    with pytest.raises(ImageError, match="bad"):
        loop.open(ImageConfig(str(tmp_path / "bad"), "qcow2"))
    loop.close(loop.open(ImageConfig(str(path))))

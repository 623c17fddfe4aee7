"""O_DIRECT: whatever is not aligned, ends of files, rewrites that overlap."""

import errno
import fcntl
import os
import random

import pytest
import trio

import peers
from facilities import folder_in_memory, lacking
from fakes import no_descriptor_left
from nbdserve.block.buffers import BufferPool
from nbdserve.drivers.alignment import Alignment, direct_alignment, probe
from nbdserve.drivers.open import open_file
from nbdserve.errors import ImageError

pytestmark = pytest.mark.peer(peers.O_DIRECT)

LONG = 20.0


@pytest.fixture(params=[512, 4096])
async def open_direct(engine, request):
    nodes = []

    def open_direct(path):
        node = open_file(str(path), engine, read_only=False, discard=True, direct=BufferPool())
        nodes.append(node)
        if node.alignment.request <= request.param:  # a disk of larger blocks, as if
            node.alignment = Alignment(request.param, request.param)
            node._in_block = node._in_memory = request.param - 1
        return node

    yield open_direct
    for node in nodes:
        await node.close()


async def read(node, offset, length):
    data = memoryview(bytearray(b"\xee" * length))
    await node.read(offset, data)
    return bytes(data)


@pytest.mark.parametrize("length", [0, 1, 1000, 4096, 10000])
async def test_the_end_of_the_file_keeps_its_place(tmp_path, open_direct, length):
    path = tmp_path / "file"
    model = bytearray(random.Random(3).randbytes(length))
    path.write_bytes(model)
    node = open_direct(path)
    rng = random.Random(length)
    for _ in range(60):
        offset, nb_bytes = rng.randrange(12000), rng.choice((1, 100, 511, 512, 4096, 5000))
        data = rng.randbytes(nb_bytes)
        model.extend(bytes(max(0, offset + nb_bytes - len(model))))
        model[offset : offset + nb_bytes] = data
        await node.write(offset, data)
        assert node.length == len(model) == path.stat().st_size
        start = rng.randrange(13000)
        assert await read(node, start, 777) == bytes(model[start : start + 777]).ljust(777, b"\0")
    assert path.read_bytes() == model


@pytest.mark.parametrize("seed", range(3))
async def test_overlapping_requests_in_flight_lose_nothing(tmp_path, open_direct, seed):
    """Each writer owns one residue of the bytes of each block, so that all writes share blocks
    and none shares a byte: after any order of theirs every byte is its owner's last."""
    path = tmp_path / "file"
    size, writers = 16384, 8
    model = bytearray(random.Random(seed).randbytes(size))
    path.write_bytes(model)
    node = open_direct(path)
    piece = 64

    async def writer(number):
        rng = random.Random(f"{seed} {number}")
        for _ in range(40):
            index = rng.randrange(size // piece // writers) * writers + number
            offset = index * piece
            length = rng.randrange(1, piece + 1)
            if rng.random() < 0.1:
                await node.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            else:
                data = rng.randbytes(length)
                await node.writev(offset, (data[:1], data[1:]))
                model[offset : offset + length] = data

    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            for number in range(writers):
                nursery.start_soon(writer, number)
    assert path.read_bytes() == model
    assert await read(node, 0, size) == model
    assert node.gate.statistics() == (0, 0)
    assert node.statistics()["rewritten_blocks"] > 0


async def test_whole_blocks_and_parts_of_them_at_once(tmp_path, open_direct):
    """A block is either what the whole-block write left, or that with the part over it, or the
    part under it; never the old bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"o" * 65536)
    node = open_direct(path)

    async def whole(index):
        await node.write(index * 4096, b"w" * 4096)

    async def part(index):
        await node.write(index * 4096 + 10, b"p" * 100)

    async with trio.open_nursery() as nursery:
        for index in range(16):
            for task in random.Random(index).sample([whole, part, part], 3):
                nursery.start_soon(task, index)
    content = path.read_bytes()
    for index in range(16):
        block = content[index * 4096 : (index + 1) * 4096]
        assert block in (b"w" * 4096, b"w" * 10 + b"p" * 100 + b"w" * 3986)


async def test_a_cancelled_zeroing_that_waits_leaves_the_gate(tmp_path, open_direct):
    path = tmp_path / "file"
    path.write_bytes(b"o" * 65536)
    node = open_direct(path)
    token = node.gate.enter(0, 4096, lambda: None, serialising=True)
    with trio.move_on_after(0.01) as scope:
        await node.discard(0, 4096)
    assert scope.cancelled_caught
    node.gate.leave(token)
    assert node.gate.statistics() == (0, 0)


async def test_a_write_at_an_odd_end_has_the_file_to_itself(tmp_path, open_direct):
    """It goes through the page cache, where a page holds blocks that O_DIRECT may be writing."""
    path = tmp_path / "file"
    path.write_bytes(b"o" * 65000)
    node = open_direct(path)
    started, finished = [], []
    submit_write = node._engine.submit_write

    def observed(fd, data, offset, done, **options):
        started.append(offset)
        submit_write(fd, data, offset, done, **options)

    node._engine.submit_write = observed
    blocks = BufferPool().take(4096)
    blocks[:] = b"n" * 4096
    node.submit_write(0, blocks, finished.append)
    node.submit_write(64990, b"tail", finished.append)
    node.submit_write(4096, blocks, finished.append)
    assert started == [0]
    with trio.fail_after(LONG):
        await node._engine.idle()
    del node._engine.submit_write
    assert started == [0, 64990, 4096]
    assert finished == [None] * 3
    assert path.read_bytes() == b"n" * 8192 + b"o" * 56798 + b"tail" + b"o" * 6


async def test_a_write_that_fails_when_it_is_its_turn_says_so(tmp_path, open_direct, monkeypatch):
    """And those behind it go on: no descriptor for the page cache, say."""
    path = tmp_path / "file"
    path.write_bytes(b"o" * 1000)
    node = open_direct(path)
    found = []

    def none_left(offset, data, done, dsync):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(node, "submit_cached", none_left)
    with pytest.raises(OSError, match="Too many"):  # nobody before it: the caller hears of it
        node.submit_write(900, b"late", found.append)
    blocks = BufferPool().take(4096)
    blocks[:] = b"n" * 4096
    node.submit_write(4096, blocks, found.append)
    node.submit_write(9000, b"late", found.append)
    node.submit_write(8192, blocks, found.append)
    assert found == []
    with trio.fail_after(LONG):
        await node._engine.idle()
    assert sorted(error.errno if error else 0 for error in found) == [0, 0, errno.EMFILE]
    assert node.gate.statistics() == (0, 0)


@pytest.fixture
def small_blocks(tmp_path):
    """The disk's are smaller than pages."""
    (tmp_path / "probed").write_bytes(bytes(4096))
    fd = os.open(tmp_path / "probed", os.O_RDONLY | os.O_DIRECT)
    alignment = direct_alignment(fd, "probed", is_device=False)
    os.close(fd)
    if alignment.request > 512:
        lacking(f"{tmp_path} is on a disk with blocks of {alignment.request} bytes, not 512")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("open_direct", [512], indirect=True)
async def test_old_blocks_are_read_into_aligned_memory(tmp_path, open_direct):
    path = tmp_path / "file"
    path.write_bytes(b"o" * 8192)
    node = open_direct(path)
    node.alignment = Alignment(4096, 512)
    node._in_memory = 4095
    submit_old = node.submit_old
    seen = []

    def observed(start, blocks, done):
        seen.append((start, len(blocks), node.is_aligned(blocks)))
        submit_old(start, blocks, done)

    node.submit_old = observed
    await node.write(100, b"n" * 1000)
    assert seen == [(0, 1536, True)]
    await node.write(512, b"n" * 100)
    assert seen[1:] == [(512, 512, True)]
    assert path.read_bytes() == b"o" * 100 + b"n" * 1000 + b"o" * 7092


async def test_the_descriptor_is_not_a_non_blocking_one(tmp_path, open_direct):
    (tmp_path / "file").write_bytes(bytes(4096))
    flags = fcntl.fcntl(open_direct(tmp_path / "file").fd, fcntl.F_GETFL)
    assert flags & os.O_DIRECT
    assert not flags & os.O_NONBLOCK


@pytest.fixture
def in_memory():
    """A file of a block in a tmpfs."""
    with folder_in_memory() as folder:
        path = folder / "file"
        path.write_bytes(bytes(4096))
        yield str(path)


async def test_a_file_system_in_memory_is_refused(engine, in_memory):
    with pytest.raises(ImageError, match="O_DIRECT; use --cache=writeback"):
        open_file(in_memory, engine, read_only=True, direct=BufferPool())


@pytest.mark.parametrize("taken", [512, 1024, 2048, 4096])
def test_probing_finds_the_smallest_length(taken):
    def preadv(fd, buffers, offset):
        if len(buffers[0]) < taken:
            raise OSError(22, "Invalid argument")
        return len(buffers[0])

    assert probe(0, preadv) == taken


def test_probing_a_file_that_is_too_short_tells_nothing():
    assert probe(0, lambda fd, buffers, offset: 100) == 4096


# --- FUA -------------------------------------------------------------------------------------


@pytest.fixture
def handed_over(engine, monkeypatch):
    """(what, descriptor, durable) of what the engine is given, reads left out."""
    found = []
    submit_write, submit_fsync = engine.submit_write, engine.submit_fsync

    def write(fd, data, offset, done, *, dsync=False):
        found.append(("write", fd, dsync))
        submit_write(fd, data, offset, done, dsync=dsync)

    def fsync(fd, done):
        found.append(("sync", fd, False))
        submit_fsync(fd, done)

    monkeypatch.setattr(engine, "submit_write", write)
    monkeypatch.setattr(engine, "submit_fsync", fsync)
    return found


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 4096), (100, 1000), (4000, 200), (10000, 10), (9000, 5000), (20000, 7)],
    ids=["blocks", "within a block", "two parts", "the end", "over the end", "past the end"],
)
async def test_fua_is_one_durable_write(tmp_path, open_direct, handed_over, offset, length):
    path = tmp_path / "file"
    model = bytearray(random.Random(3).randbytes(10010))
    path.write_bytes(model)
    node = open_direct(path)
    data = random.Random(4).randbytes(length)
    model.extend(bytes(max(0, offset + length - len(model))))
    model[offset : offset + length] = data
    assert await node.write_fua(offset, data) is True
    [(what, fd, durable)] = handed_over
    assert (what, durable) == ("write", True)
    assert fd != node.fd
    assert node.flush_nowait() is True
    assert path.read_bytes() == model
    assert node.length == len(model)
    await node.write(offset, data)
    assert node.flush_nowait() is False
    await node.flush()
    assert [what for what, _, _ in handed_over] == ["write", "write", "sync"]


async def test_durable_and_other_writes_of_one_block_lose_nothing(tmp_path, open_direct):
    path = tmp_path / "file"
    path.write_bytes(b"o" * 8192)
    node = open_direct(path)
    async with trio.open_nursery() as nursery:
        for index in range(40):
            write = node.write_fua if index % 2 else node.write
            nursery.start_soon(write, index * 100, bytes([index]) * 100)
    content = path.read_bytes()
    assert content[4000:] == b"o" * 4192
    assert content[:4000] == b"".join(bytes([index]) * 100 for index in range(40))


async def test_durable_writes_leave_no_descriptor(tmp_path, engine):
    path = tmp_path / "file"
    path.write_bytes(b"o" * 8192)
    with no_descriptor_left():
        node = open_file(str(path), engine, read_only=False, direct=BufferPool())
        await node.write_fua(0, bytes(4096))
        await node.write_fua(8100, bytes(1000))
        await node.close()

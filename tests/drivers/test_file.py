"""The file driver: ends of files, the page cache, zeroes, holes, errors, devices.

Real files throughout; system calls are replaced only to make a kernel answer what this one will
not on demand (a short read, an EIO).
"""

import contextlib
import errno
import os
import pathlib
import random
import resource
import socket

import pytest

from facilities import folder_in_memory, loop_device, small_file_system
from fakes import no_descriptor_left
from nbdserve.block.flush import FlushFailed
from nbdserve.block.node import MAX_INLINE, Extent
from nbdserve.drivers import file as file_module
from nbdserve.drivers.file import MAX_PIECES, FileNode, OpenFile
from nbdserve.drivers.locks import PERMISSIONS, Role
from nbdserve.drivers.open import open_file
from nbdserve.engines import syscalls
from nbdserve.engines.engine import completion
from nbdserve.engines.threads import ThreadsEngine
from nbdserve.engines.transfer import IOV_MAX, write_all
from nbdserve.errors import ImageError, LockedError

BLOCK = 4096


@pytest.fixture
async def engine():
    engine = ThreadsEngine(max_threads=4)
    yield engine
    await engine.idle()
    engine.close()


@pytest.fixture
def path(tmp_path):
    """An image of 16 blocks of random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(5).randbytes(16 * BLOCK))
    return path


@pytest.fixture
async def open_node(engine):
    """Opens files, and closes those that the test has not closed."""
    nodes = []

    def open_node(path, **options):
        node = open_file(str(path), engine, **{"read_only": False, "discard": True, **options})
        nodes.append(node)
        return node

    yield open_node
    for node in nodes:
        with contextlib.suppress(OSError):  # closed, or its flush is meant to fail
            await node.close()


def buffer(length):
    return memoryview(bytearray(b"\xee" * length))


async def read_both_ways(node, offset, length):
    """What a range reads as; the two ways must agree."""
    slow, fast = buffer(length), buffer(length)
    await node.read(offset, slow)
    assert node.read_nowait(offset, fast)
    assert fast == slow
    return bytes(slow)


# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "size"), [(0, 0), (1, 512), (512, 512), (1000, 1024)])
async def test_size_is_in_whole_sectors(tmp_path, open_node, length, size):
    (tmp_path / "odd").write_bytes(b"x" * length)
    node = open_node(tmp_path / "odd")
    assert (node.length, node.size, node.is_device) == (length, size, False)


def make_fifo(path):
    os.mkfifo(path)


def make_directory(path):
    path.mkdir()


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_dangling_link(path):
    path.symlink_to("nowhere")


def make_link_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize(
    "make", [make_fifo, make_directory, make_socket, make_dangling_link, make_link_loop, None]
)
async def test_what_is_no_image_is_refused_in_one_line(tmp_path, open_node, make, read_only):
    path = tmp_path / "thing"
    if make is not None:
        make(path)
    with no_descriptor_left(), pytest.raises(ImageError) as caught:
        open_node(path, read_only=read_only)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.errno


async def test_a_character_device_is_no_image(open_node):
    with no_descriptor_left(), pytest.raises(ImageError, match="neither a regular file nor"):
        open_node("/dev/null")


async def test_a_file_that_cannot_be_looked_at_is_closed_again(path, open_node, monkeypatch):
    def fail(fd):
        raise OSError(errno.ESTALE, "Stale file handle")

    with no_descriptor_left():
        monkeypatch.setattr(file_module.os, "fstat", fail)
        with pytest.raises(ImageError, match=r"disk\.img: Stale file handle"):
            open_node(path)
        monkeypatch.undo()


async def test_what_somebody_appended_before_the_lock_was_ours_is_seen(path, open_node):
    """Between open and lock another program may finish its work on the image."""
    node = open_node(path)
    path.write_bytes(path.read_bytes() + b"tail")
    node.lock(*PERMISSIONS[Role.FORMAT_RW])
    assert node.length == 16 * BLOCK + 4
    assert node.size == 16 * BLOCK + 512


async def test_two_writers_of_a_format_exclude_each_other(path, open_node):
    first, second = open_node(path), open_node(path)
    first.lock(*PERMISSIONS[Role.FORMAT_RW])
    with pytest.raises(LockedError, match=r"disk\.img: in use by"):
        second.lock(*PERMISSIONS[Role.FORMAT_RW])
    await first.close()
    second.lock(*PERMISSIONS[Role.FORMAT_RW])


# --- reading ---------------------------------------------------------------------------------


async def test_reads_find_what_is_there(path, open_node):
    node, content = open_node(path), path.read_bytes()
    for offset, length in [(0, 1), (1, 4095), (5000, 9000), (16 * BLOCK - 1, 1)]:
        assert await read_both_ways(node, offset, length) == content[offset : offset + length]


@pytest.mark.parametrize("length", [1, 511, 1000, 1024])
async def test_past_the_end_everything_reads_as_zeroes(tmp_path, open_node, length):
    (tmp_path / "short").write_bytes(b"x" * length)
    node = open_node(tmp_path / "short")
    assert await read_both_ways(node, 0, 2048) == b"x" * length + bytes(2048 - length)
    assert await read_both_ways(node, length, 300) == bytes(300)
    assert await read_both_ways(node, 1 << 40, 300) == bytes(300)


async def test_reading_nothing(path, open_node):
    assert await read_both_ways(open_node(path), 16 * BLOCK, 0) == b""


async def test_what_is_not_in_the_page_cache_would_block(path, open_node, monkeypatch):
    node = open_node(path)

    def not_cached(fd, buffers, offset, flags=0):
        assert flags == os.RWF_NOWAIT
        raise BlockingIOError(errno.EAGAIN, "not cached")

    monkeypatch.setattr(file_module.os, "preadv", not_cached)
    assert node.read_nowait(0, buffer(512)) is False
    monkeypatch.undo()
    assert node.read_nowait(0, buffer(512)) is True
    assert node.statistics()["would_block"] == 1


@pytest.mark.parametrize("there", [0, 100, BLOCK])
async def test_a_read_cached_in_part_would_block_and_is_never_padded(
    path, open_node, monkeypatch, there
):
    """Only at the end of the file does a short read mean zeroes."""
    node, preadv = open_node(path), os.preadv

    def partly(fd, buffers, offset, flags=0):
        assert flags
        return preadv(fd, [buffers[0][:there]], offset) if there else 0

    monkeypatch.setattr(file_module.os, "preadv", partly)
    assert node.read_nowait(BLOCK, buffer(2 * BLOCK)) is False
    monkeypatch.undo()
    data = buffer(2 * BLOCK)
    await node.read(BLOCK, data)
    assert data == path.read_bytes()[BLOCK : 3 * BLOCK]


async def test_the_slow_way_goes_on_after_short_reads(path, open_node, monkeypatch):
    node, preadv = open_node(path), os.preadv
    monkeypatch.setattr(
        file_module.os, "preadv", lambda fd, b, at, flags=0: preadv(fd, [b[0][:1000]], at)
    )
    data = buffer(3 * BLOCK)
    await node.read(14 * BLOCK, data)
    assert data == path.read_bytes()[14 * BLOCK :] + bytes(BLOCK)


async def test_what_somebody_cut_off_a_file_is_an_error_and_not_zeroes(path, open_node):
    node = open_node(path)
    content = path.read_bytes()
    os.truncate(path, 600)
    data = buffer(512)
    await node.read(0, data)
    assert bytes(data) == content[:512]
    assert node.read_nowait(512, data) is False
    with pytest.raises(OSError, match=f"{path}: ends at byte 600 of {len(content)}") as caught:
        await node.read(512, data)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="somebody has cut it"):
        await node.read(4096, data)
    await node.read(len(content), data)  # where there never was anything
    assert bytes(data) == bytes(512)


async def test_a_file_system_that_cannot_say_whether_it_would_wait(path, open_node, monkeypatch):
    """EOPNOTSUPP for RWF_NOWAIT: it is not asked again, and all reads go to the engine."""
    node, preadv, calls = open_node(path), os.preadv, []

    def no_nowait(fd, buffers, offset, flags=0):
        calls.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(file_module.os, "preadv", no_nowait)
    monkeypatch.setattr(syscalls, "is_memory_file_system", lambda fd: False)
    assert node.read_nowait(0, buffer(512)) is False
    assert node.read_nowait(0, buffer(512)) is False
    assert calls == [os.RWF_NOWAIT]
    data = buffer(512)
    await node.read(0, data)
    assert data == path.read_bytes()[:512]


async def test_one_file_system_without_nowait_says_nothing_of_another(
    path, open_node, monkeypatch
):
    node, other = open_node(path), open_node(path)
    preadv = os.preadv

    def no_nowait(fd, buffers, offset, flags=0):
        if fd == node.fd:
            raise OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT")
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(file_module.os, "preadv", no_nowait)
    assert node.read_nowait(0, buffer(512)) is False
    assert other.read_nowait(0, buffer(512)) is True


@pytest.fixture
def in_memory():
    """A file of 3000 bytes in a tmpfs."""
    with folder_in_memory() as folder:
        path = folder / "file"
        path.write_bytes(b"abc" * 1000)
        yield str(path)


async def test_an_image_in_memory_is_read_at_once(in_memory, open_node):
    """tmpfs does not know RWF_NOWAIT, and never waits."""
    node = open_node(in_memory)
    assert await read_both_ways(node, 2999, 100) == b"c" + bytes(99)
    assert node.statistics()["would_block"] == 0


@pytest.mark.parametrize("way", ["nowait", "async", "submitted"])
async def test_an_unreadable_sector_is_eio(path, open_node, engine, monkeypatch, way):
    node = open_node(path)

    def fail(fd, buffers, offset, flags=0):
        raise OSError(errno.EIO, "Input/output error")

    async def read_nowait():
        node.read_nowait(0, buffer(1))

    read = {
        "nowait": read_nowait,
        "async": lambda: node.read(0, buffer(1)),
        "submitted": lambda: submit_and_wait(node, engine, 0, buffer(1)),
    }[way]
    monkeypatch.setattr(file_module.os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        await read()
    assert caught.value.errno == errno.EIO


async def submit_and_wait(node, engine, offset, data):
    completed = []
    node.submit_read(offset, data, completed.append)
    assert completed == []
    await engine.idle()
    (error,) = completed
    if error is not None:
        raise error


async def test_a_submitted_read_fills_the_buffer_before_it_completes(path, open_node, engine):
    data = buffer(BLOCK)
    await submit_and_wait(open_node(path), engine, 16 * BLOCK - 10, data)
    assert data == path.read_bytes()[-10:] + bytes(BLOCK - 10)


async def test_a_bug_in_a_submitted_read_is_an_error_for_the_client(
    path, open_node, engine, monkeypatch
):
    monkeypatch.setattr(file_module.os, "preadv", lambda *_: "x")  # no number
    with pytest.raises(OSError, match="internal error") as caught:
        await submit_and_wait(open_node(path), engine, 0, buffer(1))
    assert caught.value.errno == errno.EIO


# --- writing ---------------------------------------------------------------------------------


async def write_nowait(node, offset, data):
    assert node.write_nowait(offset, data)


async def writev_nowait(node, offset, data):
    assert node.writev_nowait(offset, (data[:1], b"", data[1:]))


async def write(node, offset, data):
    await node.write(offset, data)


async def writev(node, offset, data):
    await node.writev(offset, (data[:1], b"", memoryview(data)[1:]))


WAYS = [write_nowait, writev_nowait, write, writev]


@pytest.mark.parametrize("way", WAYS)
async def test_writes_land_where_they_belong_and_are_counted(path, open_node, way):
    node, before = open_node(path), path.read_bytes()
    await way(node, 5000, b"hello")
    assert path.read_bytes() == before[:5000] + b"hello" + before[5005:]
    assert (node.length, node.generation.written) == (16 * BLOCK, 1)


@pytest.mark.parametrize("way", WAYS)
async def test_a_write_past_the_end_moves_it(path, open_node, way):
    node = open_node(path)
    await way(node, 20 * BLOCK, b"tail")
    assert (node.length, node.size) == (20 * BLOCK + 4, 20 * BLOCK + 512)
    assert path.stat().st_size == node.length
    assert await read_both_ways(node, 16 * BLOCK, 4 * BLOCK + 512) == (
        bytes(4 * BLOCK) + b"tail" + bytes(508)
    )


async def test_a_write_within_the_file_leaves_the_end(path, open_node):
    node = open_node(path)
    await node.write(16 * BLOCK - 4, b"tail")
    assert (node.length, node.size) == (16 * BLOCK, 16 * BLOCK)


async def test_writing_nothing_past_the_end_moves_nothing(path, open_node):
    node = open_node(path)
    await node.write(20 * BLOCK, b"")
    await node.writev(20 * BLOCK, (b"", b""))
    await node.write_zeroes(20 * BLOCK, 0, may_unmap=True, fallback=False)
    await node.discard(20 * BLOCK, 0)
    assert node.length == path.stat().st_size == 16 * BLOCK


async def test_too_much_at_once_is_not_written_inline(path, open_node):
    node = open_node(path)
    assert node.write_nowait(0, bytes(MAX_INLINE + 1)) is False
    assert node.writev_nowait(0, (bytes(MAX_INLINE), b"x")) is False
    assert node.generation.written == 0


async def test_more_buffers_than_one_call_takes(path, open_node):
    node = open_node(path)
    pieces = [bytes([number % 251]) for number in range(2 * IOV_MAX + 7)]
    await node.writev(3, pieces)
    assert node.writev_nowait(3, pieces)
    assert path.read_bytes()[3 : 3 + len(pieces)] == b"".join(pieces)


def test_short_writes_are_continued_in_the_middle_of_a_buffer(tmp_path, monkeypatch):
    pwritev = os.pwritev

    def seven_bytes(fd, buffers, offset):
        return pwritev(fd, [b"".join(buffers)[:7]], offset)

    monkeypatch.setattr(file_module.os, "pwritev", seven_bytes)
    path = tmp_path / "file"
    with open(path, "wb") as file:
        write_all(file.fileno(), [b"abcdefghij", b"", b"klmn", b"o", b"pqrstuvwxyz"], 2)
    assert path.read_bytes() == b"\0\0abcdefghijklmnopqrstuvwxyz"


async def test_an_inline_write_that_was_short_is_completed(path, open_node, monkeypatch):
    node, pwrite = open_node(path), os.pwrite
    monkeypatch.setattr(file_module.os, "pwrite", lambda fd, data, at: pwrite(fd, data[:2], at))
    assert node.write_nowait(16 * BLOCK, b"hello")
    assert path.read_bytes()[16 * BLOCK :] == b"hello"
    assert node.length == 16 * BLOCK + 5


@pytest.fixture
def full_disk():
    """Files may grow to 20 blocks and no further: EFBIG stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * BLOCK, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("way", WAYS)
async def test_no_room_is_an_error_and_no_progress(path, open_node, full_disk, way):
    node = open_node(path)
    with pytest.raises(OSError, match="too large") as caught:
        await way(node, 20 * BLOCK, b"hello")
    assert caught.value.errno == errno.EFBIG
    assert (node.length, node.generation.written) == (16 * BLOCK, 0)
    await way(node, 0, b"hello")  # elsewhere there is


@pytest.mark.parametrize("way", WAYS)
async def test_room_for_a_part_is_an_error_too(path, open_node, full_disk, way):
    node = open_node(path)
    with pytest.raises(OSError, match="too large"):
        await way(node, 20 * BLOCK - 10, b"x" * 100)


@pytest.fixture
def mebibyte():
    """A file system with room for one MiB."""
    with small_file_system(1 << 20) as folder:
        yield folder


async def test_a_really_full_disk(mebibyte, open_node):
    path = mebibyte / "image"
    os.mknod(path)
    os.truncate(path, 4 << 20)
    node = open_node(path)
    with pytest.raises(OSError, match="No space left") as caught:
        await node.write(0, b"x" * (3 << 20))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        node.write_nowait(3 << 20, b"x" * MAX_INLINE)
    await node.close()


async def test_a_read_only_file_is_not_written(path, open_node):
    before = path.read_bytes()
    node = open_node(path, read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await node.write(0, b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        node.write_nowait(0, b"x")
    assert path.read_bytes() == before


# --- flushing and closing --------------------------------------------------------------------


@pytest.fixture
def syncs(monkeypatch):
    """The descriptors that were synced; `syncs.error` fails the next ones."""

    class Syncs(list):
        error = None

    syncs = Syncs()

    def fdatasync(fd):
        syncs.append(fd)
        if syncs.error is not None:
            raise syncs.error

    monkeypatch.setattr(file_module.os, "fdatasync", fdatasync)
    return syncs


CHANGES = {
    "write": lambda node: node.write(0, b"x"),
    "write_nowait": lambda node: write_nowait(node, 0, b"x"),
    "writev_nowait": lambda node: writev_nowait(node, 0, b"xy"),
    "zeroes": lambda node: node.write_zeroes(0, BLOCK, may_unmap=False),
    "zeroes that unmap": lambda node: node.write_zeroes(0, BLOCK, may_unmap=True),
    "discard": lambda node: node.discard(0, BLOCK),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_every_change_is_synced_by_the_next_flush_and_only_by_that(
    path, open_node, syncs, change
):
    node = open_node(path)
    await node.flush()
    assert syncs == []
    await CHANGES[change](node)
    await node.flush()
    await node.flush()
    assert syncs == [node.fd]


async def test_reading_makes_nothing_to_flush(path, open_node, syncs):
    node = open_node(path)
    await read_both_ways(node, 0, BLOCK)
    await node.block_status(0, BLOCK)
    await node.flush()
    assert syncs == []


async def test_no_flush_means_never(path, open_node, syncs):
    node = open_node(path, no_flush=True)
    await node.write(0, b"x")
    await node.flush()
    await node.close()
    assert syncs == []


async def test_a_failed_sync_fails_all_later_flushes(path, open_node, syncs):
    node = open_node(path)
    await node.write(0, b"x")
    syncs.error = OSError(errno.EIO, "Input/output error")
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            await node.flush()
        syncs.error = None
    assert len(syncs) == 1


async def test_closing_flushes_what_nobody_flushed(path, engine, syncs):
    node = open_file(str(path), engine, read_only=False)
    await node.write(0, b"x")
    await node.close()
    assert len(syncs) == 1


async def test_closing_lets_go_of_the_file_even_if_its_flush_fails(path, engine, syncs):
    with no_descriptor_left():
        node = open_file(str(path), engine, read_only=False)
        node.lock(*PERMISSIONS[Role.FORMAT_RW])
        await node.write(0, b"x")
        syncs.error = OSError(errno.EIO, "Input/output error")
        with pytest.raises(OSError, match="Input/output error"):
            await node.close()


# --- FUA -------------------------------------------------------------------------------------


@pytest.fixture
def writes(monkeypatch):
    """(descriptor, flags) of each pwritev; `writes.error` fails the next durable ones."""

    class Writes(list):
        error = None

    writes, pwritev = Writes(), os.pwritev

    def watched(fd, buffers, offset, flags=0):
        writes.append((fd, flags))
        if flags & os.RWF_DSYNC and writes.error is not None:
            raise writes.error
        return pwritev(fd, buffers, offset, flags)

    monkeypatch.setattr(file_module.os, "pwritev", watched)
    return writes


def fdinfo(fd):
    return pathlib.Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()


async def submit_fua(node, offset, data):
    """By `submit_write`; raises its error."""
    await completion(lambda done: node.submit_write(offset, data, done, fua=True))


async def write_fua(node, offset, data):
    assert await node.write_fua(offset, data) is True


@pytest.mark.parametrize("way", [submit_fua, write_fua])
async def test_fua_is_one_durable_write_and_leaves_nothing_to_sync(
    path, open_node, syncs, writes, way
):
    node = open_node(path)
    await way(node, 3 * BLOCK, b"hello")
    assert path.read_bytes()[3 * BLOCK :][:5] == b"hello"
    assert [flags for _, flags in writes] == [os.RWF_DSYNC]
    assert node.flush_nowait() is True
    await node.flush()
    assert syncs == []


@pytest.mark.parametrize("way", [submit_fua, write_fua])
async def test_what_was_written_before_is_still_to_be_synced(path, open_node, syncs, way):
    node = open_node(path)
    assert node.write_nowait(0, b"x")
    await way(node, BLOCK, b"y")
    assert node.flush_nowait() is False
    await node.flush()
    assert syncs == [node.fd]


@pytest.mark.parametrize("way", [submit_fua, write_fua])
async def test_a_durable_write_past_the_end_moves_it(path, open_node, syncs, way):
    node = open_node(path)
    await way(node, 20 * BLOCK, b"x")
    assert (node.length, node.size) == (20 * BLOCK + 1, 20 * BLOCK + 512)
    assert node.flush_nowait() is True


async def test_nothing_written_durably(path, open_node, writes):
    assert await open_node(path).write_fua(0, b"") is True
    assert writes == []


async def test_the_description_for_fua_is_locked_as_the_image_is(path, open_node):
    """A request through it may be in flight when this process is gone, and must keep others off."""
    node = open_node(path)
    node.lock(*PERMISSIONS[Role.RAW_RW])
    await node.write_fua(0, b"x" * 512)
    locks = [
        [line.split()[-2:] for line in fdinfo(fd) if line.startswith("lock:")]
        for fd in (node.fd, node._dsync_fd)
    ]
    assert locks[0] == locks[1] != []


@pytest.mark.parametrize("way", [submit_fua, write_fua])
async def test_with_no_flush_fua_is_a_plain_write(path, open_node, syncs, writes, way):
    node = open_node(path, no_flush=True)
    await way(node, 0, b"x")
    assert writes == [(node.fd, 0)]
    assert node.flush_nowait() is True
    assert syncs == []


async def test_durable_writes_have_a_description_of_their_own(path, open_node, writes):
    """So that an error that one of them consumes is still there for fdatasync; and it is closed."""
    with no_descriptor_left():
        node = open_node(path)
        await node.write_fua(0, b"x")
        await node.write_fua(0, b"y")
        [fd] = {fd for fd, _ in writes}
        assert fd != node.fd
        assert os.path.samestat(os.fstat(fd), os.fstat(node.fd))
        await node.close()


@pytest.mark.parametrize("way", [submit_fua, write_fua])
async def test_a_durable_write_that_failed_is_looked_into_by_the_next_flush(
    path, open_node, syncs, writes, way
):
    node = open_node(path)
    writes.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output error"):
        await way(node, 0, b"x")
    assert node.flush_nowait() is False
    await node.flush()
    assert syncs == [node.fd]


@pytest.mark.parametrize("way", [submit_fua, write_fua])
async def test_after_a_failed_flush_no_write_is_durable(path, open_node, syncs, writes, way):
    """It would be; but a client commits with it, and what it commits may be lost."""
    node = open_node(path)
    assert node.write_nowait(0, b"x")
    syncs.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(FlushFailed):
        await node.flush()
    syncs.error = None
    with pytest.raises(FlushFailed, match="a flush failed"):
        await way(node, 0, b"y")
    assert writes == []
    assert node.write_nowait(0, b"z")  # plain writes go on, as in QEMU


@pytest.mark.parametrize("reason", ["RWF_DSYNC is refused", "no /proc"])
@pytest.mark.parametrize("way", [submit_fua, write_fua])
async def test_where_there_are_no_durable_writes_a_write_and_a_sync_are_one(
    path, open_node, syncs, writes, monkeypatch, way, reason
):
    node = open_node(path)
    if reason == "no /proc":
        monkeypatch.setattr(node, "_reopen", lambda flags: os.open("/nowhere", flags))
    writes.error = OSError(errno.EOPNOTSUPP, "Operation not supported")
    await way(node, 0, b"x")
    assert path.read_bytes()[:1] == b"x"
    assert syncs == [node.fd]
    assert node.flush_nowait() is True
    del writes[:]
    await way(node, 0, b"y")
    assert [flags for _, flags in writes] == [0]
    syncs.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(FlushFailed):
        await way(node, 0, b"z")


async def test_a_flush_by_callback(path, open_node, engine, syncs):
    node = open_node(path)
    assert node.flush_nowait() is True
    assert node.write_nowait(0, b"x")
    assert node.flush_nowait() is False
    done = []
    assert node.submit_flush(done.append) is True
    assert node.submit_flush(done.append) is True
    assert done == []
    await engine.idle()
    assert done == [None, None]
    assert syncs == [node.fd]
    assert node.flush_nowait() is True


# --- zeroes, discard, holes ------------------------------------------------------------------


def holes(path):
    """Offsets of the blocks of a file that are holes."""
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        found = []
        for offset in range(0, end, BLOCK):
            try:
                data = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            except OSError:
                data = end
            if data >= min(offset + BLOCK, end):
                found.append(offset)
        return found


@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(BLOCK, BLOCK), (100, 10), (1000, 3 * BLOCK)])
async def test_zeroes(path, open_node, discard, may_unmap, offset, length):
    node, before = open_node(path, discard=discard), path.read_bytes()
    await node.write_zeroes(offset, length, may_unmap=may_unmap)
    assert path.read_bytes() == before[:offset] + bytes(length) + before[offset + length :]
    if not (may_unmap and discard):
        assert path.stat().st_blocks * 512 >= 16 * BLOCK


async def test_zeroes_that_may_unmap_make_a_hole(path, open_node):
    node = open_node(path)
    blocks = path.stat().st_blocks
    await node.write_zeroes(BLOCK, 2 * BLOCK, may_unmap=True)
    assert path.stat().st_blocks == blocks - 2 * BLOCK // 512


@pytest.mark.parametrize("may_unmap", [True, False])
async def test_zeroes_past_the_end_move_it(path, open_node, may_unmap):
    node = open_node(path)
    await node.write_zeroes(15 * BLOCK, 5 * BLOCK, may_unmap=may_unmap)
    assert node.length == node.size == path.stat().st_size == 20 * BLOCK
    assert path.read_bytes()[15 * BLOCK :] == bytes(5 * BLOCK)


@pytest.fixture
def cannot_zero(monkeypatch):
    """zero_range fails with what the test sets; the calls are counted."""

    class Calls(list):
        error = errno.EOPNOTSUPP

    calls = Calls()

    def zero_range(fd, offset, length, may_unmap, is_device):
        calls.append((offset, length, may_unmap))
        raise OSError(calls.error, os.strerror(calls.error))

    monkeypatch.setattr(syscalls, "zero_range", zero_range)
    return calls


async def test_where_zeroes_have_no_call_they_are_written_and_it_is_not_asked_again(
    path, open_node, cannot_zero
):
    node, before = open_node(path), path.read_bytes()
    for _ in range(2):
        await node.write_zeroes(100, 2 * MAX_INLINE + 50, may_unmap=False)
    assert path.read_bytes() == before[:100] + bytes(2 * MAX_INLINE + 50)
    assert cannot_zero == [(100, 2 * MAX_INLINE + 50, False)]
    assert node.length == 100 + 2 * MAX_INLINE + 50


async def test_a_range_that_is_not_aligned_says_nothing_of_others(path, open_node, cannot_zero):
    cannot_zero.error = errno.EINVAL
    node = open_node(path)
    await node.write_zeroes(1, 1, may_unmap=False)
    await node.write_zeroes(0, 512, may_unmap=False)
    assert len(cannot_zero) == 2


async def test_punching_holes_may_work_where_zeroing_in_place_does_not(
    path, open_node, cannot_zero
):
    node = open_node(path)
    await node.write_zeroes(0, 512, may_unmap=False)
    await node.write_zeroes(0, 512, may_unmap=True)
    assert [unmap for _, _, unmap in cannot_zero] == [False, True]


async def test_who_wants_zeroes_fast_or_not_at_all_gets_an_error(path, open_node, cannot_zero):
    node, before = open_node(path), path.read_bytes()
    for _ in range(2):
        with pytest.raises(OSError, match=r"disk\.img: no fast way") as caught:
            await node.write_zeroes(0, 512, may_unmap=True, fallback=False)
        assert caught.value.errno == errno.EOPNOTSUPP
    assert path.read_bytes() == before


async def test_other_errors_of_zeroing_are_errors(path, open_node, cannot_zero):
    cannot_zero.error = errno.ENOSPC
    node = open_node(path)
    with pytest.raises(OSError, match="No space left"):
        await node.write_zeroes(0, 512, may_unmap=True)
    assert node.generation.written == 0


async def test_a_discard_makes_holes_and_keeps_the_end(path, open_node):
    node, before = open_node(path), path.read_bytes()
    await node.discard(BLOCK, 2 * BLOCK)
    assert holes(path) == [BLOCK, 2 * BLOCK]
    assert path.read_bytes() == before[:BLOCK] + bytes(2 * BLOCK) + before[3 * BLOCK :]
    await node.discard(15 * BLOCK, 5 * BLOCK)
    assert node.length == path.stat().st_size == 16 * BLOCK


async def test_a_discard_that_is_ignored_does_nothing(path, open_node):
    node, before = open_node(path, discard=False), path.read_bytes()
    await node.discard(0, 16 * BLOCK)
    assert path.read_bytes() == before
    assert node.generation.written == 0


@pytest.mark.parametrize(("error", "asked"), [(errno.EOPNOTSUPP, 1), (errno.EINVAL, 2)])
async def test_a_discard_that_cannot_be_done_is_no_error(
    path, open_node, monkeypatch, error, asked
):
    calls = []

    def discard_range(fd, offset, length, is_device):
        calls.append(offset)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(syscalls, "discard_range", discard_range)
    node = open_node(path)
    await node.discard(0, BLOCK)
    await node.discard(0, BLOCK)
    assert len(calls) == asked


async def test_a_discard_that_fails_is_an_error(path, open_node, monkeypatch):
    def discard_range(fd, offset, length, is_device):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(syscalls, "discard_range", discard_range)
    with pytest.raises(OSError, match="Input/output error"):
        await open_node(path).discard(0, BLOCK)


# --- block status ----------------------------------------------------------------------------


def data(length):
    return Extent(length, data=True, zero=False)


def hole(length):
    return Extent(length, data=False, zero=True)


@pytest.fixture
def sparse(tmp_path):
    """Data in blocks 1, 2 and 5 of 8 and in the first 100 bytes of a ninth."""
    path = tmp_path / "sparse.img"
    with open(path, "wb") as file:
        for block in (1, 2, 5):
            os.pwrite(file.fileno(), b"x" * BLOCK, block * BLOCK)
        os.pwrite(file.fileno(), b"x" * 100, 8 * BLOCK)
    return path


@pytest.mark.parametrize(
    ("offset", "length", "extents"),
    [
        (0, 8 * BLOCK, [hole(BLOCK), data(2 * BLOCK), hole(2 * BLOCK), data(BLOCK),
                        hole(2 * BLOCK)]),
        (BLOCK + 10, 100, [data(100)]),
        (10, 100, [hole(100)]),
        (3 * BLOCK - 1, 2, [data(1), hole(1)]),
        (8 * BLOCK, 512, [data(100), hole(412)]),
        (8 * BLOCK + 100, 412, [hole(412)]),
        (1 << 40, 512, [hole(512)]),
    ],
)  # fmt: skip
async def test_status_tells_data_from_holes(sparse, open_node, offset, length, extents):
    assert await open_node(sparse).block_status(offset, length) == extents


@pytest.fixture
def comb(tmp_path):
    """Data in every other block, twice as often as fits into one answer."""
    path = tmp_path / "comb"
    with open(path, "wb") as file:
        for block in range(0, 2 * MAX_PIECES, 2):
            os.pwrite(file.fileno(), b"x", block * BLOCK)
    return path


async def test_status_of_a_file_full_of_holes_is_bounded(comb, open_node):
    extents = await open_node(comb).block_status(0, 2 * MAX_PIECES * BLOCK)
    assert MAX_PIECES <= len(extents) <= MAX_PIECES + 1
    assert {extent.length for extent in extents[:-1]} == {BLOCK}


async def test_a_file_system_that_knows_no_holes_has_data_everywhere(
    sparse, open_node, monkeypatch
):
    def no_seek(fd, offset, whence):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(file_module.os, "lseek", no_seek)
    assert await open_node(sparse).block_status(0, 8 * BLOCK) == [data(8 * BLOCK)]


async def test_an_error_while_looking_for_holes_is_an_error(sparse, open_node, monkeypatch):
    def broken(fd, offset, whence):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_module.os, "lseek", broken)
    with pytest.raises(OSError, match="Input/output error"):
        await open_node(sparse).block_status(0, 512)


async def test_no_extent_is_empty_when_data_vanishes_while_it_is_looked_for(
    sparse, open_node, monkeypatch
):
    """A discard between the two seeks; an extent without length breaks the NBD protocol."""
    lseek = os.lseek

    def racing(fd, offset, whence):
        if whence == os.SEEK_HOLE and offset == BLOCK:
            syscalls.punch_hole(node.fd, BLOCK, 2 * BLOCK)
        return lseek(fd, offset, whence)

    node = open_node(sparse)
    monkeypatch.setattr(file_module.os, "lseek", racing)
    extents = await node.block_status(0, 6 * BLOCK)
    assert all(extent.length > 0 for extent in extents)
    assert sum(extent.length for extent in extents) == 6 * BLOCK
    assert [extent for extent in extents if extent.data] == [data(BLOCK)]


# --- block devices ---------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path):
    """A loop device of 64 blocks of random bytes, where one may be made."""
    backing = tmp_path / "device.img"
    backing.write_bytes(random.Random(6).randbytes(64 * BLOCK))
    with loop_device(backing) as name:
        yield name


async def test_a_block_device_is_an_image_of_its_size(device, open_node):
    node = open_node(device)
    assert (node.length, node.size, node.is_device) == (64 * BLOCK, 64 * BLOCK, True)
    assert await node.block_status(0, 64 * BLOCK) == [data(64 * BLOCK)]
    await node.close()


async def test_a_block_device_is_read_written_zeroed_and_discarded(device, open_node):
    node = open_node(device)
    await node.write(1000, b"hello")
    assert node.write_nowait(3 * BLOCK, b"world")
    await node.write_zeroes(5 * BLOCK, BLOCK, may_unmap=False)
    await node.write_zeroes(7 * BLOCK, BLOCK, may_unmap=True)
    await node.write_zeroes(9 * BLOCK + 1, 10, may_unmap=True)  # not aligned: written
    await node.discard(11 * BLOCK, BLOCK)
    await node.flush()
    content = buffer(64 * BLOCK)
    await node.read(0, content)
    expected = bytearray(random.Random(6).randbytes(64 * BLOCK))
    expected[1000:1005] = b"hello"
    expected[3 * BLOCK : 3 * BLOCK + 5] = b"world"
    for start, length in [(5 * BLOCK, BLOCK), (7 * BLOCK, BLOCK), (9 * BLOCK + 1, 10)]:
        expected[start : start + length] = bytes(length)
    expected[11 * BLOCK : 12 * BLOCK] = content[11 * BLOCK : 12 * BLOCK]  # the device's choice
    assert content == expected
    assert (node.length, node.size) == (64 * BLOCK, 64 * BLOCK)
    await node.close()


async def test_writing_past_the_end_of_a_device_is_an_error(device, open_node):
    node = open_node(device)
    with pytest.raises(OSError, match="No space left"):
        await node.write(64 * BLOCK, b"x")
    assert node.length == 64 * BLOCK
    await node.close()


@pytest.mark.parametrize(
    ("may_unmap", "has_command", "done"),
    [(True, True, ["punch_hole"]), (True, False, None), (False, True, None)],
)
async def test_fast_zeroes_on_a_device_never_let_the_kernel_write_them(
    path, engine, monkeypatch, may_unmap, has_command, done
):
    """BLKZEROOUT falls back to writing and does not tell; a hole is made or refused."""
    calls = []

    def punch_hole(fd, offset, length):
        calls.append("punch_hole")
        if not has_command:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def zero_range(*_):
        calls.append("zero_range")

    monkeypatch.setattr(syscalls, "punch_hole", punch_hole)
    monkeypatch.setattr(syscalls, "zero_range", zero_range)
    file = OpenFile(
        filename="device", fd=os.open(path, os.O_RDWR), length=16 * BLOCK,
        is_device=True, read_only=False, no_flush=True, discard=True,
    )  # fmt: skip
    node = FileNode(file, engine)
    if done:
        await node.write_zeroes(0, BLOCK, may_unmap=may_unmap, fallback=False)
        assert calls == done
    else:
        with pytest.raises(OSError, match="no fast way"):
            await node.write_zeroes(0, BLOCK, may_unmap=may_unmap, fallback=False)
        assert "zero_range" not in calls
    await node.write_zeroes(0, BLOCK, may_unmap=may_unmap)
    assert calls[-1] == "zero_range"  # who can wait is served all the same
    await node.close()


async def test_a_read_that_meets_the_end_while_our_write_moves_it_is_zeroes(
    path, open_node, monkeypatch
):
    node = open_node(path)
    end = node.length
    really = os.preadv

    def preadv(fd, buffers, offset, *flags):
        done = really(fd, buffers, offset, *flags)
        if not done and node.length == end:  # another request, done before the end is looked at
            assert node.write_nowait(end + 8 * BLOCK, b"w" * BLOCK)
        return done

    monkeypatch.setattr(os, "preadv", preadv)
    data = buffer(BLOCK)
    await node.read(end, data)
    assert bytes(data) == bytes(BLOCK)

"""What every engine must do, threads, io_uring and native alike; and what is io_uring's alone."""

import errno
import mmap
import os
import random
import struct

import pytest
import trio
import trio.lowlevel
import trio.testing

import peers
from nbdserve.engines import io_uring, kernel_queue, start
from nbdserve.engines.engine import completion
from nbdserve.engines.io_uring import IoUringEngine
from nbdserve.engines.kernel_queue import GROUP
from nbdserve.engines.linux_aio import LinuxAioEngine
from nbdserve.engines.start import Engines, start_engine
from nbdserve.engines.threads import ThreadsEngine
from nbdserve.errors import ConfigError

LONG = 20.0
BLOCK = 4096


URING = pytest.param(IoUringEngine, marks=pytest.mark.peer(peers.IO_URING))
AIO = pytest.param(LinuxAioEngine, marks=pytest.mark.peer(peers.LINUX_AIO))


@pytest.fixture(params=[ThreadsEngine, URING, AIO])
async def engine(request):
    engine = request.param()
    yield engine
    with trio.fail_after(LONG):
        await engine.idle()
    engine.close()


@pytest.fixture
def file(tmp_path):
    """(descriptor, content): 16 blocks and a few bytes."""
    content = random.Random(1).randbytes(16 * BLOCK + 100)
    (tmp_path / "file").write_bytes(content)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd, content
    os.close(fd)


async def read(engine, fd, offset, length):
    data = memoryview(bytearray(b"\xee" * length))
    with trio.fail_after(LONG):
        await completion(lambda done: engine.submit_read(fd, data, offset, done))
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (5000, 9000), (16 * BLOCK, 500), (1 << 40, 7)]
)
async def test_a_read_is_whole_with_zeroes_past_the_end(engine, file, offset, length):
    fd, content = file
    expected = content[offset : offset + length].ljust(length, b"\0")
    assert await read(engine, fd, offset, length) == expected


@pytest.mark.parametrize("dsync", [False, True])
@pytest.mark.parametrize(
    "data", [[b"hello"], [b"a", bytearray(b"b" * 5000), memoryview(b"c")], [b"x"] * 3000]
)
async def test_a_write_is_whole(engine, file, data, dsync):
    fd, content = file
    await completion(lambda done: engine.submit_write(fd, data, 100, done, dsync=dsync))
    joined = b"".join(data)
    assert os.pread(fd, len(content), 0) == content[:100] + joined + content[100 + len(joined) :]


@pytest.mark.parametrize("kind", [URING, AIO])
async def test_it_may_be_closed_when_a_completion_has_just_woken_it(kind):
    """Which of two tasks that are ready goes first is chance: so, often."""
    for _ in range(30):
        engine = kind()
        await trio.testing.wait_all_tasks_blocked()
        os.eventfd_write(engine.eventfd, 1)
        await trio.lowlevel.checkpoint()
        engine.close()


async def test_a_sync_and_errors(engine, file):
    await completion(lambda done: engine.submit_fsync(file[0], done))
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match=r".") as caught:
        await completion(lambda done: engine.submit_fsync(read_end, done))
    assert caught.value.errno == errno.EINVAL
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(OSError, match=r".") as caught:
        await read(engine, read_end, 0, 1)
    assert caught.value.errno == errno.EBADF


async def test_a_plug_hands_over_in_groups_and_no_completion_comes_from_inside(engine, file):
    fd, content = file
    found = []
    buffers = [memoryview(bytearray(512)) for _ in range(40)]
    before = engine.statistics().batches
    with engine.plug():
        for number, buffer in enumerate(buffers):
            engine.submit_read(fd, buffer, number * 512, found.append)
        assert found == []
    groups = 1 if isinstance(engine, ThreadsEngine) else 40 // GROUP
    assert engine.statistics().batches == before + groups
    with trio.fail_after(LONG):
        await engine.idle()
    assert found == [None] * 40
    assert b"".join(buffers) == content[: 40 * 512]


async def test_more_than_the_kernel_is_given_at_a_time(engine, file):
    fd, content = file
    found = []
    buffers = [memoryview(bytearray(64)) for _ in range(1000)]
    with engine.plug():
        for number, buffer in enumerate(buffers):
            engine.submit_read(fd, buffer, number * 64, found.append)
    with trio.fail_after(LONG):
        await engine.idle()
    assert found == [None] * 1000
    assert b"".join(buffers) == content[:64000]


async def test_a_poller_may_reap_instead(engine, file):
    fd, content = file
    engine.attach()
    found = []
    data = memoryview(bytearray(512))
    engine.submit_read(fd, data, 0, found.append)
    with trio.fail_after(LONG):
        while not found:  # threads wake the trio thread too, and may be sooner
            engine.reap()
            await trio.lowlevel.checkpoint()
    assert found == [None]
    assert engine.reap() is False
    engine.detach()
    assert await read(engine, fd, 512, 512) == content[512:1024]


async def test_many_tasks(engine, file):
    fd, content = file

    async def task(seed):
        rng = random.Random(seed)
        for _ in range(20):
            offset = rng.randrange(len(content))
            expected = content[offset : offset + 300].ljust(300, b"\0")
            assert await read(engine, fd, offset, 300) == expected

    async with trio.open_nursery() as nursery:
        for seed in range(50):
            nursery.start_soon(task, seed)


@pytest.mark.peer(peers.O_DIRECT)
async def test_an_o_direct_read_to_an_end_that_is_not_aligned(engine, tmp_path):
    (tmp_path / "odd").write_bytes(b"x" * 5000)
    fd = os.open(tmp_path / "odd", os.O_RDONLY | os.O_DIRECT)
    data = memoryview(mmap.mmap(-1, 4 * BLOCK))
    data[:] = b"\xee" * len(data)
    await completion(lambda done: engine.submit_read(fd, data, 0, done))
    os.close(fd)
    assert data == b"x" * 5000 + bytes(4 * BLOCK - 5000)


# --- the kernel's queues --------------------------------------------------------------------------


@pytest.fixture(params=[URING])
async def ring(request):
    engine = request.param()
    yield engine
    with trio.fail_after(LONG):
        await engine.idle()
    engine.close()


async def test_short_transfers_are_continued(ring, file, monkeypatch):
    """The kernel says that it did all; here it is told to do 1000 bytes at most at a time."""
    fd, content = file
    prepare = ring._prepare

    def at_most(tag, request):
        if request.kind in (kernel_queue.READ, kernel_queue.WRITE):
            request.count = min(request.count, 1000)
        prepare(tag, request)

    monkeypatch.setattr(ring, "_prepare", at_most)
    assert await read(ring, fd, 10, 5001) == content[10:5011]
    new = random.Random(2).randbytes(4500)
    await completion(lambda done: ring.submit_write(fd, [new], 7, done))
    assert os.pread(fd, 4507, 0) == content[:7] + new


async def test_a_kernel_that_is_busy_is_asked_again(ring, file, monkeypatch):
    fd, content = file
    hand_over, answers = ring._hand_over, [-errno.EINTR, 1, -errno.EBUSY]

    def busy(number):
        answer = answers.pop(0) if answers else number
        return answer if answer < 0 else hand_over(answer)

    monkeypatch.setattr(ring, "_hand_over", busy)
    found = []
    buffers = [memoryview(bytearray(512)) for _ in range(3)]
    with ring.plug():
        for buffer in buffers:
            ring.submit_read(fd, buffer, 0, found.append)
    with trio.fail_after(LONG):
        await ring.idle()
    assert found == [None] * 3
    assert bytes(buffers[2]) == content[:512]


async def test_a_kernel_that_refuses_fails_the_requests(ring, file, monkeypatch):
    fd, content = file
    monkeypatch.setattr(ring, "_hand_over", lambda number: -errno.EAGAIN)
    with pytest.raises(OSError, match=r".") as caught:
        await read(ring, fd, 0, 512)
    assert caught.value.errno == errno.EAGAIN
    monkeypatch.undo()
    assert await read(ring, fd, 0, 512) == content[:512]


@pytest.mark.parametrize("kind", [URING, AIO])
async def test_a_kernel_that_refuses_fails_those_too_that_waited_for_room(kind, file, monkeypatch):
    engine = kind()
    fd, content = file
    monkeypatch.setattr(engine, "_hand_over", lambda number: -errno.ENOMEM)
    found = []
    buffers = [memoryview(bytearray(8)) for _ in range(600)]
    with engine.plug():
        for buffer in buffers:
            engine.submit_read(fd, buffer, 0, found.append)
    assert found == []
    with trio.fail_after(LONG):
        await engine.idle()
    assert [error.errno for error in found] == [errno.ENOMEM] * 600
    monkeypatch.undo()
    assert await read(engine, fd, 0, 8) == content[:8]
    engine.close()


async def test_a_request_that_cannot_be_written_down_is_none(ring, file):
    fd, content = file
    with pytest.raises(struct.error):
        ring.submit_read(fd, memoryview(bytearray(8)), -1, lambda error: None)
    assert await read(ring, fd, 0, 8) == content[:8]
    assert ring.statistics().in_flight == 0


async def test_positions_wrap(ring, file, monkeypatch):
    fd, content = file
    for _ in range(3 * io_uring.DEPTH):
        assert await read(ring, fd, 3, 5) == content[3:8]


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", sorted(start.FORBIDDEN))
async def test_where_io_uring_is_forbidden_threads_serve(monkeypatch, caplog, error):
    def refuse(self):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(IoUringEngine, "__init__", refuse)
    engine = start_engine("io_uring", direct=False)
    assert engine.name == "threads"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("io_uring cannot be used here (")
    engine.close()


async def test_another_failure_of_io_uring_names_the_option(monkeypatch):
    def fail(self):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(IoUringEngine, "__init__", fail)
    with pytest.raises(ConfigError, match="--aio=io_uring: Invalid argument; use --aio=threads"):
        start_engine(None, direct=True)


async def test_native_needs_o_direct():
    with pytest.raises(ConfigError, match="--aio=native needs O_DIRECT"):
        start_engine("native", direct=False)


async def test_each_kind_is_started_once(ring):
    engines = Engines()
    threads = engines.get("threads", direct=False)
    assert engines.get("threads", direct=True) is threads
    uring = engines.get("io_uring", direct=False)
    assert engines.get(None, direct=False) is engines.get(None, direct=True) is uring
    assert list(engines) == [threads, uring]
    engines.close()
    assert list(engines) == []


async def test_what_threads_stand_in_for_is_the_threads_that_run(monkeypatch, caplog):
    def refuse(self):
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(IoUringEngine, "__init__", refuse)
    engines = Engines()
    for _ in range(3):
        uring = engines.get(None, direct=True)
    assert engines.get("threads", direct=False).name == uring.name == "threads"
    assert len(caplog.messages) == 1
    other = Engines()
    assert other.get("threads", direct=False) is other.get("io_uring", direct=False)
    engines.close()
    other.close()


@pytest.mark.peer(peers.LINUX_AIO)
async def test_native_that_runs_is_for_files_with_o_direct_alone():
    engines = Engines()
    native = engines.get("native", direct=True)
    assert engines.get("native", direct=True) is native
    with pytest.raises(ConfigError, match="--aio=native needs O_DIRECT"):
        engines.get("native", direct=False)
    engines.close()


@pytest.mark.parametrize("direct", [False, True])
async def test_the_default(direct, ring):
    engine = start_engine(None, direct=direct)
    assert engine.name == "io_uring"
    engine.close()

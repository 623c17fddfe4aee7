"""A write log of what reaches a real file, and of what a guest does to an image."""

import pytest
import trio

from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.run import READ, WRITE, WRITE_FUA, Miss
from nbdserve.drivers.open import open_file
from nbdserve.engines.threads import ThreadsEngine
from nbdserve.filters.power_cut import log_writes
from nbdserve.formats.qcow2.open import open_qcow2, read_header
from nbdserve.powercut.outcomes import all_cuts
from nbdserve.powercut.powercut import PowerCut, PowerLost
from nbdserve.powercut.writelog import Kind, WriteLog
from qcow2_model import MemoryFile, assert_sound, guest_bytes, new_image, pattern


async def test_below_a_format_it_has_all_that_reaches_the_file(tmp_path):
    engine = ThreadsEngine()
    path = tmp_path / "image"
    path.write_bytes(new_image(tmp_path, 64 * 1024, cluster_size=512))
    file = open_file(str(path), engine, read_only=False)
    log = WriteLog()
    logged = await log_writes(file, PowerCut(log))
    epochs = Epochs()
    async with trio.open_nursery() as nursery:
        header = await read_header(logged)
        node = await open_qcow2(logged, None, header, engine, epochs, read_only=False)
        backend = BlockBackend(node, epochs, nursery, write_cache=True)
        for number in range(4):
            data = pattern(number, 3000)
            await backend.write(number * 5000, data)
            await backend.write(number * 5000, data, fua=True)  # a flush
            await backend.write(number * 5000, data, fua=True)  # passed down
            await backend.discard(0, 2048)
        await backend.flush()
        log.mark(b"flushed")
        await backend.write_zeroes(5000, 2000, may_unmap=False)
        await node.close()
    await file.close()
    engine.close()
    assert bytes(log.replay()[0]).rstrip(b"\0") == path.read_bytes().rstrip(b"\0")
    kinds = {record.kind for record in log.records}
    assert {Kind.WRITE, Kind.DISCARD, Kind.FLUSH, Kind.DURABLE} <= kinds
    flushed = 0
    for moment, images, _ in all_cuts(log, 100):
        image = bytes(images[0])
        assert_sound(image, leaks_allowed=True)
        if log.marks(moment):
            flushed += 1
            assert guest_bytes(image)[15_000:18_000] == pattern(3, 3000)
    assert flushed > 3


async def test_requests_that_overlap_wait_for_each_other():
    file = MemoryFile(bytes(4096))
    logged = await log_writes(file, PowerCut())
    file.holds["write"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(logged.write, 0, b"a" * 1024)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(logged.write, 512, b"b" * 1024)
        nursery.start_soon(logged.write, 2048, b"c" * 1024)
        await trio.testing.wait_all_tasks_blocked()
        assert [record.offset for record in logged.log.records] == [0, 2048]
        file.holds.pop("write").set()
    assert [record.offset for record in logged.log.records if record.data] == [0, 2048, 512]
    assert bytes(logged.log.replay()[0]) == file.content


async def test_what_fails_has_not_returned():
    file = MemoryFile(bytes(4096))
    logged = await log_writes(file, PowerCut())

    def fail(kind, offset):
        raise OSError(28, "no space")

    file.fail = fail
    with pytest.raises(OSError, match="no space"):
        await logged.write(0, b"a" * 512)
    assert [record.kind for record in logged.log.records] == [Kind.WRITE]


async def test_zeroes_that_would_not_be_fast_have_done_nothing():
    file = MemoryFile(b"a" * 4096)
    file.zeroes_fast = False
    logged = await log_writes(file, PowerCut())
    with pytest.raises(OSError, match="fast") as refused:
        await logged.write_zeroes(0, 512, may_unmap=False, fallback=False)
    assert refused.value.errno == 95
    assert [record.kind for record in logged.log.records] == [Kind.WRITE_ZEROES, Kind.NOTHING]
    assert bytes(logged.power_cut.cut(seed=1).content) == file.content == b"a" * 4096


# --- the synchronous way --------------------------------------------------------------------------


async def test_writes_at_once_are_logged_whether_they_go_or_not():
    file = MemoryFile(b"a" * 4096)
    logged = await log_writes(file, PowerCut())
    ((leaf, offset, length),) = logged.resolve(WRITE, 512, 100)
    assert (offset, length) == (512, 100)
    assert leaf.write_nowait(512, b"b" * 100)
    file.holds["write"] = trio.Event()  # the file says that it would have to wait
    assert not leaf.write_nowait(0, b"c" * 100)
    assert [record.kind for record in logged.log.records] == [
        Kind.WRITE, Kind.END, Kind.WRITE, Kind.NOTHING]
    assert bytes(logged.log.replay()[0]) == file.content
    assert logged.resolve(WRITE_FUA, 0, 100) is Miss.OPAQUE
    assert logged.resolve(READ, 0, 100) == [(file, 0, 100)]


async def test_no_write_at_once_beside_one_that_overlaps():
    file = MemoryFile(b"a" * 4096)
    logged = await log_writes(file, PowerCut())
    file.holds["write"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(logged.write, 0, b"b" * 1024)
        await trio.testing.wait_all_tasks_blocked()
        assert logged.resolve(WRITE, 1000, 100) is Miss.OPAQUE
        assert logged.resolve(WRITE, 1024, 100) is not Miss.OPAQUE
        file.holds.pop("write").set()
    assert logged.resolve(WRITE, 1000, 100) is not Miss.OPAQUE
    logged.power_cut.cut()
    assert logged.resolve(WRITE, 1000, 100) is Miss.OPAQUE
    assert logged.resolve(READ, 1000, 100) is Miss.OPAQUE


async def test_what_was_submitted_is_in_the_order_of_the_disk_and_is_waited_for():
    file = MemoryFile(b"a" * 4096)
    logged = await log_writes(file, PowerCut())
    file.holds["write"] = trio.Event()
    answers = []
    for letter in (b"b", b"c"):
        ((leaf, *_),) = logged.resolve(WRITE, 0, 1024)
        leaf.submit_write(0, letter * 1024, answers.append)
    await trio.testing.wait_all_tasks_blocked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(logged.close)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        file.holds.pop("write").set()
    assert answers == [None, None]
    assert bytes(logged.log.replay()[0]) == file.content  # whichever came last
    assert file.content[:1024] in (b"b" * 1024, b"c" * 1024)


async def test_an_error_of_what_was_submitted_is_the_answer():
    logged = await log_writes(MemoryFile(bytes(4096)), PowerCut())
    answered = trio.Event()
    answers = []

    def done(error):
        answers.append(error)
        answered.set()

    ((leaf, *_),) = logged.resolve(WRITE, 0, 1024)
    leaf.submit_write(0, b"b" * 1024, done)
    logged.power_cut.cut()
    await answered.wait()
    assert isinstance(answers[0], PowerLost)
    await logged.close()

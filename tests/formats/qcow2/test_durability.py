"""Which tables a power cut would not take away, and what FUA and flushes make of it."""

import errno
from array import array

import pytest
import trio

from nbdserve.block.flush import FlushFailed
from nbdserve.block.run import WRITE, WRITE_FUA, Miss
from nbdserve.formats.qcow2.durability import Durability
from nbdserve.formats.qcow2.tables import SLICE_SIZE, Table
from qcow2_model import (
    COPIED,
    OFFSET,
    Layout,
    MemoryFile,
    new_image,
    open_memory,
    submit,
)

C = 4096
SIZE = 40 * C
PER_SLICE = SLICE_SIZE // 8


# --- the slices ------------------------------------------------------------------------------


@pytest.fixture
def table():
    return Table(array("Q", bytes(8 * 4 * PER_SLICE)), 0x10000)


@pytest.fixture
def durability():
    """Of an image that was synced since it was opened."""
    it = Durability()
    it.file_written()
    it.flushed(it.begin_flush())
    return it


def test_what_the_file_held_when_it_was_opened_may_be_lost(table):
    """Another process may have written it and not flushed; our first flush need not be a sync."""
    it = Durability()
    assert not it.covers(table, 0, 0)
    it.flushed(it.begin_flush())
    assert not it.covers(table, 0, 0)
    token = it.begin_flush()
    it.file_written()  # while the flush is under way: it need not be covered by it
    it.flushed(token)
    assert not it.covers(table, 0, 0)
    assert it.awaits_flush
    it.flushed(it.begin_flush())
    assert it.covers(table, 0, 4 * PER_SLICE - 1)
    assert not it.awaits_flush


def test_a_slice_is_durable_when_a_flush_has_ended_after_it_was_written(table, durability):
    index = PER_SLICE  # the first of the second slice
    table.set(index, 7)
    assert not durability.covers(table, index, index)
    [write] = table.snapshot()
    assert not durability.covers(table, index, index)
    durability.table_written(write.host_offset, len(write.data))
    table.written()
    assert not durability.covers(table, index, index)
    assert durability.awaits_flush
    durability.flushed(durability.begin_flush())
    assert durability.covers(table, index, index)
    assert not durability.awaits_flush


def test_a_slice_says_nothing_of_its_neighbours(table, durability):
    table.set(PER_SLICE, 7)
    assert durability.covers(table, 0, PER_SLICE - 1)
    assert durability.covers(table, 2 * PER_SLICE, 4 * PER_SLICE - 1)
    assert not durability.covers(table, PER_SLICE - 1, PER_SLICE)
    assert not durability.covers(table, 2 * PER_SLICE - 1, 2 * PER_SLICE)
    assert not durability.covers(table, 0, 4 * PER_SLICE - 1)


def test_a_slice_that_was_changed_again_is_not_durable(table, durability):
    table.set(0, 7)
    [write] = table.snapshot()
    table.set(0, 8)
    durability.table_written(write.host_offset, len(write.data))
    table.written()
    durability.flushed(durability.begin_flush())
    assert not durability.covers(table, 0, 0)


def test_a_table_that_left_the_cache_and_came_back_is_not_taken_for_durable(table, durability):
    durability.table_written(table.host_offset + SLICE_SIZE, SLICE_SIZE)
    again = Table(table.entries[:], table.host_offset)
    assert durability.covers(again, 0, 0)
    assert not durability.covers(again, PER_SLICE, PER_SLICE)


def test_a_write_back_that_failed_leaves_nothing_durable(table, durability):
    table.set(0, 7)
    table.snapshot()
    table.not_written()
    durability.flushed(durability.begin_flush())
    assert not durability.covers(table, 0, 0)


# --- FUA in an image -------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    return MemoryFile(new_image(tmp_path, SIZE, cluster_size=C))


def calls(file):
    """What reached the file since the last call: D a durable write, w another, f a flush."""
    found = ["f" if entry.data is None else "D" if entry.fua else "w" for entry in file.log]
    file.forget()
    return "".join(found)


async def settled(backend):
    """The first cluster is allocated and durable, and known to be."""
    await backend.write(0, b"o" * C, fua=True)
    await backend.flush()


async def test_on_a_durable_mapping_fua_is_one_durable_write(file):
    async with open_memory(file) as (backend, _):
        await settled(backend)
        calls(file)
        await backend.write(5, b"x", fua=True)
        assert await submit(backend.submit_write, 6, b"y", fua=True)
        assert calls(file) == "DD"
        await backend.flush()
        assert calls(file) == ""
        assert file.content[file.content.index(b"ooooo") + 5 :][:2] == b"xy"


async def test_on_one_that_is_not_it_is_a_write_and_a_flush(file):
    async with open_memory(file) as (backend, node):
        await settled(backend)
        assert backend.write_nowait(C, b"n" * C) is None  # its L2 entry is dirty, in one slice
        calls(file)
        for offset in (5, C + 5):
            assert isinstance(node.resolve(WRITE, offset, 1), list)
            assert node.resolve(WRITE_FUA, offset, 1) is Miss.NEEDS_FLUSH
            assert not await submit(backend.submit_write, offset, b"x", fua=True)
        await backend.write(C + 5, b"x", fua=True)
        reached = calls(file)
        assert reached[0] == "w"
        assert reached.endswith("wf")  # the L2 entry, and a flush
        assert "D" not in reached
        assert node.resolve(WRITE_FUA, C + 5, 1) == node.resolve(WRITE, C + 5, 1)


async def test_a_first_write_is_never_passed_down(file):
    async with open_memory(file) as (backend, _):
        await settled(backend)
        calls(file)
        await backend.write(C, b"x", fua=True)
        assert "D" not in calls(file)


async def test_nor_is_one_right_after_the_image_was_opened(file):
    async with open_memory(file) as (backend, _):
        await settled(backend)
    calls(file)
    async with open_memory(file) as (backend, node):
        await backend.read(0, memoryview(bytearray(1)))
        await backend.flush()
        assert node.resolve(WRITE_FUA, 0, 1) is Miss.NEEDS_FLUSH
        await backend.write(0, b"x", fua=True)
        assert calls(file) == "wf"
        await backend.write(0, b"x", fua=True)
        assert calls(file) == "D"


async def test_what_is_one_piece_of_the_file_is_one_durable_write(file):
    async with open_memory(file) as (backend, _):
        for cluster in (0, 1, 2, 4, 3):  # in the file 1 and 2 are neighbours, 2 and 3 are not
            await backend.write(cluster * C, b"o" * C)
        await backend.write(0, b"o", fua=True)
        await backend.flush()
        calls(file)
        await backend.write(2 * C - 1, b"xy", fua=True)
        assert calls(file) == "D"
        await backend.write(3 * C - 1, b"xy", fua=True)
        assert calls(file) == "wwf"


@pytest.mark.parametrize("damage", ["reserved bits", "on metadata"])
async def test_a_damaged_entry_is_reported_as_for_any_write(file, damage):
    async with open_memory(file) as (backend, _):
        await settled(backend)
        await backend.write(C, b"x")
    l2 = Layout(file.content).l1[0] & OFFSET
    entry = {"reserved bits": COPIED | 0x3200 | 2, "on metadata": COPIED | l2}[damage]
    file.content[l2 : l2 + 8] = entry.to_bytes(8, "big")
    async with open_memory(file, close=False) as (backend, _):
        await backend.write(C, b"x", fua=True)
        with pytest.raises(OSError, match=r"damaged|mapped onto metadata"):
            await backend.write(0, b"x", fua=True)
        with pytest.raises(OSError, match="stopped"):
            await backend.write(C, b"x", fua=True)


async def test_after_a_failed_flush_fua_fails_too(file):
    async with open_memory(file, close=False) as (backend, _):
        await settled(backend)
        assert backend.write_nowait(0, b"x") is None

        def fail(kind, _offset):
            if kind == "flush":
                raise OSError(errno.EIO, "gone")

        file.fail = fail
        with pytest.raises(FlushFailed):
            await backend.flush()
        file.fail = None
        for attempt in (backend.flush(), backend.write(0, b"y", fua=True)):
            with pytest.raises(FlushFailed, match="gone"):
                await attempt
        await backend.write(0, b"z")


# --- flushes without a task ------------------------------------------------------------------


async def test_a_flush_with_nothing_to_do_is_known_to_be(file):
    async with open_memory(file) as (backend, _):
        assert backend.flush_nowait() is True
        await settled(backend)
        assert backend.flush_nowait() is True
        assert backend.write_nowait(0, b"x") is None
        assert backend.flush_nowait() is False


async def test_a_flush_of_data_alone_is_one_sync_by_callback(file):
    async with open_memory(file) as (backend, _):
        await settled(backend)
        assert backend.write_nowait(0, b"x") is None
        calls(file)
        ended, errors = trio.Event(), []

        def done(error):
            errors.append(error)
            ended.set()

        assert backend.submit_flush(done) is True
        await ended.wait()
        assert errors == [None]
        assert calls(file) == "f"
        assert backend.flush_nowait() is True


UNSETTLED = {
    "dirty": lambda backend, node: backend.write(C, b"x"),
    "unlinked": lambda backend, node: backend.discard(0, C),
    "written": lambda backend, node: node.relieve(),
    "locked": lambda backend, node: node._flush_lock.acquire(),
}


@pytest.mark.parametrize("reason", UNSETTLED)
async def test_a_flush_that_has_to_do_with_metadata_is_no_callback(file, reason):
    async with open_memory(file, close=False) as (backend, node):
        await settled(backend)
        if reason == "written":
            await backend.write(C, b"x")
        await UNSETTLED[reason](backend, node)
        assert backend.flush_nowait() is False
        assert backend.submit_flush(print) is False


async def test_a_read_only_image_has_nothing_to_flush(file):
    async with open_memory(file, read_only=True) as (backend, _):
        assert backend.flush_nowait() is True

"""The node's own life: opening, block status, the quarantine over requests, settling, closing."""

import errno

import pytest
import trio

from nbdserve.errors import CorruptImage, ImageError
from nbdserve.formats.qcow2 import node as node_module
from nbdserve.formats.raw import RawNode
from qcow2_model import (
    COPIED,
    OFFSET,
    Layout,
    MemoryFile,
    assert_sound,
    guest_bytes,
    new_image,
    open_memory,
    pattern,
    submit,
)

C = 4096
SIZE = 40 * C


@pytest.fixture
def empty(tmp_path):
    return MemoryFile(new_image(tmp_path, SIZE, cluster_size=C))


async def test_opening_and_closing_writes_nothing(empty):
    for read_only in (True, False):
        async with open_memory(empty, read_only=read_only) as (backend, _):
            await backend.flush()
            await backend.read(0, memoryview(bytearray(SIZE)))
    assert not empty.log


async def test_unknown_autoclear_bits_are_cleared_for_writing_only(empty):
    empty.content[88] = 0x40
    async with open_memory(empty, read_only=True):
        pass
    assert empty.content[88] == 0x40
    async with open_memory(empty):
        assert empty.content[88] == 0
        assert [entry.data for entry in empty.log] == [bytes(8), None]


async def test_an_image_marked_corrupt_is_for_reading(empty):
    empty.content[79] = 2
    with pytest.raises(ImageError, match="is marked corrupt"):
        async with open_memory(empty):
            pass
    async with open_memory(empty, read_only=True) as (backend, _):
        await backend.read(0, memoryview(bytearray(C)))
    assert not empty.log


@pytest.mark.parametrize("what", ["L1 table", "refcount table"])
async def test_tables_in_one_place_are_refused(empty, what):
    layout = Layout(empty.content)
    target = layout.l1_offset if what == "L1 table" else layout.table_offset
    empty.content[layout.table_offset : layout.table_offset + 8] = target.to_bytes(8, "big")
    before = bytes(empty.content)
    with pytest.raises(CorruptImage, match=r"refcount block at 0x.* overlaps other metadata"):
        async with open_memory(empty):
            pass
    assert empty.content == before


async def test_block_status(empty):
    backing = RawNode(MemoryFile(b"b" * (10 * C - 512)))
    async with open_memory(empty, backing=backing) as (backend, _):
        await backend.write(0, b"x" * 2 * C)
        await backend.discard(2 * C, C)
        await backend.write(3 * C, b"x" * C)
        await backend.write_zeroes(3 * C, C, may_unmap=False)
        extents = [tuple(extent) for extent in await backend.block_status(0, SIZE)]
        assert extents == [
            (2 * C, True, False, True),
            (2 * C, False, True, True),
            (6 * C - 512, True, False, False),
            (30 * C + 512, False, True, False),
        ]
        first = await backend.block_status(5, SIZE - 5, one=True)
        assert [tuple(extent) for extent in first] == [(2 * C - 5, True, False, True)]


async def until(condition):
    """Wait until the background task has got there."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await trio.sleep(0.01)


@pytest.mark.parametrize("way", ["read", "submit", "write"])
async def test_no_cluster_is_reused_under_a_request_in_flight(empty, way):
    """A request resolved onto the cluster and waits; it is discarded, flushed, and new data wanted
    elsewhere: the reader must not see that, nor the writer overwrite it."""
    file = empty
    async with open_memory(file) as (backend, node):
        await backend.write(0, b"o" * C)
        await backend.flush()
        host = Layout(file.content).l2_entries()[0][1] & OFFSET
        hold = trio.Event()
        data = bytearray(C)

        async def in_flight():
            if way == "read":
                await backend.read(0, memoryview(data))
            elif way == "submit":
                assert await submit(backend.submit_read, 0, memoryview(data))
            else:
                await backend.write(0, b"w" * C)

        async with trio.open_nursery() as nursery:
            kind = "write" if way == "write" else "read"
            file.holds[kind] = hold
            nursery.start_soon(in_flight)
            await trio.testing.wait_all_tasks_blocked()
            del file.holds[kind]
            await backend.discard(0, C)
            await backend.flush()
            await backend.flush()
            assert len(node.image.quarantine) == 1
            for cluster in range(10, 20):
                await backend.write(cluster * C, b"n" * C)
            if way != "write":
                assert file.content[host : host + C] == b"o" * C
            hold.set()
        if way != "write":
            assert data == b"o" * C
        content = bytearray(10 * C)
        await backend.read(10 * C, memoryview(content))
        assert content == b"n" * 10 * C
        await backend.flush()
        assert not node.image.quarantine
    assert_sound(file.content)


async def test_what_is_unlinked_is_freed_though_nobody_flushes(empty, monkeypatch):
    monkeypatch.setattr(node_module, "SETTLE_AFTER", 0.02)
    async with open_memory(empty, settle=True) as (backend, node):
        await backend.write(0, b"o" * C)
        await backend.discard(0, C)
        assert node.image.quarantine
        await until(lambda: not node.image.quarantine)
        assert not Layout(empty.content).l2_entries()[0][1] & OFFSET
    assert_sound(empty.content)


async def test_settling_goes_on_after_a_flush_failed(empty, monkeypatch):
    monkeypatch.setattr(node_module, "SETTLE_AFTER", 0.02)
    failures = []

    def fail(kind, offset):
        if kind == "write" and not failures:
            failures.append(offset)
            raise OSError(28, "full")

    async with open_memory(empty, settle=True) as (backend, node):
        await backend.write(0, b"o" * C)
        empty.fail = fail
        await backend.discard(0, C)
        await until(lambda: failures)
        await backend.discard(5 * C, C)
        await backend.write(6 * C, b"o" * C)
        await backend.discard(6 * C, C)
        await until(lambda: not node.image.quarantine)
    assert_sound(empty.content)


async def test_the_corrupt_bit_is_set_soon(empty, monkeypatch):
    monkeypatch.setattr(node_module, "SETTLE_AFTER", 0.02)
    async with open_memory(empty, settle=True) as (_, node):
        node.image.stop(CorruptImage("seen"))
        await until(lambda: empty.content[79] == 2)


async def test_closing_waits_for_what_is_being_freed_in_the_background(empty, monkeypatch):
    monkeypatch.setattr(node_module, "SETTLE_AFTER", 0.02)

    async def release():
        await trio.sleep(0.1)
        empty.holds.pop("discard").set()

    async with (
        trio.open_nursery() as nursery,
        open_memory(empty, settle=True) as (backend, _),
    ):
        await backend.write(0, b"o" * 4 * C)
        await backend.flush()
        empty.holds["discard"] = trio.Event()
        await backend.discard(0, 4 * C)
        await trio.sleep(0.3)  # the background task is in the middle of it
        nursery.start_soon(release)
    assert_sound(empty.content)


async def test_many_flushes_at_once_cost_few(empty):
    async with open_memory(empty) as (backend, _):
        await backend.write(0, b"o" * C)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(backend.flush)
        assert len([entry for entry in empty.log if entry.data is None]) <= 3


async def test_writers_that_wait_for_durability_share_flushes(empty):
    """As many as come during one are covered by the next, though others go on writing."""
    file = MemoryFile(empty.content, patience=8)
    async with open_memory(file) as (backend, _):
        await backend.write(0, b"o" * C)
        await backend.flush()
        file.forget()

        async def writer(number):
            for _ in range(10):
                await backend.write(number * 8, b"n" * 8)
                await backend.flush()

        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(writer, number)
        assert 10 <= len([entry for entry in file.log if entry.data is None]) <= 40


@pytest.mark.parametrize("ending", ["fails", "is cancelled"])
async def test_a_flush_that_ends_badly_covers_nobody(empty, ending):
    async with open_memory(empty, close=False) as (backend, node):
        await backend.write(0, b"o" * C)
        empty.holds["write"] = hold = trio.Event()
        outcomes = []

        async def flush():
            try:
                await node.flush()
            except OSError:
                outcomes.append("failed")
            else:
                outcomes.append("done")

        failures = ["write"] if ending == "fails" else []

        def fail(kind, _offset):
            if kind in failures:
                failures.remove(kind)
                raise OSError(28, "full")

        empty.fail = fail
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as first:
                    first.start_soon(flush)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.start_soon(flush)
                    await trio.testing.wait_all_tasks_blocked()
                    if ending == "is cancelled":
                        scope.cancel()
                    del empty.holds["write"]
                    hold.set()
        assert outcomes == (["failed", "done"] if ending == "fails" else ["done"])
        assert guest_bytes(empty.content)[:C] == b"o" * C


async def test_statistics(empty):
    async with open_memory(empty) as (backend, _):
        await backend.write(0, b"o" * C)
        await backend.discard(0, C)
        root = backend.statistics()["nodes"]["root"]
    assert root["quarantine"] == 1
    assert root["l2_cache"].tables == 1
    assert root["refcount_cache"].tables == 1
    assert root["locks"] == 0
    assert root["corrupt"] is False


async def test_statistics_of_clusters_and_of_what_was_written_back(empty):
    async with open_memory(empty) as (backend, node):

        def found():
            said = backend.statistics()["nodes"]["root"]
            return said["allocated_clusters"], said["freed_clusters"], said["written_back"]

        assert found() == (0, 0, {})
        await backend.write(3 * C, b"o" * 2 * C)
        assert backend.write_nowait(0, b"o" * C) is None
        allocated, freed, written = found()
        assert (freed, written) == (0, {})
        assert allocated == 3 + 1  # an L2 table; the refcount block was there
        assert node.statistics()["l2_cache"].dirty == 1
        await backend.flush()
        assert found()[2] == {"REFCOUNT": 1, "NEW_L2_TABLE": 1, "L1_ENTRY": 1}
        assert node.statistics()["l2_cache"].dirty == 0
        await backend.discard(3 * C, 2 * C)
        await backend.flush()
        await backend.flush()
        assert found()[:2] == (4, 2)
        assert found()[2]["L2_ENTRY"] == 1


async def test_a_failed_write_back_counts_only_what_was_written(empty):
    async with open_memory(empty) as (backend, node):
        await backend.write(0, b"o" * C)
        write = node.image.file.write_nowait

        def refuse(offset, data):
            raise OSError(errno.EIO, "no")

        node.image.file.write_nowait = refuse
        with pytest.raises(OSError, match="no"):
            await backend.flush()
        assert node.statistics()["written_back"] == {}
        node.image.file.write_nowait = write
        await backend.flush()
        assert node.statistics()["written_back"]["REFCOUNT"] == 1


async def test_a_write_over_an_entry_that_points_at_the_header(empty):
    async with open_memory(empty) as (backend, _):
        await backend.write(0, b"o" * C)
    layout = Layout(empty.content)
    l2 = layout.l1[0] & OFFSET
    target = layout.table_offset
    empty.content[l2 : l2 + 8] = (COPIED | target).to_bytes(8, "big")
    before = bytes(empty.content)
    async with open_memory(empty) as (backend, _):
        for quick in (True, False):
            if quick:
                assert backend.write_nowait(0, b"evil") is not None
            else:
                with pytest.raises(OSError, match="mapped onto metadata"):
                    await backend.write(0, b"evil")
    assert [at for at in range(len(before)) if before[at] != empty.content[at]] == [79]


async def test_without_a_client_s_flush_closing_writes_everything(empty):
    async with open_memory(empty) as (backend, _):
        await backend.write(3, pattern(1, 7 * C))
        await backend.discard(C, 2 * C)
    wanted = bytearray(bytes(3) + pattern(1, 7 * C))
    wanted[C : 3 * C] = bytes(2 * C)
    assert guest_bytes(empty.content) == wanted.ljust(SIZE, b"\0")
    assert_sound(empty.content)

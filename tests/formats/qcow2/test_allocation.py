"""Allocating writes: what is copied, what is not, what happens when something stops them."""

import errno

import pytest
import trio

from nbdserve.block.run import Miss
from nbdserve.formats.qcow2.node import CacheSizes
from nbdserve.formats.raw import RawNode
from qcow2_model import (
    COPIED,
    OFFSET,
    Layout,
    MemoryFile,
    Request,
    assert_sound,
    guest_bytes,
    new_image,
    open_memory,
    pattern,
    perform,
)

K = 1024
C = 4096


@pytest.fixture
def image(tmp_path):
    def make(size=100 * C, **options):
        return MemoryFile(new_image(tmp_path, size, **{"cluster_size": C, **options}))

    return make


def zeroes(data):
    return data.ljust(100 * C, b"\0")


async def warm(node):
    """Have the file searched for free clusters, so that nothing must be waited for."""
    node.image.refcounts.put_back(await node.image.refcounts.take(1))


async def test_a_first_write_needs_no_waiting_and_one_write_to_the_file(image):
    """And one of zeroes where the table will be, which the next does not need."""
    file = image()
    async with open_memory(file) as (backend, node):
        await warm(node)
        assert backend.write_nowait(5, pattern(1, C)) is None
        assert [len(entry.data) for entry in file.log] == [C, C]
        assert not any(file.log[0].data)
        assert backend.write_nowait(2 * C + 5, pattern(2, C)) is None
        assert len(file.log) == 3
        assert not backend.misses
    assert_sound(file.content)
    assert guest_bytes(file.content) == zeroes(
        bytes(5) + pattern(1, C) + bytes(C) + pattern(2, C)
    )


async def test_stale_clusters_are_filled_with_zeroes(image):
    for quick in (True, False):
        file = image()
        file.content += b"\xaa" * (40 * C)
        file.size = len(file.content)
        async with open_memory(file) as (backend, node):
            await warm(node)
            if quick:
                assert backend.write_nowait(5, b"new") is None
            else:
                await backend.write(5, b"new")
        assert_sound(file.content)
        assert guest_bytes(file.content) == zeroes(bytes(5) + b"new")


async def test_over_a_backing_file_only_whole_clusters_go_without_waiting(image):
    file = image()
    old = pattern(9, 3 * C + 100)
    backing = RawNode(MemoryFile(old))
    async with open_memory(file, backing=backing) as (backend, node):
        await warm(node)
        assert backend.write_nowait(C, b"x") is Miss.NEEDS_COW
        await backend.write(C + 7, b"abc")
        await backend.write(3 * C + 50, b"de")
        await backend.write_zeroes(2 * C, C, may_unmap=True)
        assert backend.write_nowait(2 * C + 1, b"zz") is None
        assert backend.write_nowait(5 * C + 1, b"far") is Miss.NEEDS_ALLOC
        await backend.write(5 * C + 1, b"far")
        assert backend.write_nowait(6 * C, b"f" * C) is None
    assert_sound(file.content)
    wanted = bytearray(zeroes(old))
    wanted[C + 7 : C + 10] = b"abc"
    wanted[3 * C + 50 : 3 * C + 52] = b"de"
    wanted[2 * C : 3 * C] = (b"\0zz").ljust(C, b"\0")
    wanted[5 * C + 1 : 5 * C + 4] = b"far"
    wanted[6 * C : 7 * C] = b"f" * C
    assert guest_bytes(file.content, old) == wanted


async def test_a_cluster_kept_for_zeroes_is_written_in_place_and_filled(image):
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 3 * C))
        await backend.flush()
        before = Layout(file.content).l2_entries()
        await backend.write_zeroes(C, C, may_unmap=False)
        assert backend.write_nowait(C + 9, b"x") is Miss.NEEDS_ALLOC
        await backend.write(C + 9, b"x")
    assert Layout(file.content).l2_entries() == before
    wanted = bytearray(pattern(1, 3 * C))
    wanted[C : 2 * C] = (bytes(9) + b"x").ljust(C, b"\0")
    assert guest_bytes(file.content) == zeroes(wanted)
    assert_sound(file.content)


async def test_a_cluster_kept_for_zeroes_that_is_a_table_stops_the_image(image):
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, C))
    l2 = Layout(file.content).l1[0] & OFFSET
    file.content[l2 + 8 : l2 + 16] = (l2 | COPIED | 1).to_bytes(8, "big")
    before = bytes(file.content[l2 : l2 + C])
    async with open_memory(file) as (backend, _):
        with pytest.raises(OSError, match="mapped onto metadata"):
            await backend.write(C, b"x")
    assert file.content[l2 : l2 + C] == before


async def test_a_shared_cluster_is_copied(image):
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 2 * C))
    layout = Layout(file.content)
    l2 = layout.l1[0] & OFFSET
    host = layout.words(l2, 1)[0] & OFFSET
    file.content[l2 : l2 + 8] = host.to_bytes(8, "big")
    block = layout.words(layout.table_offset, 1)[0]
    file.content[block + host // C * 2 + 1] = 2
    async with open_memory(file) as (backend, _):
        await backend.write(5, b"x")
        await backend.flush()
        assert file.content[host : host + C] == pattern(1, 2 * C)[:C]
    wanted = bytearray(pattern(1, 2 * C))
    wanted[5:6] = b"x"
    assert guest_bytes(file.content) == zeroes(wanted)
    assert Layout(file.content).refcounts()[host // C] == 1  # whoever else had it


async def test_a_shared_l2_table_is_copied_once(image):
    file = image(cluster_size=512)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 4 * K))
    layout = Layout(file.content)
    l2 = layout.l1[0] & OFFSET
    file.content[layout.l1_offset : layout.l1_offset + 8] = l2.to_bytes(8, "big")
    old = MemoryFile(file.content, patience=3, seed=4)
    async with open_memory(old) as (backend, _), trio.open_nursery() as nursery:
        for start in range(0, 4 * K, 512):
            nursery.start_soon(backend.write, 10 * K + start, b"y" * 512)
    assert_sound(old.content)
    assert Layout(old.content).l1[0] != l2
    assert guest_bytes(old.content) == (
        pattern(1, 4 * K).ljust(10 * K, b"\0") + b"y" * 4 * K
    ).ljust(100 * C, b"\0")


async def test_a_table_that_cannot_be_loaded_to_be_copied_leaks_nothing(image):
    file = image(cluster_size=512)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 4 * K))
    layout = Layout(file.content)
    l2 = layout.l1[0] & OFFSET
    file.content[layout.l1_offset : layout.l1_offset + 8] = l2.to_bytes(8, "big")
    async with open_memory(file, cache_sizes=CacheSizes(0, 1 << 20)) as (backend, node):
        await warm(node)

        def fail(kind, offset):
            if kind == "read" and offset == l2:
                raise OSError(5, "unreadable")

        file.fail = fail
        with pytest.raises(OSError, match="unreadable"):
            await node.image.table(0)
        file.fail = None
        await backend.write(10 * K, b"z")
    assert_sound(file.content)


@pytest.mark.parametrize("quick", [True, False])
async def test_a_full_file_system_fails_what_needs_room_and_no_flush(image, quick):
    file = image(1 << 20, cluster_size=512, refcount_bits=64)
    async with open_memory(file) as (backend, node):
        await backend.write(0, pattern(1, 8 * K))
        await backend.flush()

        def fail(kind, offset):
            if kind == "write" and offset >= full:
                raise OSError(errno.ENOSPC, "full")

        full = len(file.content)
        file.fail = fail
        allocated = node.image.refcounts.allocated
        for number in range(40):
            at = (number + 1) * 20 * K  # clusters, L2 tables, refcount blocks
            with pytest.raises(OSError, match="full") as caught:
                await perform(backend, Request("write", at, 3 * K, quick=quick))
            assert caught.value.errno == errno.ENOSPC
        assert node.image.refcounts.allocated == allocated  # nothing is kept for who failed
        await backend.write(0, b"in place")
        await backend.flush()
        await backend.discard(4 * K, 4 * K)
        await backend.flush()
        await backend.flush()
        await backend.write(20 * K, b"n" * K)  # where there was room again
        await backend.flush()
        file.fail = None
        await backend.write(40 * K, b"n" * 3 * K)
    assert_sound(file.content)
    disk = guest_bytes(file.content)
    assert disk[: 4 * K] == b"in place" + pattern(1, 8 * K)[8 : 4 * K]
    assert disk[4 * K : 20 * K] == bytes(16 * K)
    assert disk[20 * K : 23 * K] == (b"n" * K).ljust(3 * K, b"\0")
    assert disk[40 * K : 43 * K] == b"n" * 3 * K


async def test_an_l1_entry_of_nothing_marked_copied_is_not_taken_for_the_header(image):
    """COPIED and no offset: the table would be read from, and written to, cluster 0."""
    file = image()
    layout = Layout(file.content)
    file.content[layout.l1_offset : layout.l1_offset + 8] = COPIED.to_bytes(8, "big")
    header = bytes(file.content[:C])
    async with open_memory(file) as (backend, _):
        if backend.write_nowait(0, b"data") is not None:
            await backend.write(0, b"data")
    assert file.content[:C] == header
    assert_sound(file.content)
    assert guest_bytes(file.content) == zeroes(b"data")


async def test_overlapping_writes_into_a_new_cluster_lose_nothing(image):
    file = MemoryFile(image().content, patience=5, seed=2)
    async with open_memory(file) as (backend, _), trio.open_nursery() as nursery:
        for start in range(0, 2 * C, 64):
            nursery.start_soon(backend.write, start, pattern(start, 64))
    assert_sound(file.content)
    wanted = b"".join(pattern(start, 64) for start in range(0, 2 * C, 64))
    assert guest_bytes(file.content) == zeroes(wanted)


async def test_nothing_goes_past_a_write_that_is_changing_the_mapping(image):
    file = image()
    backing = RawNode(MemoryFile(b"o" * 10 * C))
    async with open_memory(file, backing=backing) as (backend, node):
        await warm(node)
        file.holds["write"] = hold = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.write, 0, b"slow")
            await trio.testing.wait_all_tasks_blocked()
            del file.holds["write"]
            assert backend.write_nowait(0, b"q" * C) is Miss.NEEDS_COW
            assert not node.allocate_nowait(0, b"q" * C)
            assert node.allocate_nowait(C, b"q" * C)
            assert node.statistics()["locks"] == 1
            hold.set()
    assert guest_bytes(file.content, b"o" * 10 * C)[: 2 * C] == b"slow".ljust(C, b"o") + b"q" * C


@pytest.mark.parametrize("patience", range(4))
async def test_a_cancelled_write_leaves_nothing_or_all(image, patience):
    for ticks in range(30):
        file = MemoryFile(image(cluster_size=512).content, patience=patience, seed=ticks)
        old = b"o" * 20 * K
        backing = RawNode(MemoryFile(old, patience=patience))
        async with open_memory(file, backing=backing, cache_sizes=CacheSizes(0, 0)) as (backend, _):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(backend.write, 700, b"n" * 600)
                    for _ in range(ticks):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            await backend.write(2000, b"later")
        assert_sound(file.content)
        disk = guest_bytes(file.content, old)
        for start, end in ((700, 1024), (1024, 1300)):
            assert disk[start:end] in (b"n" * (end - start), b"o" * (end - start))
        assert disk[:700] == b"o" * 700
        assert disk[1300:2005] == b"o" * 700 + b"later"


async def test_a_write_over_several_tables_and_more_than_one_inline_copy(image):
    file = image(4 << 20, cluster_size=512)
    data = pattern(1, (2 << 20) + 77)
    async with open_memory(file) as (backend, _):
        assert backend.write_nowait(100, data) is Miss.WOULD_BLOCK
        await backend.write(100, data)
    assert_sound(file.content)
    assert guest_bytes(file.content)[100 : 100 + len(data)] == data

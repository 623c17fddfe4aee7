"""An image's parts together: L2 tables are made, loaded and copied; stopping; misplaced tables."""

import pytest
import trio

from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.node import CacheSizes
from qcow2_model import COPIED, Layout, MemoryFile, assert_sound, new_image, open_memory, pattern

C = 512
K = 1024


@pytest.fixture
def file(tmp_path):
    return MemoryFile(new_image(tmp_path, 400 * K, cluster_size=C))


async def test_a_new_l2_table_is_all_zero_and_linked_in_memory_only(file):
    async with open_memory(file) as (_, node):
        image = node.image
        table = await image.table(40 * K)
        assert not any(table.entries)
        assert image.mapping.l1.entries[1] == table.host_offset | COPIED
        assert table.host_offset in image.metadata.offsets
        assert image.table_nowait(40 * K) is table
        assert await image.table(63 * K) is table
        # Room was made for it in the file, and no more.
        assert [any(entry.data) for entry in file.log] == [False]
    assert_sound(file.content)


async def test_tasks_that_need_one_new_table_make_one(file):
    found = []

    async def need(image, offset):
        found.append(await image.table(offset))

    async with open_memory(file) as (_, node), trio.open_nursery() as nursery:
        for offset in range(0, 32 * K, 4 * K):
            nursery.start_soon(need, node.image, offset)
    assert len(set(map(id, found))) == 1
    assert_sound(file.content)


async def test_a_cache_full_of_dirty_tables_is_written_back_before_another_is_made(file):
    async with open_memory(file, cache_sizes=CacheSizes(l2=2048, refcount=1 << 20)) as (_, node):
        for index in range(10):
            await node.image.table(index * 32 * K)
            assert node.image.l2.statistics().tables <= 4
        assert node.image.table_nowait(11 * 32 * K) is None or file.log
    assert_sound(file.content)
    assert len([entry for entry in Layout(file.content).l1 if entry]) >= 10


async def test_a_request_that_waits_for_a_table_while_the_image_is_stopped_ends(file):
    """The cache is full of dirty tables, and nothing is written back any more."""
    sizes = CacheSizes(l2=0, refcount=1 << 20)
    async with open_memory(file, cache_sizes=sizes, close=False) as (backend, node):
        await backend.write(0, b"x" * C)
        file.holds["write"] = hold = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def write():
                with pytest.raises(OSError, match="stopped: damaged"):
                    await backend.write(40 * K, b"y" * C)

            await trio.testing.wait_all_tasks_blocked()
            node.image.stop(CorruptImage("damaged"))
            hold.set()


async def test_stopping_keeps_the_first_reason_and_wakes_the_background_task(file):
    async with open_memory(file, close=False) as (_, node):
        image = node.image
        first = image.stop(CorruptImage("first"))
        image.stop(CorruptImage("second"))
        assert (first.errno, str(first)) == (5, "[Errno 5] first")
        with trio.fail_after(1):
            await node.wanted.wait()
        with pytest.raises(OSError, match="memory: stopped: first"):
            image.check_writable()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (0, None),
        (COPIED, None),
        (1 << 20 | COPIED, "the L2 table at 0x100000 is beyond the end of the file"),
        (512, "the L2 table at 0x200 overlaps other metadata"),
    ],
)
async def test_misplaced_l2_tables_are_refused_for_writing(file, entry, reason):
    layout = Layout(file.content)
    file.content[layout.l1_offset + 8 : layout.l1_offset + 16] = entry.to_bytes(8, "big")
    before = bytes(file.content)
    if reason is None:
        async with open_memory(file):
            pass
    else:
        with pytest.raises(CorruptImage, match=f"^memory: {reason}"):
            async with open_memory(file):
                pass
    assert file.content == before


async def test_an_unaligned_l2_table_fails_reads_of_what_it_maps_and_no_others(tmp_path):
    file = MemoryFile(new_image(tmp_path, 9000 * K, cluster_size=4096))
    layout = Layout(file.content)
    file.content[layout.l1_offset : layout.l1_offset + 8] = (0x1200 | COPIED).to_bytes(8, "big")
    with pytest.raises(CorruptImage, match="L2 table at 0x1200 is not aligned"):
        async with open_memory(file):
            pass
    async with open_memory(file, read_only=True) as (backend, _):
        data = memoryview(bytearray(b"x" * 512))
        for _ in range(2):
            with pytest.raises(OSError, match="L2 table 0 at 0x1200 is not aligned"):
                await backend.read(0, data)
        with pytest.raises(OSError, match="not aligned"):
            await backend.block_status(0, 512)
        await backend.read(5000 * K, data)
        assert not any(data)


async def test_what_was_abandoned_is_free_again_after_a_flush(file):
    async with open_memory(file) as (backend, node):
        taken = await node.image.refcounts.take(5)
        node.image.abandon(taken)
        await backend.flush()
        assert not node.image.quarantine
        assert (await node.image.refcounts.take(5)).first == taken.first
        node.image.abandon(taken)
    assert_sound(file.content)


async def test_forgetting_a_compressed_cluster_unlinks_every_cluster_it_touches(file):
    async with open_memory(file) as (backend, node):
        await backend.write(0, pattern(1, 4 * K))
        node.image.quarantine.seal()
        node.image.forget(1 << 62 | (9 * C + 100) | 1 << 61)  # one sector more
        assert len(node.image.quarantine) == 2
        node.image.quarantine.release()
        node.image.quarantine._unlinked.clear()

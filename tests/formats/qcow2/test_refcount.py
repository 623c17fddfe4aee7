"""Refcounts: where clusters come from, how the structure grows, and when they may go back."""

import errno
import itertools

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2 import refcount as refcount_module
from nbdserve.formats.qcow2.node import CacheSizes
from nbdserve.formats.qcow2.refcount import free_runs, runs
from qcow2_model import (
    TINY,
    Layout,
    MemoryFile,
    assert_sound,
    audit,
    guest_bytes,
    new_image,
    open_memory,
    pattern,
)

K = 1024
M = 1024 * K


@pytest.fixture
def image(tmp_path):
    def make(size=M, **options):
        return MemoryFile(new_image(tmp_path, size, **{"cluster_size": 512, **options}))

    return make


def put(file, offset, value, width=8):
    file.content[offset : offset + width] = value.to_bytes(width, "big")


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_free_runs(entries, count):
    count = min(count, len(entries))
    found = free_runs(refcount_module.empty_refcounts(0, 8) + _array(entries), count)
    zeroes = [index for index in range(count) if entries[index] == 0]
    assert [index for first, n in found for index in range(first, first + n)] == zeroes
    assert found == list(runs(zeroes))
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found))


def _array(entries):
    array = refcount_module.empty_refcounts(len(entries), 8)
    for index, value in enumerate(entries):
        array[index] = value
    return array


async def test_clusters_at_the_end_are_contiguous_and_zero(image):
    file = image()
    end = -(-len(file.content) // 512)
    async with open_memory(file) as (_, node):
        taken = await node.image.refcounts.take(3)
        assert (taken.first, taken.count, taken.zeroed) == (end, 3, True)
        again = await node.image.refcounts.take(2)
        assert again.first == end + 3


async def test_a_device_has_no_zeroes_at_its_end(image):
    file = image()
    file.is_device = True
    async with open_memory(file, close=False) as (_, node):
        assert not (await node.image.refcounts.take(1)).zeroed


async def test_nothing_is_taken_without_a_search_of_what_is_there(image):
    async with open_memory(image()) as (_, node):
        assert node.image.refcounts.take_nowait(1) is None
        taken = await node.image.refcounts.take(1)
        assert node.image.refcounts.take_nowait(1).first == taken.first + 1


async def test_holes_in_the_middle_are_found_and_not_taken_for_zeroes(image):
    file = image()
    first_free = -(-len(file.content) // 512)
    file.content += bytes(10 * 512)  # clusters that nothing counts
    file.size += 10 * 512
    async with open_memory(file) as (_, node):
        taken = await node.image.refcounts.take(64)
        assert (taken.first, taken.count, taken.zeroed) == (first_free, 10, False)
        assert (await node.image.refcounts.take(4)).zeroed


async def test_what_is_put_back_is_taken_again(image):
    async with open_memory(image()) as (_, node):
        refcounts = node.image.refcounts
        taken = await refcounts.take(5)
        assert refcounts.allocated == 5
        refcounts.put_back(taken)
        assert refcounts.allocated == 0
        assert refcounts.take_nowait(5) == taken


async def test_what_is_put_back_into_the_middle_is_taken_again(image):
    file = image()
    file.content += bytes(10 * 512)
    file.size += 10 * 512
    async with open_memory(file) as (_, node):
        refcounts = node.image.refcounts
        taken = await refcounts.take(5)
        refcounts.put_back(taken)
        again = refcounts.take_nowait(5)
        assert (again.first, again.zeroed) == (taken.first, False)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("sizes", [None, TINY])
async def test_past_many_refcount_blocks(image, refcount_bits, sizes):
    file = image(4 * M, refcount_bits=refcount_bits)
    data = pattern(1, 3 * M + 300 * K)
    async with open_memory(file, cache_sizes=sizes) as (backend, _):
        for start in range(0, len(data), 150 * K):
            await backend.write(start, data[start : start + 150 * K])
    assert_sound(file.content)
    assert guest_bytes(file.content) == data.ljust(4 * M, b"\0")


async def test_the_refcount_table_moves_before_anything_needs_it(image):
    file = image(8 * M, refcount_bits=64)
    before = Layout(file.content)
    assert before.table_clusters == 1
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 1900 * K))
        await backend.flush()
        file.forget()
        await backend.write(1900 * K, pattern(2, 300 * K))
        await backend.flush()
    after = Layout(file.content)
    assert after.table_offset != before.table_offset
    assert after.table_clusters > before.table_clusters
    assert_sound(file.content)  # and the former table was freed
    header, table, links = [], [], []
    l1_end = after.l1_offset + after.l1_size * 8
    flushes = 0
    for offset, data, *_ in file.log:
        if data is None:
            flushes += 1
        elif offset == 48:
            header.append(flushes)
            assert len(data) == 12
        elif after.table_offset <= offset < after.table_offset + after.table_clusters * 512:
            table.append(flushes)
        elif after.l1_offset <= offset < l1_end:
            links.append(flushes)
    assert min(table) < header[0] < min(links)
    assert len(header) == 1


async def test_the_refcount_table_moves_twice_before_a_flush(image):
    file = image(16 * M, refcount_bits=64)
    async with open_memory(file) as (backend, _):
        for start in range(0, 11 * M, M):
            await backend.write(start, pattern(start, M))
    assert_sound(file.content)
    assert guest_bytes(file.content)[10 * M : 11 * M] == pattern(10 * M, M)


async def test_a_header_that_could_not_be_written_is_written_next_time(image):
    """Nothing else may be dirty then: what needed the room was given up."""
    file = image(8 * M, refcount_bits=64)
    async with open_memory(file) as (backend, node):
        await backend.write(0, pattern(1, 1900 * K))
        await backend.flush()
        old = Layout(file.content).table_offset
        refcounts = node.image.refcounts
        taken = []
        while refcounts.table.host_offset == old:
            taken.append(await refcounts.take(64))
        for clusters in taken:
            node.image.abandon(clusters)

        def fail(kind, offset):
            if kind == "write" and offset == 48:
                raise OSError(errno.EIO, "no header today")

        file.fail = fail
        with pytest.raises(OSError, match="no header today"):
            await backend.flush()
        file.fail = None
        await backend.flush()
        assert Layout(file.content).table_offset == refcounts.table.host_offset != old
    assert_sound(file.content)


async def test_a_refcount_table_has_an_end(image, monkeypatch):
    monkeypatch.setattr(refcount_module, "MAX_REFCOUNT_TABLE_BYTES", 512)
    file = image(8 * M, refcount_bits=64)
    async with open_memory(file) as (backend, _):
        with pytest.raises(OSError, match="the refcount table cannot grow") as caught:
            await backend.write(0, pattern(1, 3 * M))
        assert caught.value.errno == errno.EFBIG
        await backend.write(0, pattern(2, 512))
    assert_sound(file.content)


async def test_an_image_whose_file_reaches_past_its_refcount_table(image):
    """Somebody appended to the file: its end is more than the table can count."""
    file = image(8 * M, refcount_bits=64)
    file.content += bytes(3 * M)
    file.size = len(file.content)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 4 * M))
    assert_sound(file.content)


async def test_a_metadata_cluster_that_looks_free_stops_the_image(image):
    file = image()
    layout = Layout(file.content)
    block = layout.words(layout.table_offset, 1)[0]
    put(file, block + layout.l1_offset // 512 * 2, 0, 2)
    before = bytes(file.content)
    async with open_memory(file, close=False) as (backend, node):
        with pytest.raises(OSError, match=r"refcount of the metadata .* is zero") as caught:
            await backend.write(0, b"x")
        assert caught.value.errno == errno.EIO
        assert file.content == before
        await node.close()
    changed = [at for at in range(len(before)) if before[at] != file.content[at]]
    assert changed == [79]  # the corrupt bit
    assert file.content[79] == 2


async def test_a_search_does_not_find_what_is_being_given_back(image):
    """The cluster is discarded in the file while it is being freed: whoever takes it meanwhile
    would have new data discarded."""
    file = image(400 * K, refcount_bits=64)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 200 * K))
    async with open_memory(file) as (backend, _):
        async with trio.open_nursery() as nursery:
            await backend.discard(0, 60 * K)
            file.holds["discard"] = trio.Event()
            nursery.start_soon(backend.flush)
            await trio.testing.wait_all_tasks_blocked()
            data = pattern(2, 150 * K)
            await backend.write(220 * K, data)
            file.holds.pop("discard").set()
        content = bytearray(len(data))
        await backend.read(220 * K, memoryview(content))
        assert content == data
    assert_sound(file.content)


async def test_freed_clusters_are_discarded_once_and_used_again(image):
    file = image(400 * K)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 100 * K))
        await backend.flush()
        size = len(file.content)
        hosts = [entry & ~(1 << 63) for _, entry in Layout(file.content).l2_entries()]
        assert len(hosts) == 200
        await backend.discard(0, 100 * K)
        await backend.flush()
        assert not any(any(file.content[host : host + 512]) for host in hosts)
        await backend.write(200 * K, pattern(2, 100 * K))
        await backend.flush()
        assert len(file.content) <= size + 8 * 512  # a few L2 tables
    assert_sound(file.content)


async def test_a_discard_that_fails_is_only_a_hint_that_was_not_taken(image):
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 100 * K))

        def fail(kind, offset):
            if kind == "discard":
                raise OSError(errno.EIO, "no")

        file.fail = fail
        await backend.discard(0, 100 * K)
        await backend.flush()
    assert_sound(file.content)


async def test_freeing_that_fails_is_done_later(image):
    """The refcount block cannot be read just then."""
    file = image(4 * M, refcount_bits=64)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 300 * K))
    async with open_memory(file, cache_sizes=CacheSizes(l2=M, refcount=0)) as (backend, node):
        await backend.discard(0, 200 * K)

        def fail(kind, offset):
            if kind == "read":
                raise OSError(errno.EIO, "not now")

        file.fail = fail
        with pytest.raises(OSError, match="not now"):
            await backend.flush()
        assert node.image.quarantine
        file.fail = None
        await backend.flush()
        assert not node.image.quarantine
    assert_sound(file.content)


async def test_a_shared_compressed_cluster_goes_with_the_last_that_refers_to_it(image):
    file = image(64 * K, refcount_bits=16)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 4 * 512))
    layout = Layout(file.content)
    l2 = layout.l1[0] & 0xFFFFFFFFFFFE00
    host = layout.words(l2, 1)[0] & 0xFFFFFFFFFFFE00
    block = layout.words(layout.table_offset, 1)[0]
    for index in range(3):  # three compressed clusters within the first one's host cluster
        put(file, l2 + 8 * index, (1 << 62) | (host + 100 * index))
    put(file, block + host // 512 * 2, 3, 2)
    for index in (1, 2):
        put(file, block + (host // 512 + index) * 2, 0, 2)
    assert_sound(file.content)
    async with open_memory(file) as (backend, _):
        await backend.discard(0, 1024)
        await backend.flush()
        assert any(file.content[host : host + 512])
        assert Layout(file.content).refcounts()[host // 512] == 3  # lowered in memory only
        await backend.discard(1024, 512)
        await backend.flush()
        assert not any(file.content[host : host + 512])
    assert_sound(file.content)


async def test_a_refcount_that_is_zero_already_is_left_alone(image):
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 512))
        await backend.write(512, pattern(1, 512))
    layout = Layout(file.content)
    host = layout.l2_entries()[0][1] & ~(1 << 63)
    put(file, layout.words(layout.table_offset, 1)[0] + host // 512 * 2, 0, 2)
    async with open_memory(file) as (backend, _):
        await backend.discard(0, 512)
    assert_sound(file.content)


async def test_a_cluster_that_no_block_counts_is_left_alone(image):
    file = image(8 * M)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, 512))
    layout = Layout(file.content)
    put(file, layout.l1[0] & ((1 << 63) - 1), (1 << 63) | (1 << 40))
    async with open_memory(file) as (backend, _):
        await backend.discard(0, 512)
    assert not audit(file.content).wrong


@pytest.mark.parametrize(
    ("entry", "reason"),
    [(0x8200, "not aligned"), (1 << 63, "beyond the end"), (1 << 20, "beyond"), (1024, "overlaps")],
)
async def test_a_misplaced_refcount_block_is_refused_at_the_open(image, entry, reason):
    file = image(cluster_size=1024)
    put(file, Layout(file.content).table_offset, entry)
    before = bytes(file.content)
    with pytest.raises(CorruptImage, match=f"^memory: the refcount block at {entry:#x} .*{reason}"):
        async with open_memory(file):
            pass
    assert file.content == before


async def test_blocks_made_for_a_file_that_only_grows_do_not_stay_in_memory(image):
    file = image(3 << 20, cluster_size=512)
    sizes = CacheSizes(l2=1 << 20, refcount=4096)
    async with open_memory(file, cache_sizes=sizes) as (backend, node):
        for start in range(0, 3 << 20, 1 << 18):
            await backend.write(start, b"x" * (1 << 18))
            await backend.flush()
        assert node.image.refcounts.blocks.statistics().nb_bytes < 8192
    assert_sound(file.content)

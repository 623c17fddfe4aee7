"""Discards and write-zeroes: which clusters change, into what, and what is given back."""

import errno

import pytest
import trio

from nbdserve.formats.raw import RawNode
from qcow2_model import (
    COPIED,
    OFFSET,
    ZERO,
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

C = 4096
SIZE = 20 * C - 1024  # not whole clusters


@pytest.fixture
def image(tmp_path):
    def make(size=SIZE, **options):
        return MemoryFile(new_image(tmp_path, size, **{"cluster_size": C, **options}))

    return make


def entries(file):
    return dict(Layout(file.content).l2_entries())


def base():
    return RawNode(MemoryFile(pattern(8, 10 * C)))


async def test_a_discard_takes_whole_clusters_only(image):
    file = image()
    data = pattern(1, SIZE)
    async with open_memory(file) as (backend, _):
        await backend.write(0, data)
        await backend.discard(C - 1, 2 * C + 1)
        await backend.discard(5 * C, C - 1)
        await backend.discard(SIZE - 3072, 3072)  # the end of the disk ends its cluster
    wanted = bytearray(data)
    wanted[C : 3 * C] = bytes(2 * C)
    wanted[SIZE - 3072 :] = bytes(3072)
    assert guest_bytes(file.content) == wanted
    assert {guest for guest, entry in entries(file).items() if entry == ZERO} == {1, 2, 19}
    assert_sound(file.content)


@pytest.mark.parametrize(
    ("version", "backed", "discarded"),
    [(3, False, 0), (3, True, ZERO), (2, False, 0), (2, True, 0)],
)
async def test_discarding_what_is_not_allocated(image, version, backed, discarded):
    file = image(version=version)
    async with open_memory(file, backing=base() if backed else None) as (backend, _):
        await backend.discard(0, 2 * C)
    assert entries(file).get(0, 0) == discarded
    assert_sound(file.content)


async def test_version_2_cannot_hide_a_backing_file(image):
    file = image(version=2)
    async with open_memory(file, backing=base()) as (backend, _):
        await backend.write(0, b"x" * C)
        await backend.discard(0, C)
        assert (await backend.block_status(0, C))[0].data
    assert guest_bytes(file.content)[:C] == b"x" * C


async def test_a_discard_frees_even_what_was_kept_for_zeroes(image):
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, C))
        await backend.write_zeroes(0, C, may_unmap=False)
        await backend.flush()
        assert entries(file)[0] & OFFSET
        await backend.discard(0, C)
    assert entries(file)[0] == ZERO
    assert_sound(file.content)


ZEROES = [
    # (version, backed, may_unmap, what entry 0, allocated, and 1, not allocated, become)
    (3, False, True, ZERO, ZERO),
    (3, False, False, "kept", ZERO),
    (3, True, True, ZERO, ZERO),
    (3, True, False, "kept", ZERO),
    (2, False, True, 0, 0),
    (2, False, False, "data", "data"),
    (2, True, True, "data", "data"),
    (2, True, False, "data", "data"),
]


@pytest.mark.parametrize(("version", "backed", "may_unmap", "first", "second"), ZEROES)
async def test_write_zeroes_to_whole_clusters(image, version, backed, may_unmap, first, second):
    file = image(version=version)
    async with open_memory(file, backing=base() if backed else None) as (backend, _):
        await backend.write(0, pattern(1, C))
        await backend.flush()
        before = entries(file)[0]
        await backend.write_zeroes(0, 2 * C, may_unmap=may_unmap)
    after = entries(file)
    named = {before | ZERO: "kept", before: "data"}
    assert named.get(after.get(0, 0), after.get(0, 0)) == first
    if second == "data":
        assert after[1] & COPIED
    else:
        assert after.get(1, 0) == second
    assert not any(guest_bytes(file.content, pattern(8, 10 * C) if backed else b"")[: 2 * C])
    assert_sound(file.content)


async def test_write_zeroes_to_parts_of_clusters(image):
    for may_unmap in (True, False):
        file = image()
        data = pattern(1, SIZE)
        async with open_memory(file) as (backend, _):
            await backend.write(0, data)
            await backend.write_zeroes(C - 10, 2 * C, may_unmap=may_unmap)
            await backend.write_zeroes(5 * C + 1, 2, may_unmap=may_unmap)
            await backend.write_zeroes(SIZE - 1030, 1030, may_unmap=may_unmap)
        wanted = bytearray(data)
        wanted[C - 10 : 3 * C - 10] = bytes(2 * C)
        wanted[5 * C + 1 : 5 * C + 3] = bytes(2)
        wanted[SIZE - 1030 :] = bytes(1030)
        assert guest_bytes(file.content) == wanted
        assert_sound(file.content)


async def test_a_fast_zero_that_would_write_is_refused_and_does_nothing(image):
    file = image()
    data = pattern(1, SIZE)
    async with open_memory(file) as (backend, _):
        await backend.write(0, data)
        with pytest.raises(OSError, match="would have to be written") as caught:
            await backend.write_zeroes(C, C + 1, may_unmap=True, fast=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        await backend.write_zeroes(C, C, may_unmap=True, fast=True)
        # What reads as zeroes need not be written.
        await backend.write_zeroes(C + 5, 10, may_unmap=True, fast=True)
    wanted = bytearray(data)
    wanted[C : 2 * C] = bytes(C)
    assert guest_bytes(file.content) == wanted


@pytest.mark.parametrize("entry", [(8 * C + 512) | COPIED, 2 | COPIED | 8 * C, 1 << 60 | 8 * C])
@pytest.mark.parametrize("kind", ["discard", "zero", "part"])
async def test_a_damaged_entry_stops_the_image_before_anything_is_freed(image, entry, kind):
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, SIZE))
    l2 = Layout(file.content).l1[0] & OFFSET
    file.content[l2 : l2 + 8] = entry.to_bytes(8, "big")
    refcounts = Layout(file.content).refcounts()
    async with open_memory(file) as (backend, _):
        request = {
            "discard": Request("discard", 0, C),
            "zero": Request("zero", 0, C, flag=True),
            "part": Request("zero", 5, 5),
        }[kind]
        with pytest.raises(OSError, match="L2 entry") as caught:
            await perform(backend, request)
        assert caught.value.errno == errno.EIO
    assert Layout(file.content).refcounts() == refcounts
    assert file.content[79] == 2


@pytest.mark.parametrize("target", ["header", "refcount block", "L2 table", "compressed"])
async def test_discarding_an_entry_that_points_onto_metadata_stops_the_image(image, target):
    """It would be freed, discarded in the file and handed out again."""
    file = image()
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(1, SIZE))
    layout = Layout(file.content)
    l2 = layout.l1[0] & OFFSET
    entry = {
        "header": COPIED,  # offset 0 is no offset
        "refcount block": COPIED | layout.words(layout.table_offset, 1)[0],
        "L2 table": COPIED | l2,
        "compressed": 1 << 62 | l2 + 700,
    }[target]
    file.content[l2 : l2 + 8] = entry.to_bytes(8, "big")
    before = bytes(file.content)
    async with open_memory(file) as (backend, node):
        if target == "header":
            await backend.discard(0, C)
            assert node.image.broken is None
            return
        with pytest.raises(OSError, match="mapped onto metadata"):
            await backend.discard(0, C)
    assert [at for at in range(len(before)) if before[at] != file.content[at]] == [79]


async def test_a_whole_disk_over_many_tables(image):
    file = image(3 << 20, cluster_size=512)
    async with open_memory(file) as (backend, _):
        for start in range(0, 3 << 20, 40000):
            await backend.write(start, b"x")
        await backend.discard(0, 3 << 20)
        await backend.flush()
        assert not any(entry & OFFSET for entry in entries(file).values())
    assert_sound(file.content)


async def test_a_discard_of_nothing_allocates_nothing(image):
    file = image(3 << 20, cluster_size=512)
    async with open_memory(file) as (backend, _):
        await backend.discard(0, 3 << 20)
    assert not file.log


async def turns_of_others(request):
    """How many times another task came to run while `request` did."""
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await request
        nursery.cancel_scope.cancel()
    return turns


@pytest.mark.parametrize("version", [3, 2])
async def test_others_run_while_many_tables_are_looked_through(image, version):
    """Nothing waits if they are in memory or empty, and each maps 32 KiB only."""
    file = image(3 << 20, cluster_size=512, version=version)
    backing = RawNode(MemoryFile(bytes(512))) if version == 2 else None
    async with open_memory(file, backing=backing) as (backend, _):
        whole = {"offset": 512, "length": (3 << 20) - 512}
        assert await turns_of_others(backend.write_zeroes(**whole, may_unmap=True)) >= 95
        if version == 3:
            assert await turns_of_others(backend.discard(**whole)) >= 95


async def test_a_discard_waits_for_a_write_that_allocates(image):
    file = image()
    async with open_memory(file) as (backend, _):
        file.holds["write"] = hold = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.write, 0, b"x" * C)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(backend.discard, 0, 2 * C)
            await trio.testing.wait_all_tasks_blocked()
            hold.set()
            del file.holds["write"]
    assert entries(file)[0] == ZERO
    assert_sound(file.content)

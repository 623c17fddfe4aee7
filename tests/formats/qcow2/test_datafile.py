"""Images whose data is in another file: where it goes, what a discard leaves, what is synced."""

import errno

import pytest
import trio
import trio.testing

from nbdserve.block.flush import FlushFailed
from nbdserve.block.node import Extent
from nbdserve.block.run import READ, WRITE, WRITE_FUA, Miss
from nbdserve.errors import CorruptImage, ImageError
from nbdserve.formats.qcow2.resolve import ClusterType
from nbdserve.formats.raw import RawNode
from qcow2_model import (
    COMPRESSED,
    COPIED,
    OFFSET,
    ZERO,
    Layout,
    MemoryFile,
    assert_sound,
    new_image,
    open_memory,
    pattern,
    read_all,
    submit,
)

C = 4096
SIZE = 20 * C + 512
STALE = b"\x5a"


class Pair:
    """An image file and its data file, whose unused bytes are STALE unless it is raw."""

    def __init__(self, folder, *, raw=False):
        content = new_image(folder, SIZE, cluster_size=C, features=(4, 2 if raw else 0))
        self.file = MemoryFile(content)
        self.data = MemoryFile((b"\0" if raw else STALE) * SIZE, beside=self.file)

    def open(self, **options):
        return open_memory(self.file, data_file=self.data, **options)

    @property
    def entries(self):
        """The L2 entries of the first table, as they are in the file."""
        layout = Layout(self.file.content)
        return layout.words(layout.l1[0] & OFFSET, 21)

    def put_entry(self, cluster, entry):
        table = Layout(self.file.content).l1[0] & OFFSET
        at = table + 8 * cluster
        self.file.content[at : at + 8] = entry.to_bytes(8, "big")

    def calls(self):
        """What reached the files since the last call. Lower case: the image's, upper case: the data
        file's; w a write, d a durable one, f a sync."""
        found = ""
        for entry in self.file.log:
            letter = "f" if entry.data is None else "d" if entry.fua else "w"
            found += letter.upper() if entry.file else letter
        self.file.forget()
        return found


@pytest.fixture
def pair(tmp_path):
    return Pair(tmp_path)


@pytest.fixture
def raw(tmp_path):
    return Pair(tmp_path, raw=True)


def failing(kind):
    def fail(what, _offset):
        if what == kind:
            raise OSError(errno.EIO, "gone")

    return fail


# --- where things are ------------------------------------------------------------------------


async def test_data_lies_at_its_guest_offset_and_has_no_refcount(pair):
    async with pair.open() as (backend, _):
        await backend.write(C - 1, b"yz")
        assert backend.write_nowait(3 * C + 10, b"x" * 20) is None
    wanted = bytearray(STALE * SIZE)
    wanted[0 : 2 * C] = bytes(2 * C)
    wanted[C - 1 : C + 1] = b"yz"
    wanted[3 * C : 4 * C] = bytes(C)
    wanted[3 * C + 10 : 3 * C + 30] = b"x" * 20
    assert pair.data.content == wanted
    assert pair.entries[:5] == [COPIED, COPIED | C, 0, COPIED | 3 * C, 0]
    assert_sound(pair.file.content)  # nothing leaked


async def test_the_first_cluster_is_at_offset_zero_and_is_there(pair):
    async with pair.open() as (backend, node):
        assert node.resolve(READ, 0, C) == [(None, 0, C)]
        assert node.resolve(WRITE, 0, C) is Miss.NEEDS_ALLOC
        await backend.write(0, b"x" * C)
        for op in (READ, WRITE):
            assert node.resolve(op, 5, 10) == [(pair.data, 5, 10)]
        assert await backend.block_status(0, C) == [Extent(C, data=True, zero=False)]


async def test_neighbours_are_one_run(pair):
    async with pair.open() as (backend, node):
        await backend.write(0, b"x" * 3 * C)
        assert node.resolve(WRITE, 100, 2 * C) == [(pair.data, 100, 2 * C)]
        assert node.resolve(READ, 2 * C, 2 * C) == [(pair.data, 2 * C, C), (None, 0, C)]


async def test_the_data_file_does_not_grow_past_the_disk(pair):
    async with pair.open() as (backend, _):
        await backend.write(0, bytes(1))
        assert backend.write_nowait(SIZE - 5, b"a") is None
        await backend.write_zeroes(20 * C, 512, may_unmap=False)
        await backend.write(SIZE - 5, b"b")
        assert await read_all(backend) == bytes(SIZE - 5) + b"b" + bytes(4)
    assert len(pair.data.content) == SIZE


async def test_copy_on_write_from_a_backing_file(pair):
    old = pattern(1, 10 * C + 100)
    async with pair.open(backing=RawNode(MemoryFile(old))) as (backend, node):
        assert node.resolve(WRITE, 0, 10) is Miss.NEEDS_COW
        await backend.write(C + 10, b"x" * C)
        await backend.write(10 * C + 200, b"y")
        disk = bytearray(old.ljust(SIZE, b"\0"))
        disk[C + 10 : 2 * C + 10] = b"x" * C
        disk[10 * C + 200] = ord("y")
        assert await read_all(backend) == disk
    assert pair.data.content[C : 3 * C] == disk[C : 3 * C]
    assert pair.data.content[10 * C : 11 * C] == disk[10 * C : 11 * C]


async def test_what_is_in_the_data_file_is_never_taken_for_metadata(pair):
    """The offsets of tables in the image's file mean nothing in the data file."""
    async with pair.open() as (backend, node):
        await backend.write(0, b"x" * 10 * C)
        assert {0, C, 2 * C, 3 * C} <= node.image.metadata.offsets
        for cluster in range(10):
            assert backend.write_nowait(cluster * C, b"y") is None
            await backend.write(cluster * C, b"z")


BAD = [
    (COPIED | 5 * C, "mapped to 0x5000 of the external data file"),
    (COPIED, "mapped to 0x0"),
    (COPIED | ZERO | 5 * C, "mapped to 0x5000"),
    (COMPRESSED | C, "is compressed"),
    (COPIED | C | 2, "is damaged"),
]


@pytest.mark.parametrize(("entry", "reason"), BAD)
async def test_a_damaged_entry_stops_the_image(pair, entry, reason):
    async with pair.open() as (backend, _):
        await backend.write(0, b"x" * 3 * C)
    pair.put_entry(1, entry)
    before = bytes(pair.data.content)
    requests = [
        lambda backend: backend.write(C, b"y"),
        lambda backend: backend.write_zeroes(C, C, may_unmap=True),
        lambda backend: backend.discard(C, C),
    ]
    for request in requests:
        async with pair.open(close=False) as (backend, node):
            with pytest.raises(CorruptImage, match=reason):
                await node.image.mapping.extent(C, 1)
            assert node.resolve(READ, C, 1) is Miss.OPAQUE
            assert backend.write_nowait(2 * C, b"x") is None
            with pytest.raises(OSError, match=reason):
                await request(backend)
            assert not isinstance(node.resolve(WRITE, 2 * C, 1), list)
            assert node.resolve(READ, 2 * C, 1) == [(pair.data, 2 * C, 1)]
    assert pair.data.content == before


# --- discards and zeroes -----------------------------------------------------------------------


async def test_a_discarded_cluster_reads_as_zeroes_and_is_punched(pair):
    async with pair.open() as (backend, node):
        await backend.write(0, b"x" * 5 * C)
        await backend.discard(0, 2 * C)
        await backend.discard(4 * C, C)
        assert await read_all(backend) == bytes(2 * C) + b"x" * 2 * C + bytes(SIZE - 4 * C)
        assert not node.image.quarantine
    assert pair.entries[:6] == [ZERO, ZERO, COPIED | 2 * C, COPIED | 3 * C, ZERO, 0]
    assert pair.data.content == (
        bytes(2 * C) + b"x" * 2 * C + bytes(C) + STALE * (SIZE - 5 * C)
    )
    assert_sound(pair.file.content)


async def test_a_hole_that_cannot_be_punched_is_no_error(pair):
    async with pair.open() as (backend, _):
        await backend.write(0, b"x" * C)
        pair.data.fail = failing("discard")
        await backend.discard(0, C)
        pair.data.fail = None
        assert await read_all(backend) == bytes(SIZE)
        # The old bytes are still in the file, and must not come back with the rest of the cluster.
        await backend.write(5, b"y")
        assert await read_all(backend) == bytes(5) + b"y" + bytes(SIZE - 6)


async def test_zeroes_without_unmap_keep_the_room(pair):
    async with pair.open() as (backend, node):
        await backend.write(0, b"x" * 3 * C)
        await backend.write_zeroes(0, 3 * C, may_unmap=False)
        assert await read_all(backend) == bytes(SIZE)
        kinds = [(await node.image.mapping.extent(n * C, 1)).type for n in (0, 1)]
        # Of the first cluster an entry cannot say both.
        assert kinds == [ClusterType.ZERO_PLAIN, ClusterType.ZERO_ALLOC]
    assert pair.data.content[: 3 * C] == b"x" * 3 * C
    assert pair.entries[:3] == [COPIED | n * C | ZERO for n in range(3)]
    async with pair.open() as (backend, _):
        await backend.write(C + 1, b"y")
        assert await read_all(backend) == bytes(C + 1) + b"y" + bytes(SIZE - C - 2)
        await backend.write_zeroes(2 * C, C, may_unmap=True)
    assert pair.entries[:3] == [COPIED | ZERO, COPIED | C, ZERO]
    assert pair.data.content[2 * C : 3 * C] == bytes(C)


@pytest.mark.parametrize("quick", [False, True])
async def test_a_write_waits_for_the_hole_under_it(pair, quick):
    """The entry says already that the cluster is free, but a hole punched late would take what is
    written there now."""
    async with pair.open() as (backend, _):
        await backend.write(0, b"x" * 2 * C)
        pair.data.holds["discard"] = hold = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.discard, 0, 2 * C)
            await trio.testing.wait_all_tasks_blocked()
            if quick:
                assert backend.write_nowait(C, b"y" * C) is not None
            nursery.start_soon(backend.write, C, b"y" * C)
            await trio.testing.wait_all_tasks_blocked()
            hold.set()
        assert await read_all(backend) == bytes(C) + b"y" * C + bytes(SIZE - 2 * C)
    assert pair.data.content[C : 2 * C] == b"y" * C


# --- a raw data file ---------------------------------------------------------------------------


async def test_a_raw_data_file_has_the_zeroes_and_the_mapping_stays(raw):
    async with raw.open() as (backend, _):
        await backend.write(0, b"x" * 8 * C)
        await backend.flush()
        before = raw.entries
        await backend.discard(100, 2 * C)
        await backend.write_zeroes(3 * C + 5, 10, may_unmap=True)
        await backend.write_zeroes(4 * C, C, may_unmap=False)
        await backend.write_zeroes(19 * C, C + 512, may_unmap=True)
        disk = await read_all(backend)
    wanted = bytearray((b"x" * 8 * C).ljust(SIZE, b"\0"))
    for start, end in ((C, 2 * C), (3 * C + 5, 3 * C + 15), (4 * C, 5 * C)):
        wanted[start:end] = bytes(end - start)
    assert raw.data.content == disk == wanted
    assert raw.entries == before


async def test_where_zeroes_are_slow_a_discard_of_a_raw_data_file_does_nothing(raw):
    async with raw.open() as (backend, _):
        await backend.write(0, b"x" * 2 * C)
        raw.data.zeroes_fast = False
        await backend.discard(0, C)
        assert await read_all(backend) == raw.data.content == (b"x" * 2 * C).ljust(SIZE, b"\0")
        with pytest.raises(OSError, match="no fast zeroes"):
            await backend.write_zeroes(0, C, may_unmap=True, fast=True)
        await backend.write_zeroes(0, C, may_unmap=True)
        assert await read_all(backend) == raw.data.content
        assert not any(raw.data.content[:C])


async def test_a_raw_data_file_that_fails_fails_the_request(raw):
    async with raw.open() as (backend, _):
        raw.data.fail = failing("zeroes")
        for request in (backend.discard(0, C), backend.write_zeroes(0, C, may_unmap=True)):
            with pytest.raises(OSError, match="gone"):
                await request
        raw.data.fail = None


async def test_the_raw_bit_stays_set(tmp_path, raw):
    image = bytearray(raw.file.content)
    image[88 + 7] |= 1 << 5  # one that nobody knows
    raw.file.content[:] = image
    async with raw.open() as (backend, _):
        await backend.write(0, b"x")
    assert int.from_bytes(raw.file.content[88:96], "big") == 2


# --- flushes -----------------------------------------------------------------------------------


async def test_what_is_synced_and_when(pair):
    async with pair.open() as (backend, _):
        assert backend.flush_nowait() is True
        await backend.flush()
        assert pair.calls() == ""
        await backend.write(0, b"x" * C)
        await backend.flush()
        # data; room for the new table; refcounts and the table; syncs of both; the entry in L1,
        # and its sync
        assert pair.calls() == "WwwwFfwf"
        await backend.flush()
        assert backend.flush_nowait() is True
        assert pair.calls() == ""
        assert backend.write_nowait(0, b"y") is None
        assert backend.flush_nowait() is False
        await backend.flush()
        assert pair.calls() == "WF"
        await backend.write(C, b"z")
        await backend.flush()
        assert pair.calls() == "WFwf"


async def test_a_flush_of_data_alone_is_one_sync_by_callback(pair):
    async with pair.open() as (backend, _):
        await backend.write(0, b"x")
        await backend.flush()
        await backend.flush()  # then it is known that all metadata is durable
        await backend.write(0, b"y")
        pair.calls()
        ended, errors = trio.Event(), []

        def done(error):
            errors.append(error)
            ended.set()

        assert backend.submit_flush(done) is True
        await ended.wait()
        assert errors == [None]
        assert pair.calls() == "F"
        assert backend.flush_nowait() is True


async def test_entries_go_out_after_the_data_was_synced_when_the_cache_is_full(pair):
    async with pair.open() as (backend, node):
        await backend.write(0, b"x" * C)
        await node.relieve()
        assert pair.calls() == "WwwwFfw"  # the first w makes room for the L2 table


@pytest.mark.parametrize("which", ["file", "data"])
async def test_a_sync_that_fails_reaches_the_client_and_stays(pair, which):
    async with pair.open(close=False) as (backend, _):
        await backend.write(0, b"x" * C)
        await backend.flush()
        await backend.write(C, b"x" * C)
        pair.calls()
        getattr(pair, which).fail = failing("flush")
        with pytest.raises(FlushFailed, match="gone"):
            await backend.flush()
        # What could not be made durable is not linked: its entry is still in memory alone.
        assert pair.calls() == ("Fw" if which == "file" else "")
        getattr(pair, which).fail = None
        for _ in range(2):
            with pytest.raises(FlushFailed, match="gone"):
                await backend.flush()
    assert bool(pair.entries[1]) is (which == "file")


@pytest.mark.parametrize("which", ["file", "data"])
async def test_after_a_failed_sync_flushes_without_a_task_fail_too(pair, which):
    async with pair.open(close=False) as (backend, _):
        await backend.write(0, b"x")
        await backend.flush()
        await backend.flush()
        leaf = getattr(pair, which)
        leaf.fail = failing("flush")
        leaf.presume_written()
        with pytest.raises(FlushFailed):
            await backend.flush()
        leaf.fail = None
        with pytest.raises(FlushFailed):
            backend.flush_nowait()


@pytest.mark.parametrize("which", ["file", "data"])
async def test_a_write_that_fails_reaches_the_client(pair, which):
    async with pair.open(close=False) as (backend, _):
        leaf = getattr(pair, which)
        leaf.fail = failing("write")
        with pytest.raises(OSError, match="gone"):  # in the image: no room for a table
            await backend.write(0, b"x")
        leaf.fail = None
        await backend.write(0, b"x")
        await backend.flush()
        pair.file.fail = failing("write")
        await backend.write(C, b"x")
        with pytest.raises(OSError, match="gone"):
            await backend.flush()
        pair.file.fail = None
        await backend.write(0, b"y")
        await backend.flush()
        assert pair.data.content[:1] == b"y"
        assert pair.entries[0] == COPIED


# --- FUA ---------------------------------------------------------------------------------------


async def test_fua_on_a_durable_mapping_is_one_durable_write_of_the_data_file(pair):
    async with pair.open() as (backend, _):
        await backend.write(0, b"x" * C, fua=True)
        await backend.write(0, b"x", fua=True)
        pair.calls()
        await backend.write(5, b"y", fua=True)
        assert await submit(backend.submit_write, 6, b"z", fua=True)
        assert pair.calls() == "DD"
        await backend.flush()
        assert pair.calls() == ""
        assert pair.data.content[5:7] == b"yz"
        await backend.write(C, b"n", fua=True)
        assert pair.calls() == "WFwf"


async def test_a_mapping_that_was_there_is_trusted_after_one_sync_of_the_image(pair):
    """Which nothing else would cause: only the data file is written to."""
    async with pair.open() as (backend, _):
        await backend.write(0, b"x" * C)
    pair.calls()
    async with pair.open() as (backend, node):
        await backend.read(0, memoryview(bytearray(1)))
        await backend.flush()
        assert pair.calls() == ""
        assert node.resolve(WRITE_FUA, 0, 1) is Miss.NEEDS_FLUSH
        await backend.write(0, b"y", fua=True)
        assert sorted(pair.calls()) == ["F", "W", "f"]
        assert node.resolve(WRITE_FUA, 0, 1) == [(pair.data, 0, 1)]
        await backend.write(0, b"z", fua=True)
        assert pair.calls() == "D"


async def test_an_entry_that_was_written_again_with_its_old_value_is_not_durable(pair):
    async with pair.open() as (backend, node):
        await backend.write(0, b"x" * C, fua=True)
        await backend.write(0, b"x", fua=True)
        await backend.discard(0, C)
        await backend.write(0, b"y" * C)
        assert node.resolve(WRITE, 0, 1) == [(pair.data, 0, 1)]
        assert node.resolve(WRITE_FUA, 0, 1) is Miss.NEEDS_FLUSH


# --- opening -----------------------------------------------------------------------------------


async def test_an_image_is_opened_with_the_data_file_that_it_has_and_no_other(tmp_path, pair):
    with pytest.raises(ImageError, match="in an external data file but names none"):
        async with open_memory(pair.file):
            pass
    plain = MemoryFile(new_image(tmp_path, SIZE))
    with pytest.raises(ImageError, match="keeps its data itself"):
        async with open_memory(plain, data_file=pair.data):
            pass


async def test_the_data_file_is_a_child(pair):
    async with pair.open() as (_, node):
        assert node.children == {"file": pair.file, "data-file": pair.data}


async def test_read_only_nothing_is_written_or_synced(pair):
    async with pair.open() as (backend, _):
        await backend.write(0, b"x" * C)
    pair.calls()
    async with pair.open(read_only=True) as (backend, _):
        assert await read_all(backend) == (b"x" * C).ljust(SIZE, b"\0")
        assert backend.flush_nowait() is True
        await backend.flush()
    assert pair.calls() == ""

"""The block backend: which way a request goes, what FUA and the write cache make of it, bounds."""

import errno

import pytest
import trio
import trio.testing

from fakes import FakeLeaf, FakeNode
from nbdserve.block.backend import MAX_EXTENTS
from nbdserve.block.node import MAX_INLINE, Extent
from nbdserve.block.run import READ, WRITE, Miss

SIZE = 4 << 20
FLUSH = ["flush_to_os", "flush_to_disk"]


class MappedNode(FakeNode):
    """Resolves to the runs, or the miss, that a test sets."""

    def __init__(self):
        super().__init__(SIZE)
        self.runs = Miss.OPAQUE
        self.allocates = False

    def resolve(self, op, offset, length):
        assert op in (READ, WRITE)
        return self.runs

    def allocate_nowait(self, offset, data):
        self._record("allocate_nowait", offset, len(data))
        return self.allocates


def nobody_in_flight(epochs):
    tag = epochs.advance()
    return epochs.oldest() > tag


def buffer(length, fill=0xEE):
    return memoryview(bytearray([fill]) * length)


# --- the synchronous way ---------------------------------------------------------------------


async def test_reads_and_writes_go_straight_to_the_leaf(make):
    leaf = FakeLeaf(SIZE)
    backend = make(leaf)
    assert backend.write_nowait(4096, b"hello") is None
    data = buffer(5)
    assert backend.read_nowait(4096, data) is None
    assert data == b"hello"
    assert leaf.names() == ["write_nowait", "read_nowait"]


async def test_a_run_without_a_leaf_reads_as_zeroes(make):
    root = MappedNode()
    root.runs = [(None, 0, 100)]
    data = buffer(100)
    assert make(root).read_nowait(0, data) is None
    assert data == bytes(100)


async def test_several_runs_fill_the_buffer_in_guest_order(make):
    root, one, two = MappedNode(), FakeLeaf(), FakeLeaf()
    one.bytes[:3], two.bytes[500:502] = b"abc", b"xy"
    root.runs = [(one, 0, 3), (None, 0, 2), (two, 500, 2)]
    data = buffer(7)
    assert make(root).read_nowait(0, data) is None
    assert data == b"abc\0\0xy"


async def test_several_runs_are_written_in_guest_order(make):
    root, one, two = MappedNode(), FakeLeaf(), FakeLeaf()
    root.runs = [(one, 10, 3), (two, 0, 2)]
    assert make(root).write_nowait(0, b"abcde") is None
    assert one.bytes[9:14] == b"\0abc\0"
    assert two.bytes[:3] == b"de\0"


async def test_a_leaf_that_would_block_sends_the_request_the_other_way(make):
    leaf = FakeLeaf(SIZE)
    leaf.blocks = True
    backend = make(leaf)
    assert backend.read_nowait(0, buffer(1)) is Miss.WOULD_BLOCK
    assert backend.write_nowait(0, b"x") is Miss.WOULD_BLOCK


@pytest.mark.parametrize("position", [0, 1])
async def test_so_does_one_leaf_of_several(make, position):
    root, leaves = MappedNode(), [FakeLeaf(), FakeLeaf()]
    leaves[position].blocks = True
    root.runs = [(leaves[0], 0, 1), (leaves[1], 0, 1)]
    backend = make(root)
    assert backend.read_nowait(0, buffer(2)) is Miss.WOULD_BLOCK
    assert backend.write_nowait(0, b"xy") is Miss.WOULD_BLOCK
    assert backend.statistics()["misses"] == {"WOULD_BLOCK": 2}


@pytest.mark.parametrize("miss", [Miss.NOT_CACHED, Miss.NEEDS_COW, Miss.COMPRESSED, Miss.OPAQUE])
async def test_a_miss_is_returned_and_counted(make, miss):
    root = MappedNode()
    root.runs = miss
    backend = make(root)
    assert backend.read_nowait(0, buffer(1)) is miss
    assert backend.write_nowait(0, b"x") is miss
    assert backend.statistics()["misses"] == {miss.name: 2}
    assert root.calls == []


@pytest.mark.parametrize("allocates", [True, False])
async def test_a_write_that_needs_allocation_is_offered_to_the_root(make, allocates):
    root = MappedNode()
    root.runs, root.allocates = Miss.NEEDS_ALLOC, allocates
    backend = make(root)
    assert backend.write_nowait(8, b"abc") is (None if allocates else Miss.NEEDS_ALLOC)
    assert root.calls == [("allocate_nowait", 8, 3)]
    assert bool(backend.misses) is not allocates


async def test_a_read_never_allocates(make):
    root = MappedNode()
    root.runs = Miss.NEEDS_ALLOC
    assert make(root).read_nowait(0, buffer(1)) is Miss.NEEDS_ALLOC
    assert root.calls == []


async def test_a_long_write_would_hold_everybody_up(make):
    leaf = FakeLeaf(SIZE)
    assert make(leaf).write_nowait(0, bytes(MAX_INLINE + 1)) is Miss.WOULD_BLOCK
    assert make(leaf).write_nowait(0, bytes(MAX_INLINE)) is None
    assert leaf.names() == ["write_nowait"]


@pytest.mark.parametrize(
    "options", [{"write_cache": False}, {"detect_zeroes": "on"}, {"detect_zeroes": "unmap"}]
)
async def test_writes_that_must_be_looked_into_never_go_the_short_way(make, options):
    leaf = FakeLeaf(SIZE)
    assert make(leaf, **options).write_nowait(0, b"x") is Miss.WOULD_BLOCK
    assert leaf.calls == []


async def test_a_write_never_lands_nowhere(make):
    root = MappedNode()
    root.runs = [(FakeLeaf(), 0, 1), (None, 0, 1)]
    with pytest.raises(OSError, match="without a leaf"):
        make(root).write_nowait(0, b"xy")


async def test_the_map_of_a_range_joins_neighbours(make):
    root, one, two = MappedNode(), FakeLeaf(), FakeLeaf()
    root.runs = [(None, 0, 1), (None, 0, 2), (one, 0, 3), (two, 0, 4), (None, 0, 5)]
    assert make(root).map_nowait(0, 15) == [(True, 3), (False, 7), (True, 5)]


async def test_there_is_no_map_of_a_miss(make):
    assert make(MappedNode()).map_nowait(0, 15) is None


# --- reads that are queued -------------------------------------------------------------------


class QueueLeaf(FakeLeaf):
    """Completes a submitted read when the test says so."""

    def submit_read(self, offset, buffer, done):
        self.done = done


async def test_a_queued_read_keeps_its_clusters_until_it_completes(make, epochs):
    leaf = QueueLeaf(SIZE)
    completed = []
    assert make(leaf).submit_read(0, buffer(512), completed.append) is True
    tag = epochs.advance()
    assert epochs.oldest() <= tag
    error = OSError(errno.EIO, "bad sector")
    leaf.done(error)
    assert completed == [error]
    assert epochs.oldest() > tag


@pytest.mark.parametrize("runs", [Miss.NOT_CACHED, [(None, 0, 9)], "two"])
async def test_only_what_is_one_piece_of_a_leaf_is_queued(make, epochs, runs):
    root = MappedNode()
    root.runs = [(QueueLeaf(), 0, 4), (QueueLeaf(), 0, 5)] if runs == "two" else runs
    assert make(root).submit_read(0, buffer(9), lambda error: None) is False
    assert nobody_in_flight(epochs)


# --- FUA and the write cache -----------------------------------------------------------------

WRITES = {
    "write": (lambda backend, **fua: backend.write(0, b"x", **fua), "write"),
    "zeroes": (
        lambda backend, **fua: backend.write_zeroes(0, 512, may_unmap=True, **fua),
        "write_zeroes",
    ),
    "trim": (lambda backend, **fua: backend.discard(0, 512, **fua), "discard"),
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("write_cache", [True, False])
@pytest.mark.parametrize("fua", [True, False])
async def test_a_write_is_flushed_if_it_must_be_durable_when_answered(
    make, kind, write_cache, fua
):
    call, name = WRITES[kind]
    leaf = FakeLeaf(SIZE)
    await call(make(leaf, write_cache=write_cache), fua=fua)
    must_be = fua or not (write_cache or kind == "trim")
    assert leaf.names() == [name, *(FLUSH if must_be else [])]


@pytest.mark.parametrize("kind", WRITES)
async def test_fua_is_a_plain_write_where_nothing_is_flushed(make, kind):
    """--cache=unsafe: metadata goes to the OS, nothing is synced."""
    call, name = WRITES[kind]
    leaf = FakeLeaf(SIZE, no_flush=True)
    await call(make(leaf), fua=True)
    assert leaf.names() == [name, "flush_to_os"]


@pytest.mark.parametrize("kind", WRITES)
async def test_a_write_that_failed_is_not_flushed(make, kind):
    call, name = WRITES[kind]
    leaf = FakeLeaf(SIZE)
    leaf.errors[name] = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        await call(make(leaf, write_cache=False))
    assert leaf.names() == [name]


@pytest.mark.parametrize("kind", WRITES)
async def test_a_flush_that_fails_fails_the_write(make, kind):
    leaf = FakeLeaf(SIZE)
    leaf.errors["flush_to_disk"] = OSError(errno.EIO, "gone")
    with pytest.raises(OSError, match="gone"):
        await WRITES[kind][0](make(leaf), fua=True)


async def test_a_discard_that_is_ignored_is_still_durable_with_fua(make):
    leaf = FakeLeaf(SIZE)
    await make(leaf, discard=False).discard(0, 512, fua=True)
    assert leaf.names() == FLUSH


async def test_a_zero_write_that_was_detected_is_as_durable_as_any(make):
    leaf = FakeLeaf(SIZE)
    await make(leaf, detect_zeroes="on", write_cache=False).write(0, bytes(512))
    assert leaf.names() == ["write_zeroes", *FLUSH]


# --- discard and zeroes ----------------------------------------------------------------------


async def test_with_discard_ignored_nothing_is_unmapped(make):
    """As QEMU since 9.1, where discard=ignore clears BDRV_REQ_MAY_UNMAP in all cases."""
    leaf = FakeLeaf(SIZE)
    backend = make(leaf, discard=False)
    await backend.discard(0, 512)
    await backend.write_zeroes(0, 512, may_unmap=True)
    assert leaf.calls == [("write_zeroes", 0, 512, False, True)]


@pytest.mark.parametrize("may_unmap", [True, False])
@pytest.mark.parametrize("fast", [True, False])
async def test_what_a_zero_write_may_do_is_passed_on(make, may_unmap, fast):
    leaf = FakeLeaf(SIZE)
    await make(leaf).write_zeroes(1, 2, may_unmap=may_unmap, fast=fast)
    assert leaf.calls == [("write_zeroes", 1, 2, may_unmap, not fast)]


@pytest.mark.parametrize(
    ("mode", "data", "call"),
    [
        ("off", bytes(9), ("write", 3, 9)),
        ("on", bytes(9), ("write_zeroes", 3, 9, False, True)),
        ("unmap", bytes(9), ("write_zeroes", 3, 9, True, True)),
        ("on", b"\0\0\0\0x\0\0\0\0", ("write", 3, 9)),
        ("unmap", b"\0\0\0\0x\0\0\0\0", ("write", 3, 9)),
    ],
)
async def test_zeroes_are_detected(make, mode, data, call):
    leaf = FakeLeaf(SIZE)
    await make(leaf, detect_zeroes=mode).write(3, data)
    assert leaf.calls == [call]


# --- block status ----------------------------------------------------------------------------


async def test_status_covers_the_range_with_neighbours_joined(make):
    leaf = FakeLeaf(SIZE)
    assert await make(leaf).block_status(0, 3 << 16) == [
        Extent(1 << 16, data=True, zero=False),
        Extent(1 << 16, data=False, zero=True),
        Extent(1 << 16, data=True, zero=False),
    ]

    async def halves(offset, length):
        return [Extent(min(length, 512), data=True, zero=False)]

    leaf.block_status = halves
    assert await make(leaf).block_status(0, 1300) == [Extent(1300, data=True, zero=False)]


async def test_status_of_one_extent_is_the_whole_of_it(make):
    leaf = FakeLeaf(SIZE)
    assert await make(leaf).block_status(100, 3 << 16, one=True) == [
        Extent((1 << 16) - 100, data=True, zero=False)
    ]


async def test_the_layer_that_decides_keeps_extents_apart(make):
    leaf = FakeLeaf(SIZE)

    async def mixed(offset, length):
        here = Extent(512, data=False, zero=True)
        return [here, here._replace(allocated=False)]

    leaf.block_status = mixed
    assert [extent.allocated for extent in await make(leaf).block_status(0, 1024)] == [True, False]


async def test_a_status_answer_is_bounded(make):
    leaf = FakeLeaf(SIZE)
    leaf.extents = 1
    extents = await make(leaf).block_status(0, SIZE)
    assert len(extents) == MAX_EXTENTS
    assert leaf.names() == ["block_status"] * MAX_EXTENTS


async def test_so_is_the_work_for_a_status_answer_of_one_extent(make):
    """A node answers up to the end of one of its tables: however small these are."""
    leaf = FakeLeaf(SIZE)
    looks = 0

    async def holes(offset, length):
        nonlocal looks
        looks += 1
        return [Extent(1, data=False, zero=True)]

    leaf.block_status = holes
    assert await make(leaf).block_status(0, SIZE) == [Extent(MAX_EXTENTS, data=False, zero=True)]
    assert looks == MAX_EXTENTS


# --- bounds, epochs, statistics --------------------------------------------------------------


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0)])
async def test_a_range_outside_is_a_bug_of_the_front_end(make, epochs, offset, length):
    leaf = FakeLeaf(SIZE)
    with pytest.raises(AssertionError):
        await make(leaf).read(offset, buffer(length))
    assert leaf.calls == []
    assert nobody_in_flight(epochs)


@pytest.mark.parametrize("name", ["read", "write", "write_zeroes", "discard", "block_status"])
@pytest.mark.parametrize("ending", ["returns", "fails", "cancelled"])
async def test_a_request_is_in_an_epoch_exactly_while_it_runs(make, epochs, name, ending):
    leaf = FakeLeaf(SIZE)
    gate = leaf.gates[name] = trio.Event()
    backend = make(leaf)
    call = {
        "read": lambda: backend.read(0, buffer(1)),
        "write": lambda: backend.write(0, b"x"),
        "write_zeroes": lambda: backend.write_zeroes(0, 1, may_unmap=False),
        "discard": lambda: backend.discard(0, 1),
        "block_status": lambda: backend.block_status(0, 1),
    }[name]
    if ending == "fails":
        del leaf.gates[name]
        leaf.errors[name] = OSError(errno.EIO, "broken")
        with pytest.raises(OSError, match="broken"):
            await call()
        assert nobody_in_flight(epochs)
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        tag = epochs.advance()
        assert epochs.oldest() <= tag
        if ending == "cancelled":
            nursery.cancel_scope.cancel()
        gate.set()
    assert epochs.oldest() > tag


async def test_a_flush_is_in_no_epoch(make, epochs):
    """A flush waits for nobody's clusters, and others' release must not wait for it."""
    leaf = FakeLeaf(SIZE)
    leaf.gates["flush_to_disk"] = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make(leaf).flush)
        await trio.testing.wait_all_tasks_blocked()
        assert nobody_in_flight(epochs)
        leaf.gates["flush_to_disk"].set()
    assert leaf.names() == FLUSH


async def test_statistics_walk_the_tree(make):
    file, backing = FakeLeaf(), FakeLeaf()
    file.statistics = lambda: {"which": "file"}
    file.driver = "file"
    file.node_name = "disk0"
    backend = make(FakeNode(SIZE, file=file, backing=backing))
    assert backend.statistics()["nodes"] == {
        "root": {"node_name": "", "driver": "", "filename": "fake"},
        "root.file": {
            "node_name": "disk0", "driver": "file", "filename": "fake", "which": "file"
        },
        "root.backing": {"node_name": "", "driver": "", "filename": "fake"},
    }  # fmt: skip


async def test_statistics_are_those_of_all_accounts(make):
    backend = make(FakeLeaf(SIZE))
    stays, leaves = backend.accounts.open(), backend.accounts.open()
    stays.operations["rd"].add(2, 100, 5000)
    leaves.operations["rd"].add(1, 10, 5000)
    backend.accounts.close(leaves)
    found = backend.statistics()
    assert (found["requests"]["rd_operations"], found["requests"]["rd_bytes"]) == (3, 110)
    assert (found["left"]["rd_operations"], found["left"]["connections"]) == (1, 1)


async def test_a_write_that_cannot_be_queued_is_a_miss_and_a_read_is_left_to_read_nowait(make):
    root = MappedNode()
    root.runs = Miss.NEEDS_COW
    backend = make(root)
    assert not backend.submit_write(0, b"x", pytest.fail)
    assert not backend.submit_read(0, buffer(1), pytest.fail)
    assert backend.statistics()["misses"] == {"NEEDS_COW": 1}

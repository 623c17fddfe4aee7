"""The flush chain, step by step, over a whole tree: what is called in which order, and what a
failure at each step leaves undone, tells the client and means for later.

The tree is a filter over a format node that has a `file`, a `data-file` and a `backing` file, each
of these a leaf (design: "The flush chain").
"""

import errno

import pytest
import trio
import trio.testing

from fakes import FakeNode
from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.flush import FlushFailed
from nbdserve.block.node import Leaf
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.filters.throttle import ThrottleNode
from nbdserve.filters.throttle_group import ThrottleGroup
from nbdserve.formats.raw import RawNode

SIZE = 1 << 16


class Disk(Leaf):
    """Counts syncs; `hold` keeps them until `end`. What is `durable` survives a power cut."""

    def __init__(self, name, journal, *, no_flush=False):
        super().__init__(name, SIZE, read_only=False, no_flush=no_flush)
        self.journal = journal
        self.written = bytearray(SIZE)
        self.durable = bytes(SIZE)
        self.syncs = 0
        self.hold = False
        self.error = None
        self._syncing = []

    async def write(self, offset, data):
        await trio.lowlevel.checkpoint()
        self.write_nowait(offset, data)

    def write_nowait(self, offset, data):
        self.journal.append(f"write {self.filename}")
        self.written[offset : offset + len(data)] = data
        self.generation.written += 1
        return True

    def submit_sync(self, done):
        assert not self._syncing, "two syncs of a leaf at a time"
        self.syncs += 1
        self.journal.append(f"sync {self.filename}")
        self._syncing.append((bytes(self.written), done))
        if not self.hold:
            trio.lowlevel.current_trio_token().run_sync_soon(self.end)

    def end(self):
        content, done = self._syncing.pop()
        if self.error is None:
            self.durable = content
        done(self.error)


class Format(FakeNode):
    """Caches one byte of metadata for each write of data: the data goes to data-file if there is
    one, the metadata to file when flushed, after what it depends on."""

    def __init__(self, journal, no_flush=False, **children):
        super().__init__(SIZE, no_flush=no_flush, **children)
        self.journal = journal
        self.dirty = {}
        self.error = None

    async def write(self, offset, data):
        children = self.children
        await children.get("data-file", children["file"]).write(offset, data)
        self.dirty[offset // 512] = 1

    async def flush_to_os(self):
        self.journal.append("metadata")
        if self.error is not None:
            raise self.error
        if self.dirty:
            await self.children["file"].flush()  # the order of its own tables
            await self.children["file"].write(SIZE - 512, bytes([len(self.dirty)]))
            self.dirty.clear()

    async def flush_to_disk(self):
        self.journal.append("own storage")


class Tree:
    """throttle -> format -> file, data-file, backing; all are raw windows on a disk."""

    def __init__(self, nursery, *, no_flush=False, data_file=True):
        self.journal = []
        disks = ["file", *(["data-file"] if data_file else []), "backing"]
        self.disks = {name: Disk(name, self.journal, no_flush=no_flush) for name in disks}
        children = {
            name.replace("-", "_"): RawNode(disk) for name, disk in self.disks.items()
        }
        self.format = Format(self.journal, no_flush=no_flush, **children)
        group = ThrottleGroup("g", ThrottleLimits(bps_total=RateLimit(1 << 30)))
        self.root = ThrottleNode(self.format, group.join())
        self.backend = BlockBackend(self.root, Epochs(), nursery, write_cache=True)

    async def write(self, offset=0, data=b"d"):
        await self.backend.write(offset, data)
        self.journal.clear()


@pytest.fixture
def tree(nursery):
    return Tree(nursery)


@pytest.fixture
def gone():
    return OSError(errno.EIO, "gone")


async def test_all_steps_in_order(tree):
    await tree.write()
    await tree.backend.flush()
    assert tree.journal == [
        "metadata",  # 2: to the OS ...
        "write file",  # ... nothing of the file was written since its last flush: no sync before
        "own storage",  # 5
        "sync file",  # 6: the children that hold data, each by the same chain
        "sync data-file",
    ]
    assert tree.disks["file"].durable[SIZE - 512] == 1
    assert tree.disks["data-file"].durable[:1] == b"d"


async def test_a_second_flush_syncs_nothing(tree):
    await tree.write()
    await tree.backend.flush()
    tree.journal.clear()
    await tree.backend.flush()
    assert tree.journal == ["metadata", "own storage"]


async def test_the_filter_forwards_and_is_done(tree):
    tree.root.flush_to_os = tree.root.flush_to_disk = None  # are not called
    await tree.backend.flush()
    assert tree.journal == ["metadata", "own storage"]


async def test_without_flushes_the_metadata_is_handed_over_and_nothing_is_synced(nursery):
    tree = Tree(nursery, no_flush=True)
    await tree.write()
    await tree.backend.flush()
    assert tree.journal == ["metadata", "write file"]
    assert tree.disks["file"].written[SIZE - 512] == 1
    assert tree.disks["file"].durable == tree.disks["data-file"].durable == bytes(SIZE)


async def test_a_node_without_flushes_does_not_keep_those_below_it_from_theirs(tree):
    """no-flush belongs to a node; here the format has it and its files have not."""
    tree.format.no_flush = True
    await tree.write()
    await tree.backend.flush()
    assert tree.journal == ["metadata", "write file", "sync file", "sync data-file"]


async def test_a_backing_file_holds_no_data_of_ours(tree):
    tree.disks["backing"].generation.written += 1
    await tree.backend.flush()
    assert "sync backing" not in tree.journal


# --- a failure at each step ------------------------------------------------------------------


async def test_metadata_that_cannot_be_handed_over(tree, gone):
    await tree.write()
    tree.format.error = gone
    with pytest.raises(OSError, match="gone"):
        await tree.backend.flush()
    assert tree.journal == ["metadata"]  # an error stops the chain
    assert tree.disks["data-file"].durable == bytes(SIZE)
    tree.format.error = None
    await tree.backend.flush()  # nothing was lost: the next tries again
    assert tree.disks["data-file"].durable[:1] == b"d"
    assert tree.disks["file"].durable[SIZE - 512] == 1


async def test_an_ordering_sync_that_fails_keeps_the_metadata_from_the_file(tree, gone):
    await tree.write()
    tree.disks["file"].write_nowait(0, b"t")  # a table, say
    tree.disks["file"].error = gone
    with pytest.raises(FlushFailed, match="file: a flush failed: gone"):
        await tree.backend.flush()
    assert tree.journal == ["write file", "metadata", "sync file"]
    assert tree.disks["file"].written[SIZE - 512] == 0


@pytest.mark.parametrize("name", ["file", "data-file"])
async def test_a_leaf_whose_sync_fails(tree, gone, caplog, name):
    await tree.write()
    tree.disks[name].error = gone
    for _ in range(3):  # for good, though the disk is well again
        with pytest.raises(FlushFailed, match=f"^.*{name}: a flush failed: gone") as caught:
            await tree.backend.flush()
        assert caught.value.errno == errno.EIO
        tree.disks[name].error = None
        await tree.backend.write(0, b"n")  # writes go on
    with pytest.raises(FlushFailed):
        await tree.backend.write(0, b"n", fua=True)
    assert tree.disks[name].syncs == 1
    assert tree.disks[name].durable == bytes(SIZE)
    # The chain stops: file comes before data-file.
    assert bool(tree.disks["data-file"].syncs) is (name == "data-file")
    [record] = caplog.records
    assert record.getMessage().startswith(f"{name}: a flush failed (gone)")


async def test_fua_and_a_missing_write_cache_meet_the_same_error(tree, gone):
    tree.disks["data-file"].error = gone
    for attempt in (
        tree.backend.write(0, b"d", fua=True),
        tree.backend.set_write_cache(False),
        tree.backend.write(0, b"d"),
        tree.backend.flush(),
    ):
        with pytest.raises(FlushFailed, match="gone"):
            await attempt


# --- group commit ----------------------------------------------------------------------------


async def test_any_number_of_clients_cost_one_running_and_one_waiting_sync_of_each_leaf(
    tree, nursery
):
    """All have written to both; they come while the first sync of the file runs."""
    file, data = tree.disks["file"], tree.disks["data-file"]
    file.hold = data.hold = True
    done = []

    async def client(number):
        await tree.backend.write(number * 512, b"c")
        await tree.backend.flush()
        done.append(number)

    for number in range(50):
        nursery.start_soon(client, number)
        await trio.testing.wait_all_tasks_blocked()
    assert (file.syncs, data.syncs) == (1, 0)
    while len(done) < 50:
        for disk in (file, data):
            if disk._syncing:
                disk.end()
        await trio.testing.wait_all_tasks_blocked()
    assert file.syncs <= 3  # the order of the fake's own tables takes one more
    assert data.syncs <= 2
    assert bytes(data.durable[::512][:50]) == b"c" * 50
    await tree.backend.flush()
    assert data.syncs <= 2


# --- the ways without a task -----------------------------------------------------------------


async def test_filters_and_raw_nodes_ask_their_child(nursery):
    journal = []
    disk = Disk("disk", journal)
    group = ThrottleGroup("g", ThrottleLimits(bps_total=RateLimit(1 << 30)))
    raw = RawNode(disk)
    for root in (raw, RawNode(raw, offset=512), ThrottleNode(raw, group.join())):
        backend = BlockBackend(root, Epochs(), nursery, write_cache=True)
        assert backend.flush_nowait() is True
        disk.write_nowait(0, b"x")
        assert backend.flush_nowait() is False
        done = []
        journal.clear()
        assert backend.submit_flush(done.append) is True
        await trio.testing.wait_all_tasks_blocked()
        assert (done, journal) == ([None], ["sync disk"])
        assert backend.flush_nowait() is True


async def test_a_node_that_may_have_something_to_do_is_flushed_by_a_task(tree):
    assert tree.backend.flush_nowait() is False
    assert tree.backend.submit_flush(print) is False


async def test_a_leaf_without_flushes_has_nothing_to_do(nursery):
    disk = Disk("disk", [], no_flush=True)
    disk.write_nowait(0, b"x")
    assert BlockBackend(disk, Epochs(), nursery, write_cache=True).flush_nowait() is True

"""The metadata caches: one load for each table, nothing dirty dropped, bounded if that can be."""

import random
from array import array

import pytest
import trio

from nbdserve.formats.qcow2.cache import TABLE_OVERHEAD, TableCache
from nbdserve.formats.qcow2.tables import Table

TABLE_BYTES = 512 + TABLE_OVERHEAD


class Disk:
    """What a cache of up to `capacity` tables loads from and writes to."""

    def __init__(self, capacity):
        self.loads = []
        self.write_backs = 0
        self.fail = None
        self.gate = None
        self.cache = TableCache(capacity * TABLE_BYTES, self.load, self.write_back)

    async def load(self, index):
        self.loads.append(index)
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.fail is not None:
            raise self.fail
        return Table(array("Q", [index] * 64), index * 512)

    async def write_back(self):
        await trio.lowlevel.checkpoint()
        self.write_backs += 1
        if self.fail is not None:
            raise self.fail
        for table in list(self.cache.dirty()):
            table.snapshot()
            table.written()

    @property
    def held(self):
        return self.cache.statistics().tables


async def test_loaded_once():
    disk = Disk(4)
    assert disk.cache.peek(3) is None
    table = await disk.cache.get(3)
    assert table.entries[0] == 3
    assert await disk.cache.get(3) is table
    assert disk.cache.peek(3) is table
    assert disk.cache.hot[3] is table.entries
    assert disk.loads == [3]


async def test_tasks_that_want_one_table_share_the_load():
    disk = Disk(4)
    found = []

    async def want():
        found.append(await disk.cache.get(1))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(want)
    assert disk.loads == [1]
    assert len(found) == 5
    assert len(set(map(id, found))) == 1


async def test_a_load_that_fails_fails_only_whoever_ran_it():
    disk = Disk(4)
    disk.fail = OSError(5, "no")
    with pytest.raises(OSError, match="no"):
        await disk.cache.get(1)
    disk.fail = None
    assert (await disk.cache.get(1)).entries[0] == 1


async def test_a_waiter_takes_over_from_a_load_that_was_cancelled():
    disk = Disk(4)
    disk.gate = trio.Event()
    found = []

    async def want():
        found.append(await disk.cache.get(1))

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(disk.cache.get, 1)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(want)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        disk.gate.set()
    assert [table.entries[0] for table in found] == [1]
    assert disk.loads == [1, 1]


async def test_what_was_not_used_lately_is_dropped_first():
    disk = Disk(3)
    for index in range(4):
        await disk.cache.get(index)
    # The sweep at the next load drops something, and who is asked for again stays.
    disk.cache.hot.clear()
    disk.cache.peek(2)
    await disk.cache.get(9)
    assert disk.cache.peek(2) is not None
    assert disk.cache.peek(9) is not None
    assert disk.held == 3
    assert disk.cache.statistics().evictions == 2


@pytest.mark.parametrize("used", [True, False])
async def test_a_sweep_drops_an_eighth_of_the_cache_used_or_not(used):
    """Less would mean a look at all tables for each load, more that it is half empty."""
    disk = Disk(80)
    for index in range(81):
        await disk.cache.get(index)
    if not used:
        disk.cache.hot.clear()
    assert disk.cache.make_room()
    assert disk.held == 70
    assert not disk.cache.hot


async def test_tables_asked_for_at_random_fill_the_cache():
    disk = Disk(40)
    chooser = random.Random(1)
    for _ in range(4000):
        await disk.cache.get(chooser.randrange(80))
    assert len(disk.loads) < 2300  # 2000 if the cache were full all the time


async def test_dirty_tables_stay_and_count():
    disk = Disk(2)
    for index in range(3):
        (await disk.cache.get(index)).set(0, 77)
    assert not disk.cache.make_room()
    assert disk.held == 3
    assert {disk.cache.peek(index).entries[0] for index in range(3)} == {77}


async def test_a_table_on_its_way_to_the_disk_stays():
    disk = Disk(0)
    table = await disk.cache.get(1)
    table.set(0, 5)
    table.snapshot()
    assert not disk.cache.make_room()
    assert disk.cache.peek(1) is table
    table.written()
    assert disk.cache.make_room()
    assert disk.cache.peek(1) is None


async def test_a_load_into_a_cache_full_of_dirty_tables_waits_for_the_write_back():
    disk = Disk(2)
    for index in range(3):
        (await disk.cache.get(index)).set(0, 77)
    await disk.cache.get(9)
    assert disk.write_backs == 1
    assert disk.held <= 3


async def test_a_write_back_that_fails_drops_nothing():
    disk = Disk(2)
    for index in range(3):
        (await disk.cache.get(index)).set(0, 77)
    disk.fail = OSError(28, "full")
    with pytest.raises(OSError, match="full"):
        await disk.cache.get(9)
    assert disk.held == 3
    disk.fail = None
    assert (await disk.cache.get(9)).entries[0] == 9


async def test_a_table_that_is_replaced():
    disk = Disk(2)
    await disk.cache.get(1)
    disk.cache.remove(1)
    assert disk.cache.peek(1) is None
    assert 1 not in disk.cache.hot
    assert disk.cache.statistics().nb_bytes == 0
    disk.cache.add(1, Table(array("Q", [8] * 64), 512))
    assert disk.cache.peek(1).entries[0] == 8


async def test_what_is_dirty_is_known_without_looking_at_all_tables():
    disk = Disk(8)
    for index in range(4):
        await disk.cache.get(index)
    assert disk.cache.dirty() == []
    for index in (3, 1):
        disk.cache.peek(index).set(0, 7)
    assert [table.host_offset for table in disk.cache.dirty()] == [3 * 512, 512]
    disk.cache.add(9, Table(array("Q", [0] * 64), 9 * 512, fresh=True))
    assert len(disk.cache.dirty()) == 3
    removed = disk.cache.peek(3)
    disk.cache.remove(3)
    removed.set(1, 7)  # nobody's any more
    assert [table.host_offset for table in disk.cache.dirty()] == [512, 9 * 512]
    await disk.write_back()
    assert disk.cache.dirty() == []

"""Range locks: nobody overlaps, everybody gets a turn, whoever gives up is gone."""

import random

import pytest
import trio
import trio.testing

from nbdserve.block.rangelock import RangeLock


async def hold(lock, first, last, order, name, until=None):
    async with lock.hold(first, last):
        order.append(name)
        if until is not None:
            await until.wait()


async def test_ranges_that_do_not_overlap_are_held_together():
    lock = RangeLock()
    async with lock.hold(0, 3), lock.hold(4, 4), lock.hold(5, 9):
        assert lock.statistics() == 3
    assert lock.statistics() == 0


@pytest.mark.parametrize(("first", "last"), [(0, 4), (4, 4), (6, 6), (6, 9), (5, 5), (0, 9)])
async def test_a_range_that_overlaps_waits(autojump_clock, first, last):
    lock = RangeLock()
    async with lock.hold(4, 6):
        assert not lock.is_free(first, last)
        with trio.move_on_after(1) as scope:
            async with lock.hold(first, last):
                pytest.fail("two hold the same cluster")
        assert scope.cancelled_caught


@pytest.mark.parametrize(("first", "last"), [(0, 3), (7, 7), (7, 9)])
async def test_neighbours_are_free(first, last):
    lock = RangeLock()
    async with lock.hold(4, 6):
        assert lock.is_free(first, last)


async def test_the_first_to_come_is_the_first_to_hold():
    lock, order = RangeLock(), []
    release = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, lock, 5, 5, order, "holder", release)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(20):
            nursery.start_soon(hold, lock, 5, 5, order, number)
            await trio.testing.wait_all_tasks_blocked()
        release.set()
    assert order == ["holder", *range(20)]


async def test_a_wide_range_is_not_starved_by_narrow_ones(autojump_clock):
    """Two holders of its parts who never leave at the same time: it still gets its turn."""
    lock, order = RangeLock(), []

    async def writer(cluster):
        while "wide" not in order:
            async with lock.hold(cluster, cluster):
                await trio.sleep(1)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer, 1)
            await trio.sleep(0.5)
            nursery.start_soon(writer, 2)
            await trio.sleep(0.1)
            nursery.start_soon(hold, lock, 0, 9, order, "wide")


async def test_who_waits_counts_for_code_that_does_not_wait():
    lock = RangeLock()
    async with trio.open_nursery() as nursery, lock.hold(0, 0):
        nursery.start_soon(hold, lock, 0, 9, [], "wide")
        await trio.testing.wait_all_tasks_blocked()
        assert not lock.is_free(5, 5)


async def test_a_waiter_that_is_cancelled_is_gone(autojump_clock):
    lock, order = RangeLock(), []
    release = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, lock, 0, 0, order, "holder", release)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(1):
            async with lock.hold(0, 9):
                pytest.fail("it was held")
        assert lock.is_free(5, 5)
        assert lock.statistics() == 1
        release.set()


async def test_who_waits_behind_a_cancelled_one_still_waits_for_the_holder():
    lock, order = RangeLock(), []
    release = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, lock, 0, 0, order, "holder", release)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as cancelled:
            cancelled.start_soon(hold, lock, 0, 9, order, "cancelled")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(hold, lock, 0, 5, order, "behind")
            await trio.testing.wait_all_tasks_blocked()
            cancelled.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["holder"]
        release.set()
    assert order == ["holder", "behind"]


async def test_an_error_in_the_body_releases():
    lock = RangeLock()
    with pytest.raises(KeyError):
        async with lock.hold(0, 9):
            raise KeyError
    assert lock.is_free(0, 9)


async def test_a_crowd_never_overlaps_and_always_ends(autojump_clock):
    """Many tasks, random ranges, some cancelled: each cluster has one owner at a time."""
    lock = RangeLock()
    owner = {}
    chance = random.Random(20)
    held = 0

    async def task(first, last, patience, nap):
        nonlocal held
        with trio.move_on_after(patience):
            async with lock.hold(first, last):
                held += 1
                for cluster in range(first, last + 1):
                    assert cluster not in owner
                    owner[cluster] = trio.lowlevel.current_task()
                with trio.CancelScope(shield=True):
                    await trio.sleep(nap)
                for cluster in range(first, last + 1):
                    del owner[cluster]

    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                first = chance.randrange(40)
                last = first + chance.randrange(1 + chance.randrange(12))
                patience = chance.choice([0, 1, 5, 1000])
                nursery.start_soon(task, first, last, patience, chance.random())
                await trio.sleep(chance.random() / 10)
    assert held > 100
    assert lock.statistics() == 0

"""Flush generations: how many flushes run, for whom, and what a failure means."""

import errno

import pytest
import trio
import trio.testing

from nbdserve.block.flush import FlushGeneration


class Disk:
    """Something to flush: counts, and lets a test hold each flush."""

    def __init__(self):
        self.started = 0
        self.running = 0
        self.gate = None
        self.error = None

    async def flush(self):
        self.started += 1
        self.running += 1
        assert self.running == 1, "two flushes at a time"
        try:
            if self.gate is not None:
                await self.gate.wait()
            await trio.lowlevel.checkpoint()
            if self.error is not None:
                raise self.error
        finally:
            self.running -= 1


@pytest.fixture
def disk():
    return Disk()


async def test_with_nothing_written_it_costs_nothing(disk):
    generation = FlushGeneration()
    await generation.flush(disk.flush)
    assert disk.started == 0
    assert generation.statistics() == (1, 1, 0, 0, 0)


async def test_what_was_flushed_is_not_flushed_again(disk):
    generation = FlushGeneration()
    generation.written += 1
    await generation.flush(disk.flush)
    await generation.flush(disk.flush)
    assert disk.started == 1
    assert generation.statistics() == (2, 1, 0, 1, 0)


async def test_many_at_once_cost_one(disk):
    generation = FlushGeneration()
    generation.written += 1
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(generation.flush, disk.flush)
    assert disk.started == 1
    assert generation.statistics() == (50, 0, 49, 1, 0)


async def test_at_most_one_runs_and_one_waits(disk):
    """Fifty who come during a flush, each after a write of his own, share the next one."""
    generation = FlushGeneration()
    generation.written += 1
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(generation.flush, disk.flush)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(50):
            generation.written += 1
            nursery.start_soon(generation.flush, disk.flush)
            await trio.testing.wait_all_tasks_blocked()
        assert disk.started == 1
        disk.gate.set()
    assert disk.started == 2
    assert generation.flushed == generation.written == 51


async def test_a_write_during_a_flush_is_not_covered_by_it(disk):
    generation = FlushGeneration()
    generation.written += 1
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(generation.flush, disk.flush)
        await trio.testing.wait_all_tasks_blocked()
        generation.written += 1
        disk.gate.set()
    await generation.flush(disk.flush)
    assert disk.started == 2


async def test_a_flush_whose_writes_are_covered_by_the_running_one_starts_no_other(disk):
    generation = FlushGeneration()
    generation.written += 1
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(generation.flush, disk.flush)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(generation.flush, disk.flush)
        await trio.testing.wait_all_tasks_blocked()
        generation.written += 1  # by somebody who does not flush
        disk.gate.set()
    assert disk.started == 1


async def test_a_failure_is_for_good(disk):
    generation = FlushGeneration()
    generation.written += 1
    disk.error = OSError(errno.EIO, "the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        await generation.flush(disk.flush)
    disk.error = None
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone") as caught:
            await generation.flush(disk.flush)
        assert caught.value.errno == errno.EIO
    generation.written += 1
    with pytest.raises(OSError, match="the disk is gone"):
        await generation.flush(disk.flush)
    assert disk.started == 1
    assert generation.statistics() == (4, 0, 0, 0, 4)


async def test_a_failure_reaches_all_who_wait(disk):
    generation = FlushGeneration()
    generation.written += 1
    disk.error = OSError(errno.ENOSPC, "full")
    disk.gate = trio.Event()
    failed = []

    async def flush():
        try:
            await generation.flush(disk.flush)
        except OSError as error:
            failed.append(error.errno)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(flush)
        await trio.testing.wait_all_tasks_blocked()
        disk.gate.set()
    assert failed == [errno.ENOSPC] * 10
    assert disk.started == 1


async def test_if_the_one_who_flushes_is_cancelled_another_goes_on(disk):
    generation = FlushGeneration()
    generation.written += 1
    disk.gate = trio.Event()
    done = []

    async def flush(name):
        await generation.flush(disk.flush)
        done.append(name)

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as doomed:
            doomed.start_soon(flush, "cancelled")
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(flush, "waiting")
            await trio.testing.wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert disk.started == 2  # the waiting one's own
        assert done == []
        disk.gate.set()
    assert done == ["waiting"]
    assert generation.statistics() == (2, 0, 0, 1, 0)


async def test_a_waiter_that_is_cancelled_disturbs_nobody(disk):
    generation = FlushGeneration()
    generation.written += 1
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(generation.flush, disk.flush)
        await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            scope.cancel()
            await generation.flush(disk.flush)
        assert scope.cancelled_caught
        disk.gate.set()
    assert disk.started == 1
    assert generation.flushed == 1

"""Flush generations: how many syncs run, for whom, and what a failure means."""

import errno

import pytest
import trio
import trio.testing

from nbdserve.block.flush import FlushFailed, FlushGeneration


class Disk:
    """Something to sync: counts, and lets a test end each sync (`hold`, then `end`)."""

    def __init__(self):
        self.started = 0
        self.error = None
        self._held = None
        self._done = None

    def sync(self, done):
        assert self._done is None, "two syncs at a time"
        self.started += 1
        self._done = done
        if self._held is None:
            trio.lowlevel.current_trio_token().run_sync_soon(self.end)

    def hold(self):
        self._held = True

    def end(self):
        done, self._done = self._done, None
        done(self.error)


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def generation(disk):
    return FlushGeneration("disk.img", disk.sync)


async def test_with_nothing_written_it_costs_nothing(disk, generation):
    await generation.flush()
    assert generation.flush_nowait() is True
    assert disk.started == 0
    assert generation.statistics() == (2, 2, 0, 0, 0)


async def test_what_was_flushed_is_not_flushed_again(disk, generation):
    generation.written += 1
    assert generation.flush_nowait() is False
    await generation.flush()
    await generation.flush()
    assert generation.flush_nowait() is True
    assert disk.started == 1
    assert generation.statistics() == (3, 2, 0, 1, 0)


@pytest.mark.parametrize("way", ["tasks", "callbacks"])
async def test_many_at_once_cost_one(disk, generation, nursery, way):
    generation.written += 1
    disk.hold()
    done = []
    for _ in range(50):
        if way == "tasks":
            nursery.start_soon(flush_into, generation, done)
        else:
            generation.submit(done.append)
    await trio.testing.wait_all_tasks_blocked()
    assert done == []
    disk.end()
    await trio.testing.wait_all_tasks_blocked()
    assert done == [None] * 50
    assert disk.started == 1
    assert generation.statistics() == (50, 0, 49, 1, 0)


async def flush_into(generation, done):
    try:
        await generation.flush()
    except OSError as error:
        done.append(error)
    else:
        done.append(None)


async def test_at_most_one_runs_and_one_waits(disk, generation):
    """Fifty who come during a sync, each after a write of his own, share the next one."""
    disk.hold()
    generation.written += 1
    done = []
    generation.submit(lambda error: done.append("first"))
    for number in range(50):
        generation.written += 1
        generation.submit(lambda error, number=number: done.append(number))
    assert disk.started == 1
    disk.end()
    assert (done, disk.started) == (["first"], 2)
    disk.end()
    assert done == ["first", *range(50)]
    assert disk.started == 2
    assert generation.flushed == generation.written == 51
    assert generation.statistics() == (51, 0, 49, 2, 0)


async def test_a_write_during_a_sync_is_not_covered_by_it(disk, generation):
    disk.hold()
    generation.written += 1
    done = []
    generation.submit(done.append)
    generation.written += 1
    disk.end()
    assert done == [None]
    assert generation.flush_nowait() is False
    generation.submit(done.append)
    assert disk.started == 2


async def test_a_flush_whose_writes_are_covered_by_the_running_sync_starts_no_other(
    disk, generation
):
    disk.hold()
    generation.written += 1
    done = []
    generation.submit(done.append)
    generation.submit(done.append)
    generation.written += 1  # by somebody who does not flush
    disk.end()
    assert done == [None, None]
    assert disk.started == 1


async def test_who_is_told_may_flush_again(disk, generation):
    """A client whose flush was answered has its next write and flush here at once."""
    disk.hold()
    generation.written += 1
    done = []

    def again(error):
        done.append(error)
        generation.written += 1
        generation.submit(done.append)

    generation.submit(again)
    disk.end()
    assert (len(done), disk.started) == (1, 2)
    disk.end()
    assert done == [None, None]


async def test_a_failure_is_for_good_and_the_log_says_so_once(disk, generation, caplog):
    generation.written += 1
    disk.error = OSError(errno.EIO, "the disk is gone")
    with pytest.raises(FlushFailed, match=r"disk\.img: a flush failed: the disk is gone"):
        await generation.flush()
    disk.error = None
    for attempt in (generation.flush_nowait, generation.check, lambda: generation.submit(print)):
        with pytest.raises(FlushFailed, match="the disk is gone") as caught:
            attempt()
        assert caught.value.errno == errno.EIO
    generation.written += 1
    with pytest.raises(FlushFailed, match="the disk is gone"):
        await generation.flush()
    assert disk.started == 1
    assert generation.statistics().failed
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "disk.img: a flush failed (the disk is gone)" in record.getMessage()


async def test_a_failure_reaches_all_who_wait(disk, generation, caplog):
    disk.hold()
    disk.error = OSError(errno.ENOSPC, "full")
    generation.written += 1
    failed = []
    for _ in range(10):
        generation.written += 1  # those after the first wait for the next sync
        generation.submit(failed.append)
    disk.end()
    assert [error.errno for error in failed] == [errno.ENOSPC] * 10
    assert len(set(map(id, failed))) == 10  # raised in ten tasks, each needs its own
    assert disk.started == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("cancelled", ["the first", "the second"])
async def test_a_sync_goes_on_whoever_is_cancelled(disk, generation, nursery, cancelled):
    disk.hold()
    generation.written += 1
    done = []
    scopes = [trio.CancelScope(), trio.CancelScope()]

    async def flush(scope):
        with scope:
            await flush_into(generation, done)

    for scope in scopes:
        nursery.start_soon(flush, scope)
        await trio.testing.wait_all_tasks_blocked()
    scopes[cancelled == "the second"].cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert done == []
    disk.end()
    await trio.testing.wait_all_tasks_blocked()
    assert done == [None]
    assert disk.started == 1
    assert generation.flush_nowait() is True

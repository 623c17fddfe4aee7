"""The threads engine: batches, completions, errors, cancellation, the end."""

import errno
import threading
import time

import pytest
import trio
import trio.testing

from nbdserve.engines import threads
from nbdserve.engines.threads import ThreadsEngine

LONG = 20.0  # seconds; far above what anything here takes


@pytest.fixture
async def engine():
    engine = ThreadsEngine(max_threads=4)
    yield engine
    with trio.fail_after(LONG):
        await engine.idle()
    engine.close()


class Latch:
    """A job that waits until the test lets it go; threads are real, so time is too."""

    def __init__(self):
        self.started = threading.Semaphore(0)
        self._go = threading.Event()
        self.running = 0
        self.most = 0
        self._lock = threading.Lock()

    def __call__(self, result=None):
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.started.release()
        assert self._go.wait(LONG)
        with self._lock:
            self.running -= 1
        return result

    async def wait_started(self, count=1):
        for _ in range(count):
            assert await trio.to_thread.run_sync(self.started.acquire, True, LONG)

    def go(self):
        self._go.set()


async def test_a_job_runs_in_a_thread_and_its_result_comes_back(engine):
    here = threading.current_thread()
    assert await engine.run(threading.current_thread) is not here
    assert await engine.run(divmod, 17, 5) == (3, 2)


async def test_an_error_is_raised_where_the_job_was_asked_for(engine):
    def fail():
        raise OSError(errno.EIO, "bad sector")

    with pytest.raises(OSError, match="bad sector") as caught:
        await engine.run(fail)
    assert caught.value.errno == errno.EIO
    assert await engine.run(int) == 0  # and the thread lives


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), trio.ClosedResourceError()])
async def test_no_error_ends_a_thread(engine, error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        await engine.run(fail)
    assert await engine.run(int) == 0
    assert engine.statistics().in_flight == 0


async def test_a_completion_is_called_in_the_trio_thread_with_result_or_error(engine):
    here, calls, both = threading.current_thread(), [], trio.Event()

    def done(result, error):
        calls.append((result, error, threading.current_thread()))
        if len(calls) == 2:
            both.set()

    failure = OSError(errno.EIO, "x")

    def fail():
        raise failure

    engine.submit(done, divmod, 17, 5)
    engine.submit(done, fail)
    with trio.fail_after(LONG):
        await both.wait()
    assert sorted(calls, key=str) == sorted(
        [((3, 2), None, here), (None, failure, here)], key=str
    )


async def test_what_is_submitted_in_a_plug_is_handed_over_at_its_end_at_once(engine):
    latch, done = Latch(), []
    latch.go()
    with engine.plug():
        for number in range(40):
            engine.submit(lambda result, error: done.append(result), latch, number)
        assert engine.statistics()[:2] == (40, 0)
        assert not latch.started.acquire(timeout=0.01)
    assert engine.statistics().batches == 1
    with trio.fail_after(LONG):
        await engine.idle()
    assert sorted(done) == list(range(40))


async def test_a_plug_hands_over_even_if_its_body_fails(engine):
    done = []

    def body():
        with engine.plug():
            engine.submit(lambda result, error: done.append(result), int)
            raise KeyError

    with pytest.raises(KeyError):
        body()
    with trio.fail_after(LONG):
        await engine.idle()
    assert done == [0]


async def test_an_empty_plug_is_nothing(engine):
    with engine.plug():
        pass
    assert engine.statistics().batches == 0


async def test_a_batch_is_spread_over_the_threads(engine):
    """Eight jobs in one hand-over, four threads: four run at a time, never more."""
    latch = Latch()
    with engine.plug():
        for _ in range(8):
            engine.submit(lambda result, error: None, latch)
    await latch.wait_started(4)
    assert latch.running == 4
    latch.go()
    with trio.fail_after(LONG):
        await engine.idle()
    assert latch.most == 4
    assert engine.statistics().threads == 4


async def test_the_jobs_of_a_batch_go_to_as_many_threads_as_there_are(engine):
    """Five jobs for four threads: two behind each other, not three threads with up to two."""
    latch = Latch()
    with engine.plug():
        for _ in range(5):
            engine.submit(lambda result, error: None, latch)
    await latch.wait_started(4)
    latch.go()
    with trio.fail_after(LONG):
        await engine.idle()


async def test_no_more_threads_are_started_than_there_is_work_for(engine):
    for _ in range(20):
        await engine.run(int)
    assert engine.statistics().threads == 1


async def test_many_jobs_from_many_tasks_all_come_back(engine):
    results = []

    async def task(number):
        results.append(await engine.run(pow, number, 2))

    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            for number in range(2000):
                nursery.start_soon(task, number)
    assert sorted(results) == [number**2 for number in range(2000)]
    assert engine.statistics() == (2000, 2000, 4, 0)


async def test_completions_of_a_batch_are_drained_together(engine, monkeypatch):
    """A hundred jobs do not wake the trio thread a hundred times."""
    drains = 0
    drain = engine._drain

    def counting():
        nonlocal drains
        drains += 1
        drain()

    monkeypatch.setattr(engine, "_drain", counting)
    with engine.plug():
        for _ in range(100):
            engine.submit(lambda result, error: None, int)
    with trio.fail_after(LONG):
        await engine.idle()
    assert 1 <= drains <= 4  # one for each thread's share


async def test_a_cancelled_task_gets_its_buffer_back_only_when_the_kernel_is_done(engine):
    latch, order = Latch(), []

    async def task():
        order.append(await engine.run(latch, "finished"))
        await trio.lowlevel.checkpoint()
        order.append("not cancelled")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        await latch.wait_started()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.sleep(0.02)
            assert order == []
            latch.go()
    assert order == ["finished"]


async def test_a_task_that_is_cancelled_already_hands_nothing_over(engine):
    with trio.CancelScope() as scope:
        scope.cancel()
        await engine.run(int)
    assert scope.cancelled_caught
    assert engine.statistics().jobs == 0


async def test_idle_waits_for_jobs_that_no_task_waits_for(engine):
    latch, done = Latch(), []
    engine.submit(lambda result, error: done.append(result), latch, "read")
    await latch.wait_started()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.idle)
        await trio.sleep(0.02)
        assert nursery.child_tasks
        latch.go()
    assert done == ["read"]


async def test_idle_when_nothing_was_ever_done(engine):
    await engine.idle()


async def test_close_ends_all_threads():
    before = threading.active_count()
    engine = ThreadsEngine(max_threads=4)
    latch = Latch()
    with engine.plug():
        for _ in range(4):
            engine.submit(lambda result, error: None, latch)
    await latch.wait_started(4)
    assert threading.active_count() >= before + 4
    latch.go()
    await engine.idle()
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < LONG / 2
    assert not any(thread.name == "nbdserve-io" for thread in threading.enumerate())


class NoThread(threading.Thread):
    def start(self):
        raise RuntimeError("can't start new thread")


async def test_without_any_thread_there_is_no_engine(monkeypatch):
    monkeypatch.setattr(threads.threading, "Thread", NoThread)
    with pytest.raises(OSError, match="cannot start a thread") as caught:
        ThreadsEngine()
    assert caught.value.errno == errno.EAGAIN


async def test_one_thread_does_all_the_work_if_there_are_no_more(engine, monkeypatch):
    monkeypatch.setattr(threads.threading, "Thread", NoThread)
    done = []
    with engine.plug():
        for number in range(20):
            engine.submit(lambda result, error: done.append(result), int, number)
    with trio.fail_after(LONG):
        await engine.idle()
    assert sorted(done) == list(range(20))
    assert engine.statistics().threads == 1


def test_a_job_that_outlives_the_trio_run_does_no_harm():
    latch = Latch()
    engine = None

    async def main():
        nonlocal engine
        engine = ThreadsEngine()
        engine.submit(lambda result, error: pytest.fail("completed"), latch)
        await latch.wait_started()

    trio.run(main)
    latch.go()
    engine.close()
    assert not any(thread.name == "nbdserve-io" for thread in threading.enumerate())

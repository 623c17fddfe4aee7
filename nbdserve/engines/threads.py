"""The `threads` engine: a pool of threads that take system calls which may block.

Facts: one hop to a thread and back through trio costs tens of microseconds, mostly wake-ups; a
`preadv` from the page cache costs one. So page-cache hits never come here (drivers/file.py reads
them inline with RWF_NOWAIT), and what does come is handed over in batches: inside `plug()` jobs
are collected and spread over the threads at its end, and completions are drained together by one
callback in the trio thread (`run_sync_soon(..., idempotent=True)`). Measured, fio's random 4 KiB
reads of a cold file, fio and server on 2 cores, with and without plugs: 32 deep 27,400 and 16,700
a second at 39 and 69 us of CPU each, 128 deep 35,300 and 20,400 at 28 and 48 us.

A job is a plain function with arguments. Its completion is a plain callback that runs in the trio
thread and may not raise. Kernel I/O cannot be called back: `run` does not let go of a job when its
task is cancelled, it waits for it, because the buffer is not ours to reuse before.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import outcome
import trio

from nbdserve.engines.engine import EngineStatistics
from nbdserve.engines.transfer import read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from nbdserve.engines.engine import Buffer, Done

__all__ = ["EngineStatistics", "ThreadsEngine"]

T = TypeVar("T")

# As many requests as a disk usefully takes at once; QEMU's pool goes to 64, but there each thread
# costs no interpreter lock.
MAX_THREADS = 16

Job = tuple[Any, tuple[Any, ...], Any]  # function, arguments, done(result, error)


class _Plug:
    """What `plug` returns: one for all times, as a batch of requests should not pay for it."""

    def __init__(self, engine: ThreadsEngine) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        self._engine._plugged = []

    def __exit__(self, *_error: object) -> None:
        jobs, self._engine._plugged = self._engine._plugged, None
        if jobs:
            self._engine._hand_over(jobs)


class ThreadsEngine:
    """Runs jobs in threads for the trio run in which it was started."""

    name = "threads"
    eventfd = None

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self._max_threads = max_threads
        self._queue: SimpleQueue[list[Job] | None] = SimpleQueue()
        self._completed: deque[tuple[Any, Any, BaseException | None]] = deque()
        self._threads: list[threading.Thread] = []
        self._token = trio.lowlevel.current_trio_token()
        self._plugged: list[Job] | None = None
        self._plug = _Plug(self)
        self._all_done = trio.lowlevel.ParkingLot()
        self._jobs = 0
        self._batches = 0
        self._in_flight = 0
        # One thread suffices to get everything done: after this, running short of threads later
        # costs speed but fails no request.
        if not self._start_thread():
            raise OSError(errno.EAGAIN, "cannot start a thread")

    def plug(self) -> AbstractContextManager[None]:
        """Hand over all jobs submitted in the body together. The body does not await, and plugs do
        not nest."""
        return self._plug

    def submit(
        self,
        done: Callable[[Any, BaseException | None], None],
        function: Callable[..., object],
        *args: object,
    ) -> None:
        """Run `function(*args)` in a thread, then `done(result, error)` in the trio thread."""
        self._jobs += 1
        self._in_flight += 1
        job: Job = (function, args, done)
        if self._plugged is not None:
            self._plugged.append(job)
        else:
            self._hand_over([job])

    def submit_read(self, fd: int, buffer: memoryview, offset: int, done: Done) -> None:
        """See engines/engine.py, and for what follows too."""
        self.submit(_completed(done), read_all, fd, buffer, offset)

    def submit_write(
        self, fd: int, data: Sequence[Buffer], offset: int, done: Done, *, dsync: bool = False
    ) -> None:
        flags = os.RWF_DSYNC if dsync else 0
        self.submit(_completed(done), write_all, fd, data, offset, flags)

    def submit_fsync(self, fd: int, done: Done) -> None:
        self.submit(_completed(done), os.fdatasync, fd)

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Run `function(*args)` in a thread and return its result or raise its error.

        Cancellation is only seen before the job is handed over.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        task = trio.lowlevel.current_task()

        def done(result: T, error: BaseException | None) -> None:
            trio.lowlevel.reschedule(
                task, outcome.Value(result) if error is None else outcome.Error(error)
            )

        self.submit(done, function, *args)
        result: T = await trio.lowlevel.wait_task_rescheduled(
            lambda _raise_cancel: trio.lowlevel.Abort.FAILED
        )
        return result

    def _hand_over(self, jobs: list[Job]) -> None:
        self._batches += 1
        for first in range(min(len(jobs), self._max_threads)):
            self._queue.put(jobs[first :: self._max_threads])
        wanted = min(self._in_flight, self._max_threads)
        while len(self._threads) < wanted and self._start_thread():
            pass

    def _start_thread(self) -> bool:
        thread = threading.Thread(target=self._work, name="nbdserve-io", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system's limit of threads or processes is reached
            return False
        self._threads.append(thread)
        return True

    def _work(self) -> None:
        while (jobs := self._queue.get()) is not None:
            for function, args, done in jobs:
                try:
                    self._completed.append((done, function(*args), None))
                except BaseException as error:  # handed to the waiter, whatever it is
                    self._completed.append((done, None, error))
            try:
                self._token.run_sync_soon(self._drain, idempotent=True)
            except trio.RunFinishedError:
                return

    def _drain(self) -> None:
        self.reap()

    def reap(self) -> bool:
        completed = self._completed
        if not completed:
            return False
        while completed:
            done, result, error = completed.popleft()
            self._in_flight -= 1
            done(result, error)
        if not self._in_flight:
            self._all_done.unpark_all()
        return True

    def attach(self) -> None:
        """Completions wake the trio thread in any case; a poller that reaps is only sooner."""

    def detach(self) -> None:
        """See `attach`."""

    async def idle(self) -> None:
        """Wait until every job has completed, those too that no task waits for.

        Before this a descriptor that jobs use must not be closed: its number may be another
        file's by the time the job runs.
        """
        while self._in_flight:
            await self._all_done.park()

    def close(self) -> None:
        """End the threads; nothing may be in flight (see `idle`)."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def statistics(self) -> EngineStatistics:
        """Counters since the engine was started."""
        return EngineStatistics(self._jobs, self._batches, len(self._threads), self._in_flight)


def _completed(done: Done) -> Callable[[object, BaseException | None], None]:
    """The completion of a transfer as that of a job. What is no OSError is a bug of ours; whoever
    waits gets an answer all the same."""

    def completed(_result: object, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, OSError):
            error = OSError(errno.EIO, f"internal error: {error!r}")
        done(error)

    return completed

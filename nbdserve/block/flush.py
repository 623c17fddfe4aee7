"""Steps 4 and 5 of the flush chain: generations, and one sync at a time.

Every completed write raises `written`. A flush that finds `flushed == written` has nothing to do.
A write that was durable when it completed (FUA) does not raise it: it leaves nothing to sync, and
what others wrote before is still to be synced.

One sync runs at a time; who comes meanwhile waits, and the next one covers all who wait: any number
of clients flushing at once costs at most one running and one waiting sync (after QEMU's
bdrv_co_flush). A sync belongs to nobody: who waits for it may be cancelled, and it goes on.

After one failed fdatasync the kernel may have dropped the dirty pages and called them clean, so a
later success would prove nothing. The error is therefore kept: every later flush raises it again
(QEMU: handle_aiocb_flush, "page_cache_inconsistent"). So does every later write with FUA: a client
commits by it, and what it commits may be among what was lost. The log says so once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    Done = Callable[[OSError | None], None]

__all__ = ["FlushFailed", "FlushGeneration", "FlushStatistics"]

log = logging.getLogger("nbdserve.block")


class FlushFailed(OSError):
    """A flush failed, now or some time ago; the log has said so."""


class FlushStatistics(NamedTuple):
    """requested: calls. What became of them: clean: nothing was written since the last flush;
    done: syncs that were run for them and succeeded; merged: covered by the sync of another;
    failed: their sync failed, or they came after one that had. The rest still waits."""

    requested: int
    clean: int
    merged: int
    done: int
    failed: int


class FlushGeneration:
    """The write and flush generations of one leaf, whose `sync` makes it durable: it calls back
    later, never from inside."""

    __slots__ = ("_clean", "_done", "_error", "_failed", "_filename", "_merged", "_requested",
                 "_running", "_sync", "_syncing", "_waiting", "flushed", "written")  # fmt: skip

    def __init__(self, filename: str, sync: Callable[[Done], None]) -> None:
        self.written = 0
        self.flushed = 0
        self._filename = filename
        self._sync = sync
        self._waiting: list[tuple[int, Done]] = []  # (what must be covered, whom to tell)
        self._running = False
        self._syncing = 0  # what the running sync covers
        self._error: OSError | None = None
        self._requested = 0
        self._clean = 0
        self._merged = 0
        self._done = 0
        self._failed = 0

    def check(self) -> None:
        """Raises FlushFailed if any flush has ever failed."""
        if self._error is not None:
            raise self._failure()

    def _check_flush(self) -> None:
        if self._error is not None:
            self._requested += 1
            self._failed += 1
            raise self._failure()

    def _failure(self) -> FlushFailed:
        assert self._error is not None
        reason = f"{self._filename}: a flush failed: {self._error.strerror}"
        return FlushFailed(self._error.errno, reason)

    def flush_nowait(self) -> bool:
        """Whether all completed writes are durable already. Raises FlushFailed."""
        self._check_flush()
        if self.flushed < self.written:
            return False
        self._requested += 1
        self._clean += 1
        return True

    def submit(self, done: Done) -> None:
        """Call `done` once all writes completed before now are durable, or with FlushFailed.

        Raises FlushFailed if that is known already.
        """
        self._check_flush()
        self._requested += 1
        self._waiting.append((self.written, done))
        if not self._running:
            self._start()

    async def flush(self) -> None:
        """Return once all writes completed before now are durable. Raises FlushFailed."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.flush_nowait():
            return
        ended = trio.Event()
        errors: list[OSError | None] = []

        def done(error: OSError | None) -> None:
            errors.append(error)
            ended.set()

        self.submit(done)
        await ended.wait()
        if errors[0] is not None:
            raise errors[0]

    def _start(self) -> None:
        self._running = True
        self._syncing = self.written
        self._sync(self._synced)

    def _synced(self, error: OSError | None) -> None:
        self._running = False
        waiting, self._waiting = self._waiting, []
        if error is not None:
            self._fail(error)
            self._failed += len(waiting)
            for _, done in waiting:
                done(self._failure())
            return
        self.flushed = self._syncing
        self._done += 1
        covered = [done for target, done in waiting if target <= self.flushed]
        self._waiting = [(target, done) for target, done in waiting if target > self.flushed]
        self._merged += len(covered) - 1
        if self._waiting:
            self._start()
        for done in covered:
            done(None)

    def _fail(self, error: OSError) -> None:
        self._error = error
        log.warning(
            "%s: a flush failed (%s): what was written since the last one may be lost; all later"
            " flushes of this file fail",
            self._filename,
            error.strerror,
        )

    def statistics(self) -> FlushStatistics:
        """Counters since the leaf was opened."""
        return FlushStatistics(
            self._requested, self._clean, self._merged, self._done, self._failed
        )

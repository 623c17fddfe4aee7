"""Step 4 and 5 of the flush chain: generations, and one flush at a time.

Every completed write raises `written`. A flush that finds `flushed == written` has nothing to do.
One flush runs at a time; who comes meanwhile waits, and when the running one ends the first of
them usually covers all the others: any number of clients flushing at once costs at most one
running and one waiting flush (after QEMU's bdrv_co_flush).

After one failed fdatasync the kernel may have dropped the dirty pages and called them clean, so a
later success would prove nothing. The error is therefore kept: every later flush raises it again
(QEMU: handle_aiocb_flush, "page_cache_inconsistent").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["FlushGeneration", "FlushStatistics"]


class FlushStatistics(NamedTuple):
    """requested: calls. What became of them: clean: nothing was written since the last flush;
    merged: another's flush covered it; done: it ran a flush itself, which succeeded; failed: it ran
    one that failed, or came after one that had. The rest still waits, or was cancelled."""

    requested: int
    clean: int
    merged: int
    done: int
    failed: int


class FlushGeneration:
    """The write and flush generations of one leaf."""

    __slots__ = ("_clean", "_done", "_error", "_failed", "_merged", "_requested", "_running",
                 "flushed", "written")  # fmt: skip

    def __init__(self) -> None:
        self.written = 0
        self.flushed = 0
        self._running: trio.Event | None = None
        self._error: OSError | None = None
        self._requested = 0
        self._clean = 0
        self._merged = 0
        self._done = 0
        self._failed = 0

    async def flush(self, flush_to_disk: Callable[[], Awaitable[None]]) -> None:
        """Return once all writes completed before the call are durable.

        Raises the OSError of the first flush that ever failed.
        """
        self._requested += 1
        target = self.written
        ran = waited = False
        while self.flushed < target or self._error is not None:
            if self._error is not None:
                self._failed += 1
                raise OSError(self._error.errno, self._error.strerror)
            if self._running is not None:
                waited = True
                await self._running.wait()
                continue
            ran = True
            await self._flush_now(flush_to_disk)
        self._done += ran
        self._merged += waited and not ran
        self._clean += not waited and not ran

    async def _flush_now(self, flush_to_disk: Callable[[], Awaitable[None]]) -> None:
        generation = self.written
        self._running = event = trio.Event()
        try:
            await flush_to_disk()
            self.flushed = generation
        except OSError as error:
            self._error = error
        finally:
            self._running = None
            event.set()

    def statistics(self) -> FlushStatistics:
        """Counters since the leaf was opened."""
        return FlushStatistics(
            self._requested, self._clean, self._merged, self._done, self._failed
        )

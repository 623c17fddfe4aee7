"""One trio run around any number of inputs, stepped from synchronous code.

A fuzz target is a plain function, called by a fuzzer that knows no trio; a `trio.run` for each
input would cost more than most inputs do. So one run stays alive as a guest (trio's guest mode),
and `Loop.run` ticks it until what it was given has returned.

Law: it never sleeps. There is always a task that can go on, so what waits for something that can
never come is found out by counting ticks and not by a clock. And every run of an input is the same
as the last: the tasks of a tick take their turns in an order that trio draws, as for hypothesis,
from a generator that begins anew with each input.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypeVar

import trio
from trio._core import _run as scheduler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Hang", "Loop", "close", "run"]

T = TypeVar("T")

MAX_TICKS = 20_000
"""Rounds of the scheduler. The longest input of the kept corpus takes a few hundred."""


class Hang(AssertionError):
    """What an input started does not end."""


class Loop:
    """A trio run that stands still but for `run`; while it exists the thread can have no other."""

    def __init__(self) -> None:
        self._due: deque[Callable[[], object]] = deque()
        self._job: Callable[[], Awaitable[object]] | None = None
        self._result: object = None
        self._error: BaseException | None = None
        self._ended = True
        self._closing = self._closed = False
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
        trio.lowlevel.start_guest_run(
            self._serve,
            run_sync_soon_threadsafe=self._due.append,
            done_callback=self._done,
            host_uses_signal_set_wakeup_fd=True,
        )

    def run(self, job: Callable[[], Awaitable[T]], max_ticks: int = MAX_TICKS) -> T:
        """What the job returns, or raises. Raises Hang if it takes more than `max_ticks`."""
        self._job, self._ended = job, False
        self._scope = trio.CancelScope()
        scheduler._r.seed(0)
        ticks = 0
        while not self._ended:
            ticks += 1
            if ticks == max_ticks:
                self._scope.cancel()
            assert ticks < 2 * max_ticks, "it cannot even be cancelled"
            self._due.popleft()()
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self._scope.cancelled_caught:
            raise Hang(f"not done after {max_ticks} rounds of the scheduler")
        result: T = self._result  # type: ignore[assignment]
        return result

    def close(self) -> None:
        """End the run."""
        self._closing = True
        while not self._closed:
            self._due.popleft()()

    def _done(self, _outcome: object) -> None:
        self._closed = True

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tick_for_ever)
            while not self._closing:
                if self._job is not None:
                    job, self._job = self._job, None
                    await self._attempt(job)
                    self._ended = True
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    async def _attempt(self, job: Callable[[], Awaitable[object]]) -> None:
        try:
            with self._scope:
                self._result = await job()
        except BaseException as error:
            self._error = _single(error)


async def _tick_for_ever() -> None:
    while True:
        await trio.lowlevel.checkpoint()


def _single(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


_loop: Loop | None = None


def run(job: Callable[[], Awaitable[T]]) -> T:
    """`Loop.run` of a loop that all targets share; it is made when first wanted."""
    global _loop
    if _loop is None:
        _loop = Loop()
    return _loop.run(job)


def close() -> None:
    """End the shared loop, so that the thread can have another trio run."""
    global _loop
    if _loop is not None:
        _loop.close()
        _loop = None

"""One readiness loop for all connections in transmission: a batch at a time, no task per batch.

Facts, measured with fio on two cores: a task that waits in `trio.lowlevel.wait_readable` costs 30
to 40 us from data to code (epoll_ctl to arm, the wake-up, the scheduler), as much as ten requests.
So the sockets are in an epoll of our own, level-triggered and armed once. One task asks it without
waiting, calls the connections that have something to do, and asks again; all of trio's cost is
paid only when nothing was ready for `SPIN` and the task sleeps until the epoll itself is readable.
A client with one request in flight gets its next answer while we still spin.

A handler that did something is called again without asking the epoll (`EAGERLY` times): a busy
client has sent more by then, and a receive that finds nothing costs less than asking each time.

Requests that wait for the disk are the I/O engine's (`completions`). What the handlers of a round
submit is handed over at the round's end, in one go, and what is done is reaped at the start of
each: while there is work that costs no system call and no wake-up. For the sleep the engine's
eventfd is in the epoll, edge-triggered, so that nobody need read it. Replies that completions made
are sent once per round (`soon`).

Law: the other tasks must not starve. While requests run as tasks (`busy`) every round ends in a
checkpoint and there is no spinning; otherwise a checkpoint comes at least each `SLICE`. A handler
does one bounded batch and returns.
"""

from __future__ import annotations

import os
import select
from contextlib import nullcontext
from time import perf_counter
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from nbdserve.block.completions import Completions

__all__ = ["READABLE", "WRITABLE", "Poller"]

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

# Seconds to go on asking after the last event. A client on another core answers within 20 us.
SPIN = 50e-6

# Rounds between asking the epoll while there is always something to do.
EAGERLY = 4

# Seconds after which the other tasks get their turn, however much there is to do.
SLICE = 1e-3


class Poller:
    """Run `run` in a task; `busy` counts the requests that run as tasks."""

    def __init__(self, completions: Completions | None = None) -> None:
        self.busy = 0
        self.in_round = False  # what is given to `soon` now is called soon
        self._completions = completions
        self._soon: list[Callable[[], None]] = []
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], bool]] = {}
        self._watched: set[int] = set()

    def register(self, fd: int, handler: Callable[[], bool]) -> None:
        """Call `handler` whenever `fd` is readable. It may not raise; True asks for another call
        soon, whether `fd` is ready or not."""
        self._handlers[fd] = handler
        self._epoll.register(fd, READABLE)
        self._watched.add(fd)

    def want(self, fd: int, events: int) -> None:
        """What `handler` is called for from now on: READABLE, WRITABLE, both, or 0.

        With 0 the epoll must not know of it: it would report a hangup for ever.
        """
        if not events:
            self._watched.discard(fd)
            self._epoll.unregister(fd)
        elif fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._watched.add(fd)
            self._epoll.register(fd, events)

    def unregister(self, fd: int) -> None:
        """Before the descriptor is closed."""
        del self._handlers[fd]
        if fd in self._watched:
            self._watched.discard(fd)
            self._epoll.unregister(fd)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call it once when the completions of this round are through. It may not raise."""
        self._soon.append(callback)

    async def run(self) -> None:
        """Until cancelled."""
        completions = self._completions
        if completions is None:
            await self._run(_nothing, nullcontext)
            return
        eventfd = completions.eventfd
        if eventfd is not None:
            self._epoll.register(eventfd, select.EPOLLIN | select.EPOLLET)
        completions.attach()
        try:
            await self._run(completions.reap, completions.plug)
        finally:
            completions.detach()
            if eventfd is not None:
                self._epoll.unregister(eventfd)

    def _reap(self, reap: Callable[[], bool]) -> bool:
        """Completions, and the replies that they make."""
        if not reap():
            return False
        while self._soon:
            self._soon.pop()()
        return True

    async def _run(
        self, reap: Callable[[], bool], plug: Callable[[], AbstractContextManager[None]]
    ) -> None:
        poll, handlers = self._epoll.poll, self._handlers
        epoll_fd = self._epoll.fileno()
        spin_until = yield_at = 0.0
        rounds = 0
        eager: list[int] = []
        while True:
            rounds += 1
            self.in_round = True
            ready = eager
            if not eager or rounds % EAGERLY == 0:
                ready = list({*eager, *[fd for fd, _ in poll(0)]})
            eager = []
            reaped = self._reap(reap)
            if ready:
                with plug():
                    for fd in ready:
                        handler = handlers.get(fd)  # gone if an earlier one ended that connection
                        if handler is not None and handler():
                            eager.append(fd)
            self.in_round = False
            now = perf_counter()
            if ready or reaped:
                spin_until = now + SPIN
                if self.busy or now > yield_at:
                    await trio.lowlevel.checkpoint()
                    yield_at = perf_counter() + SLICE
            elif now > spin_until or self.busy:
                await trio.lowlevel.wait_readable(epoll_fd)
                yield_at = perf_counter() + SLICE
            else:
                os.sched_yield()

    def close(self) -> None:
        """After all connections are gone."""
        self._epoll.close()


def _nothing() -> bool:
    return False

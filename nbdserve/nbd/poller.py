"""One readiness loop for all connections in transmission: a batch at a time, no task per batch.

Facts, measured with fio on two cores: a task that waits in `trio.lowlevel.wait_readable` costs 30
to 40 us from data to code (epoll_ctl to arm, the wake-up, the scheduler), as much as ten requests.
So the sockets are in an epoll of our own, level-triggered and armed once. One task asks it without
waiting, calls the connections that have something to do, and asks again; all of trio's cost is
paid only when nothing was ready for `SPIN` and the task sleeps until the epoll itself is readable.
A client with one request in flight gets its next answer while we still spin.

A handler that did something is called again without asking the epoll (`EAGERLY` times): a busy
client has sent more by then, and a receive that finds nothing costs less than asking each time.

Law: the other tasks must not starve. While requests run as tasks (`busy`) every round ends in a
checkpoint and there is no spinning; otherwise a checkpoint comes at least each `SLICE`. A handler
does one bounded batch and returns. A request that only waits for its turn at a throttle needs no
task to run, so it is taken out of `busy` meanwhile: else one throttled client would cost all others
the spinning.
"""

from __future__ import annotations

import os
import select
from time import perf_counter
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

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

    def __init__(self) -> None:
        self.busy = 0
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

    def waits(self, requests: int) -> None:
        """So many requests that run as tasks begin to wait for nothing but time; with a negative
        number they end it."""
        self.busy -= requests

    async def run(self) -> None:
        """Until cancelled."""
        poll, handlers = self._epoll.poll, self._handlers
        epoll_fd = self._epoll.fileno()
        spin_until = yield_at = 0.0
        rounds = 0
        eager: list[int] = []
        while True:
            rounds += 1
            ready = eager
            if not eager or rounds % EAGERLY == 0:
                ready = list({*eager, *[fd for fd, _ in poll(0)]})
            eager = []
            for fd in ready:
                handler = handlers.get(fd)  # gone if an earlier handler ended that connection
                if handler is not None and handler():
                    eager.append(fd)
            now = perf_counter()
            if ready:
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

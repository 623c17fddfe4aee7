"""One readiness loop for all connections in transmission: a batch at a time, no task per batch.

Facts, measured with fio on two cores: a task that waits in `trio.lowlevel.wait_readable` costs 30
to 40 us from data to code (epoll_ctl to arm, the wake-up, the scheduler), as much as ten requests.
So the sockets are in an epoll of our own, level-triggered and armed once. One task asks it without
waiting, calls the connections that have something to do, and asks again; all of trio's cost is
paid only when nothing was ready for `SPIN` and the task sleeps until the epoll itself is readable.
A client with one request in flight gets its next answer while we still spin.

A handler that did something is called again without asking the epoll (`EAGERLY` times): a busy
client has sent more by then, and a receive that finds nothing costs less than asking each time.

An only client is asked by receiving from its socket, which the epoll is not told of meanwhile:
each of the client's own calls then costs it less, and it is the client that limits us (4.4 us of
each request at 32 deep; measured: 5 % more requests at 32 deep, 20 % more at one). While it has
just a request or two in flight, spinning yields the processor: where the scheduler has put both of
us on one, it waits for us.

Requests that wait for the disk are the I/O engines' (`completions`). What is done is reaped in each
round: while there is work that costs no system call and no wake-up. For the sleep an engine's
eventfd is in the epoll, edge-triggered, so that nobody need read it. Replies that completions made
are sent once per round (`soon`).

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
    from collections.abc import Callable, Sequence

    from nbdserve.block.completions import Completions

__all__ = ["READABLE", "WRITABLE", "Poller"]

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

# Seconds to go on asking after the last event. A client on another core answers within 20 us.
SPIN = 50e-6

# The same for an only client that waits for the disk, if that took less the last time. Waking up
# costs 50 to 100 us, as much as a fast disk's flush; for a slow one we sleep.
PATIENCE = 300e-6

# Requests in a round up to which a client is taken to wait for each answer.
FEW = 2

# Rounds between asking the epoll while there is always something to do.
EAGERLY = 4

# Seconds after which the other tasks get their turn, however much there is to do.
SLICE = 1e-3


class Poller:
    """Run `run` in a task; `busy` counts the requests that run as tasks."""

    def __init__(self, completions: Sequence[Completions] = ()) -> None:
        self.busy = 0
        self.in_round = False  # what is given to `soon` now is called soon
        self._completions = completions
        self._soon: list[Callable[[], None]] = []
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], int]] = {}
        self._wanted: dict[int, int] = {}
        self._armed: dict[int, int] = {}  # what the epoll knows of; 0 is never told
        self._alone: int | None = None  # the descriptor that is asked without the epoll
        self._yield_at = 0.0
        self._patience = SPIN  # how long to spin for the disk
        self._last = 0.0  # when there was something to do

    def register(self, fd: int, handler: Callable[[], int]) -> None:
        """Call `handler` whenever `fd` is readable. It may not raise; it returns how many requests
        it did, and is called again soon if it did any, whether `fd` is ready or not."""
        self._handlers[fd] = handler
        self.want(fd, READABLE)

    def want(self, fd: int, events: int) -> None:
        """What `handler` is called for from now on: READABLE, WRITABLE, both, or 0."""
        self._wanted[fd] = events
        if fd != self._alone:
            self._arm(fd, events)

    def unregister(self, fd: int) -> None:
        """Before the descriptor is closed."""
        self._arm(fd, 0)
        del self._handlers[fd], self._wanted[fd]

    def _arm(self, fd: int, events: int) -> None:
        armed = self._armed.get(fd, 0)
        if events == armed:
            return
        if not events:
            # Not modified to 0: then it would still report a hangup, for ever.
            self._epoll.unregister(fd)
            del self._armed[fd]
            return
        if armed:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._armed[fd] = events

    def waits(self, requests: int) -> None:
        """So many requests that run as tasks begin to wait for nothing but time; with a negative
        number they end it."""
        self.busy -= requests

    def soon(self, callback: Callable[[], None]) -> None:
        """Call it once when the completions of this round are through. It may not raise."""
        self._soon.append(callback)

    async def run(self) -> None:
        """Until cancelled."""
        for completions in self._completions:
            if completions.eventfd is not None:
                self._epoll.register(completions.eventfd, select.EPOLLIN | select.EPOLLET)
            completions.attach()
        try:
            await self._run()
        finally:
            for completions in self._completions:
                completions.detach()
                if completions.eventfd is not None:
                    self._epoll.unregister(completions.eventfd)

    def _reap(self) -> bool:
        """What the engines have completed, and the replies that it makes."""
        reaped = False
        self.in_round = True
        for completions in self._completions:
            reaped |= completions.reap()
        self.in_round = False
        if reaped:
            took = 1.5 * (perf_counter() - self._last)
            self._patience = SPIN if took > PATIENCE else max(took, SPIN)
        while self._soon:
            self._soon.pop()()
        return reaped

    async def _run(self) -> None:
        poll, handlers = self._epoll.poll, self._handlers
        spin_until = 0.0
        rounds = 0
        eager: list[int] = []
        while True:
            rounds += 1
            ready = eager
            if not eager or rounds % EAGERLY == 0:
                ready = list({*eager, *[fd for fd, _ in poll(0)]})
            if len(handlers) == 1 and len(ready) == 1 and ready[0] in handlers:
                eager = await self._serve_alone(ready[0])
                continue
            reaped = self._reap()
            eager = []
            for fd in ready:
                handler = handlers.get(fd)  # gone if an earlier handler ended that connection
                if handler is not None and handler():
                    eager.append(fd)
            now = perf_counter()
            if ready or reaped:
                spin_until = now + SPIN
                await self._let_others_run(now)
            elif now > spin_until or self.busy:
                await self._sleep()
            else:
                os.sched_yield()  # clients may be waiting for the processor

    async def _serve_alone(self, fd: int) -> list[int]:
        """The only client: ask its socket itself while it is busy, then sleep.

        Returns it if it is no longer the only one, and has more to do.
        """
        handlers = self._handlers
        handler = handlers[fd]
        done = handler()
        few = done <= FEW
        self._last = perf_counter()
        self._alone = fd
        self._arm(fd, 0)
        try:
            while self._wanted.get(fd) == READABLE:
                reaped = self._reap()
                now = perf_counter()
                if done or reaped:
                    few = done <= FEW
                    self._last = now
                elif now > self._last + self._patience or self.busy:
                    break
                elif few:
                    os.sched_yield()
                await self._let_others_run(now)
                if len(handlers) != 1 or handlers.get(fd) is not handler:
                    return [fd] if done else []
                done = handler()
        finally:
            self._alone = None
            self._arm(fd, self._wanted.get(fd, 0))
        await self._sleep()
        return []

    async def _let_others_run(self, now: float) -> None:
        if self.busy or now > self._yield_at:
            await trio.lowlevel.checkpoint()
            self._yield_at = perf_counter() + SLICE

    def _has_news(self) -> bool:
        """Whether there is something to do after all.

        Completions that were reaped have left their mark on the epoll, and it would wake us at
        once for nothing, which costs 15 us. Asking it takes the mark off.
        """
        ready = [fd for fd, _ in self._epoll.poll(0)]
        return self._reap() or any(fd in self._handlers for fd in ready)

    async def _sleep(self) -> None:
        if self._completions and self._has_news():
            return
        await trio.lowlevel.wait_readable(self._epoll.fileno())
        self._yield_at = perf_counter() + SLICE

    def close(self) -> None:
        """After all connections are gone."""
        self._epoll.close()

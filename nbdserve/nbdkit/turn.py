"""Whose turn it is to run the block stack: trio's thread, or one of nbdkit's.

The block stack has no locks. It relies on synchronous code not being interrupted, which in one
thread is so by nature. nbdkit calls from threads of its own, and what resolves without waiting
should not cost a hop to another thread and back (some 50 us, against 3 us for a read). So there is
one lock. Trio's thread holds it whenever it runs and lets go of it only around its wait for I/O,
which an instrument sees; a thread of nbdkit's that holds it may therefore call whatever is
synchronous, exactly as if it were between two steps of trio's tasks.

Not everything, though: it *is* another thread. Trio's functions that want to know who calls, which
are those that wake a task, look at the clock or start something, fail there. The synchronous ways
of a node use none of them but through `run_sync_soon` (block/node.py).

Fairness. A lock of the operating system goes to whoever asks first, and a thread that lets go and
asks again is nearly always first. That is what is wanted among nbdkit's threads, since a switch
costs more than a request. But trio's thread must not be kept out by them, nor they by it:

* trio's thread, when it finds the lock taken, closes a gate to those who do not wait yet;
* when somebody waits for the lock as it lets go, it does not take it again before one has had it.
"""

from __future__ import annotations

import threading
from collections import deque

import trio

__all__ = ["Turn"]


class Turn(trio.abc.Instrument):
    """The lock: an instrument of the trio run that it is about, and `enter` and `leave` for others.
    Between those two nothing may wait for trio's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.leave = self._lock.release
        self._gate = threading.Lock()
        self._closed = False
        self._waiting: deque[None] = deque()  # one item for each; its methods are atomic
        self._owed = False  # to one who waits, by trio's thread
        self._paid = threading.Semaphore(0)

    # --- threads of nbdkit's -------------------------------------------------------------------

    def enter(self) -> None:
        """Wait until trio's thread waits for I/O, and have it stay there until `leave`."""
        if self._closed:
            with self._gate:
                pass
        if self._lock.acquire(False):
            return
        self._waiting.append(None)
        self._lock.acquire()
        self._waiting.pop()
        if self._owed:
            self._owed = False
            self._paid.release()

    # --- trio's thread -------------------------------------------------------------------------

    def before_run(self) -> None:
        self._lock.acquire()

    def before_io_wait(self, timeout: float) -> None:
        self._owes = self._owed = bool(self._waiting)
        self._lock.release()

    def after_io_wait(self, timeout: float) -> None:
        if self._owes:
            self._paid.acquire()
        if self._lock.acquire(False):
            return
        with self._gate:
            self._closed = True
            self._lock.acquire()
            self._closed = False

    def after_run(self) -> None:
        self._lock.release()

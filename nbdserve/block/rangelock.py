"""Exclusive locks on ranges of integers (guest clusters), held across awaits.

Only requests that change a mapping take them: allocating writes, discards, write-zeroes. Code that
does not await needs no lock; it only asks `is_free` before it changes what a holder relies on.
Waiters start over when a holder leaves, so two ranges that do not overlap never wait for each
other. Few ranges are held at a time: a list and a linear look suffice.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["RangeLock"]


class RangeLock:
    """Ranges [first, last], both inclusive."""

    def __init__(self) -> None:
        self._held: list[tuple[int, int, trio.Event]] = []

    def is_free(self, first: int, last: int) -> bool:
        """Whether no holder overlaps [first, last]."""
        for low, high, _ in self._held:
            if first <= high and low <= last:
                return False
        return True

    @asynccontextmanager
    async def hold(self, first: int, last: int) -> AsyncIterator[None]:
        """Wait until nothing overlaps [first, last], then hold it for the body."""
        while not self.is_free(first, last):
            await next(
                event for low, high, event in self._held if first <= high and low <= last
            ).wait()
        entry = (first, last, trio.Event())
        self._held.append(entry)
        try:
            yield
        finally:
            self._held.remove(entry)
            entry[2].set()

    def statistics(self) -> int:
        """How many ranges are held."""
        return len(self._held)

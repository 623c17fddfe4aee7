"""Exclusive locks on ranges of integers (guest clusters), held across awaits.

Only requests that change a mapping take them: allocating writes, discards, write-zeroes. Code that
does not await needs no lock; it only asks `is_free` before it changes what a holder relies on.

Law: first come, first served. A request waits for every earlier one that overlaps it, whether that
holds its range or still waits. So nobody starves: a discard of the whole disk gets its turn however
many small writes keep coming, which then wait for it. And nobody waits for a later one, so there is
no deadlock as long as nobody asks for a second range while holding one that overlaps it.

Few ranges are held at a time: a list and a linear look suffice.
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
        self._entries: list[tuple[int, int, trio.Event]] = []  # held or waiting, the oldest first

    def is_free(self, first: int, last: int) -> bool:
        """Whether nobody who holds a range or waits for one overlaps [first, last]."""
        return not self._overlapping(first, last)

    def _overlapping(self, first: int, last: int) -> list[trio.Event]:
        return [gone for low, high, gone in self._entries if first <= high and low <= last]

    @asynccontextmanager
    async def hold(self, first: int, last: int) -> AsyncIterator[None]:
        """Wait until everybody earlier who overlaps [first, last] is gone; hold it for the body."""
        earlier = self._overlapping(first, last)
        entry = (first, last, trio.Event())
        self._entries.append(entry)
        try:
            for gone in earlier:
                await gone.wait()
            yield
        finally:
            self._entries.remove(entry)
            entry[2].set()

    def statistics(self) -> int:
        """How many ranges are held or waited for."""
        return len(self._entries)

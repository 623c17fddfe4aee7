"""A disk with no more than so much room: what a write takes of it, and a discard gives back.

Room is counted by what the node below says of a range before and after: what is no data there, or
is another layer's, takes new space when it is written. So whatever the node does, write zeroes as
data or drop half of a discard, the count is right; and requests that overlap wait for each other.

A write needs room for all of the clusters that it touches and that have none yet, as many as it
may come to; what it did not use goes back.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from errno import ENOSPC
from typing import TYPE_CHECKING

import trio

from nbdserve.block.rangelock import RangeLock
from nbdserve.block.units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from nbdserve.block.node import Node

__all__ = ["NoRoomError", "Room"]

FILE_BLOCK = 4096
"""The unit in bytes in which file systems give room to a file."""


class NoRoomError(OSError):
    """A write needs more room than there is. `needed`, `left` in bytes."""

    def __init__(self, needed: int, left: int) -> None:
        super().__init__(ENOSPC, "No space left on device (a fault)")
        self.needed = needed
        self.left = left


class Room:
    """Of `file`. `left`: bytes, None: without end; it may be set at any time, and is below 0 if
    the node below took what nobody asked for."""

    def __init__(self, file: Node, left: int | None) -> None:
        self.left = left
        self._file = file
        self._ranges = RangeLock()
        self._unit = file.cluster_size if file.cluster_size > 1 else FILE_BLOCK

    @asynccontextmanager
    async def taken(self, offset: int, length: int) -> AsyncIterator[None]:
        """A write is done in the body. Raises NoRoomError."""
        if self.left is None:
            yield
            return
        first, end = self._touched(offset, length)
        async with self._ranges.hold(first, end - 1):
            needed = await self._free(first, end)
            if needed > self.left:
                raise NoRoomError(needed, self.left)
            self._add(-needed)
            try:
                yield
            finally:
                if needed:
                    self._add(await self._free_for_certain(first, end))

    @asynccontextmanager
    async def given_back(self, offset: int, length: int) -> AsyncIterator[None]:
        """A discard, or what unmaps, is done in the body."""
        if self.left is None:
            yield
            return
        first, end = self._touched(offset, length)
        async with self._ranges.hold(first, end - 1):
            before = await self._free(first, end)
            try:
                yield
            finally:
                self._add(await self._free_for_certain(first, end) - before)

    def _add(self, nb_bytes: int) -> None:
        if self.left is not None:
            self.left += nb_bytes

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        """(first, end) of the units of a range; a disk may end within one, a file grows."""
        end = offset + length
        return (
            align_down(offset, self._unit),
            min(align_up(end, self._unit), max(end, self._file.size)),
        )

    async def _free(self, first: int, end: int) -> int:
        """How many bytes of a range take new space when they are written."""
        free = max(0, end - max(first, self._file.size))
        end = min(end, self._file.size)
        while first < end:
            for extent in await self._file.block_status(first, end - first):
                first += extent.length
                free += 0 if extent.data and extent.allocated else extent.length
        return free

    async def _free_for_certain(self, first: int, end: int) -> int:
        """The same for who was cut off; 0 if the node below does not tell any more."""
        free = 0
        with trio.CancelScope(shield=True), suppress(OSError):
            free = await self._free(first, end)
        return free

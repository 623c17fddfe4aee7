"""Memory for payloads: page-aligned, taken again and again.

O_DIRECT wants buffers aligned to what the device asks for, never more than a page; and a new
buffer for each request would be zeroed first and faulted in. So there is one pool for each drive.

Law: who takes a buffer gives it back exactly once, when nobody uses it any more: a read's when its
bytes have gone to the client, whatever became of the client. What it holds is another request's
data, so nobody may see more of it than was filled.
"""

from __future__ import annotations

import mmap

from nbdserve.block.units import MIB

__all__ = ["BufferPool"]

# The smallest buffer, and what small ones are cut from.
PAGE = mmap.PAGESIZE
SLAB = MIB

# Free bytes beyond which buffers that come back are let go.
KEPT_BYTES = 32 * MIB


class BufferPool:
    """Buffers of a power of two of pages."""

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}  # size -> buffers
        self._free_bytes = 0

    def take(self, length: int) -> memoryview:
        """A writable buffer of at least `length` bytes, aligned to a page, content undefined.

        Use a slice of it, and give the whole back.
        """
        size = PAGE if length <= PAGE else 1 << (length - 1).bit_length()
        free = self._free.get(size)
        if free:
            self._free_bytes -= size
            return free.pop()
        slab = memoryview(mmap.mmap(-1, max(size, SLAB)))
        pieces = [slab[start : start + size] for start in range(0, len(slab), size)]
        buffer = pieces.pop()
        self._free.setdefault(size, []).extend(pieces)
        self._free_bytes += len(slab) - size
        return buffer

    def give(self, buffer: memoryview) -> None:
        """Back from `take`."""
        size = len(buffer)
        if self._free_bytes < KEPT_BYTES:
            self._free_bytes += size
            self._free.setdefault(size, []).append(buffer)

    def statistics(self) -> int:
        """Free bytes."""
        return self._free_bytes

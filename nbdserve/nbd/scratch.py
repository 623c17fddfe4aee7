"""Large buffers, lent to whoever is being served.

Connections are served one at a time, so they need one large buffer between them, and the one that
was just used is in the processor's cache. Only who must keep what is in it, until its client reads
or sends the rest, keeps the buffer; then the next takes another.

They are anonymous mappings: pages that nobody writes to cost nothing, and what is let go goes back
to the system at once.
"""

from __future__ import annotations

import mmap

__all__ = ["Scratch", "new_buffer"]

# Free buffers that are kept. Clients that copy with large requests keep one each for a moment.
KEPT = 8


def new_buffer(size: int) -> memoryview:
    """Of zeroes."""
    return memoryview(mmap.mmap(-1, size))


class Scratch:
    """Buffers of one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        """A buffer whose content is undefined."""
        return self._free.pop() if self._free else new_buffer(self.size)

    def give(self, buffer: memoryview) -> None:
        """Back from `take`; nothing may point into it any more."""
        if len(self._free) < KEPT:
            self._free.append(buffer)

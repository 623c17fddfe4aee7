"""Which parts of the metadata are durable: what FUA may be passed down on.

A write with FUA may be one durable write of the file only if a power cut right after it would find
the way to it: the L2 entries of the range and the L1 entry of their table, as they are in memory.
(Refcounts need not be asked for: they are durable before the L2 entry that needs them is written,
ordering.py. Nor need the rest of the image.) So a slice of a table counts as durable when

* it is clean: nothing was changed since it was written, and it is not being written just now; and
* a flush of the file has ended that began after it was written. Remembered are the slices for which
  that is not so, by their place in the file: a table may leave the cache in between and come back.

What the file held when it was opened may lie in the page cache since another process wrote it; the
first thing that proves it durable is a sync of our own. So nothing counts as durable until one has
ended, and a flush of ours runs one only if the file was written to before: `file_written`. With a
data file the image's own may never be written, so then it is only made to believe that it was.

All this is of the image's file. New data in a data file needs nothing more: an entry is written
after the data that it links is durable there too, and one that was rewritten with the value that it
had before is as dirty as any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.formats.qcow2.tables import SLICE_SIZE

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.tables import Table

__all__ = ["Durability"]


class Durability:
    """Of one image. Flushes of the image do not overlap: it has one lock for them."""

    def __init__(self) -> None:
        self._written = False  # to the file, since the image was opened
        self._synced = False
        self._unflushed: set[int] = set()  # host offsets of slices

    @property
    def awaits_flush(self) -> bool:
        """Whether a flush would make anything durable that is not yet."""
        return bool(self._unflushed) or self._written > self._synced

    @property
    def is_synced(self) -> bool:
        """Whether what the file held when it was opened is durable."""
        return self._synced

    def file_written(self) -> None:
        """The file's next flush is a sync: a write of it has completed, or is presumed."""
        self._written = True

    def table_written(self, host_offset: int, nb_bytes: int) -> None:
        """Slices of a table are being written."""
        self._unflushed.update(range(host_offset, host_offset + nb_bytes, SLICE_SIZE))

    def begin_flush(self) -> bool:
        """The file is going to be flushed; give the token to `flushed`."""
        return self._written

    def flushed(self, token: bool) -> None:
        """The flush has succeeded: what was written before it began is durable."""
        self._synced |= token
        self._unflushed.clear()

    def covers(self, table: Table, first: int, last: int) -> bool:
        """Whether the entries from `first` to `last` are durable as they are."""
        return self._synced and all(
            table.is_written(number)
            and table.host_offset + number * SLICE_SIZE not in self._unflushed
            for number in table.slices(first, last)
        )

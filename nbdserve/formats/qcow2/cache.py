"""The metadata caches: L2 tables and refcount blocks, by index.

Facts: a lookup happens on every request, eviction rarely, and any bookkeeping on a hit (moving an
entry of an ordered dict, setting a flag) costs as much as the lookup. So a hit does none. `hot`
maps the tables used since the last sweep straight to their entries; a lookup that misses there
goes through `peek`, which promotes. When the cache is over its capacity a sweep drops an eighth of
it, first what was not used since the last sweep, and empties `hot`: a clock algorithm whose hand
moves in bulk. (Dropping just one table would cost a look at all of them for each load.)

Law: only clean tables are dropped, and nobody keeps a table across an await. When everything is
dirty the cache goes over its capacity until `write_back` has run, and whoever is adding tables
waits for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import trio

if TYPE_CHECKING:
    from array import array
    from collections.abc import Awaitable, Callable

    from nbdserve.formats.qcow2.tables import Table

__all__ = ["CacheStatistics", "TableCache"]

# What a table costs in memory besides its entries; matters for 512-byte clusters.
TABLE_OVERHEAD = 512

# A sweep frees this fraction of the capacity.
SWEPT = 8


class CacheStatistics(NamedTuple):
    """tables and nb_bytes: held now; dirty: of these, not written back yet; loads (misses: a table
    is loaded once for all who want it) and evictions: since the image was opened. Hits are not
    counted, see above."""

    tables: int
    nb_bytes: int
    dirty: int
    loads: int
    evictions: int


class TableCache:
    """Tables by index, at most about `capacity` bytes of them."""

    def __init__(
        self,
        capacity: int,
        load: Callable[[int], Awaitable[Table]],
        write_back: Callable[[], Awaitable[None]],
    ) -> None:
        self.hot: dict[int, array[int]] = {}
        self._tables: dict[int, Table] = {}
        self._dirty: dict[Table, None] = {}  # in the order in which they became so
        self._loading: dict[int, trio.Event] = {}
        self._capacity = capacity
        self._load = load
        self._write_back = write_back
        self._nb_bytes = 0
        self._loads = 0
        self._evictions = 0

    def peek(self, index: int) -> Table | None:
        """The table if it is in memory."""
        table = self._tables.get(index)
        if table is not None:
            self.hot[index] = table.entries
        return table

    async def get(self, index: int) -> Table:
        """The table, loaded if it must be; one load at a time for each table.

        Raises the OSError or CorruptImage of the load; the next caller then tries again.
        """
        while (table := self.peek(index)) is None:
            event = self._loading.get(index)
            if event is not None:
                await event.wait()
                continue
            self._loading[index] = event = trio.Event()
            try:
                await self.relieve()
                self.add(index, await self._load(index))
                self._loads += 1
            finally:
                del self._loading[index]
                event.set()
        return table

    def add(self, index: int, table: Table) -> None:
        """Put a table that was just made into the cache."""
        self._tables[index] = table
        table.registry = self._dirty
        if table.dirty:
            self._dirty[table] = None
        self.hot[index] = table.entries
        self._nb_bytes += table.nb_bytes + TABLE_OVERHEAD

    def remove(self, index: int) -> None:
        """Take out a table that was replaced by another."""
        table = self._tables.pop(index)
        self._dirty.pop(table, None)
        table.registry = {}
        self.hot.pop(index, None)
        self._nb_bytes -= table.nb_bytes + TABLE_OVERHEAD

    async def relieve(self) -> None:
        """Make room, writing tables back if all are dirty. Raises the OSError of the write-back."""
        if not self.make_room():
            await self._write_back()
            self.make_room()

    def make_room(self) -> bool:
        """Drop tables if there are too many; False if it stays too full because all are dirty."""
        if self._nb_bytes <= self._capacity:
            return True
        unused = [index for index in self._tables if index not in self.hot]
        used = list(self.hot)
        self.hot.clear()
        enough = self._capacity - self._capacity // SWEPT
        for index in unused + used:
            if self._nb_bytes <= enough:
                break
            self._drop(index)
        return self._nb_bytes <= self._capacity

    def _drop(self, index: int) -> None:
        table = self._tables[index]
        if table.clean:
            del self._tables[index]
            self._nb_bytes -= table.nb_bytes + TABLE_OVERHEAD
            self._evictions += 1

    def dirty(self) -> list[Table]:
        """The tables with entries that are not on disk."""
        return list(self._dirty)

    def statistics(self) -> CacheStatistics:
        """Counters since the image was opened."""
        return CacheStatistics(
            len(self._tables),
            self._nb_bytes,
            sum(1 for _ in self.dirty()),
            self._loads,
            self._evictions,
        )

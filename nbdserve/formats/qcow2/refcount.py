"""Refcounts: which host clusters are in use, and where the next ones come from.

Law: raising refcounts is synchronous. New refcount blocks and a larger refcount table are made in
memory only; ordering.py writes them before anything that depends on them. But first the file must
have room for them: zeroes are written where they will be. So a full file system fails the request
that needs a table, not the write-back, which holds the changes of all: a flush of what is in the
file already succeeds, and so does what frees room, which is a flush too (`reserve`; QEMU writes new
tables at once).

What can need waiting is an existing refcount block that is not cached, and that writing of zeroes
with O_DIRECT: then `take_nowait` answers None and `take` does it.

Clusters come from, in this order: what was found or made free (`_free`); the part of the image
that has not been searched for free clusters yet, one refcount block at a time; the end of the file.
Clusters at the end of a regular file have never been written, so they read as zeroes and a write
into part of one needs no filling (`zeroed`); a reused one has stale bytes.

A new refcount block is put into a cluster that it describes itself, so making one needs no other
(qcow2 specification, "Host cluster management"; alloc_refcount_block in QEMU explains what goes
wrong otherwise).
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from nbdserve.block.node import MAX_INLINE, Leaf
from nbdserve.errors import CorruptImage
from nbdserve.formats.qcow2.ordering import REFCOUNT_BLOCK, REFCOUNT_TABLE
from nbdserve.formats.qcow2.spec import MAX_REFCOUNT_TABLE_BYTES
from nbdserve.formats.qcow2.spec import REFCOUNT_BLOCK_OFFSET_MASK as BLOCK_MASK
from nbdserve.formats.qcow2.tables import Table, decode_refcounts, empty_refcounts

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator

    from nbdserve.block.node import Node
    from nbdserve.formats.qcow2.cache import TableCache
    from nbdserve.formats.qcow2.geometry import Geometry
    from nbdserve.formats.qcow2.metadata import MetadataMap
    from nbdserve.formats.qcow2.quarantine import Quarantine
    from nbdserve.formats.qcow2.redo import Redo

__all__ = ["Clusters", "Refcounts"]

# Clusters freed in one go; each is a record of the redo log.
MAX_LOWERED = 4096


@dataclass(frozen=True, slots=True)
class Clusters:
    """Contiguous host clusters, just taken: index of the first, how many, all bytes known zero."""

    first: int
    count: int
    zeroed: bool


class Refcounts:
    """The refcount table (always in memory) and the cache of refcount blocks."""

    def __init__(
        self,
        file: Node,
        geometry: Geometry,
        table: Table,
        metadata: MetadataMap,
        quarantine: Quarantine,
        redo: Redo,
        *,
        end: int,
        end_is_zero: bool,
        pass_discard: bool = True,
    ) -> None:
        """`end`: index of the first cluster past the end of the file. `pass_discard`: what becomes
        free is discarded in the file too."""
        self.table = redo.watch(table, REFCOUNT_TABLE)
        self.moved_from: list[tuple[int, int]] = []  # (host offset, nb_clusters) of former tables
        self.allocated = 0  # clusters since the image was opened, those of metadata too
        self.freed = 0
        self.blocks: TableCache  # set by the node: the cache loads through this object
        self._file = file
        self._geometry = geometry
        self._metadata = metadata
        self._quarantine = quarantine
        self._redo = redo
        self._end = end
        self._end_is_zero = end_is_zero
        self._pass_discard = pass_discard
        self._searched = 0  # refcount blocks below this index have been searched
        self._search_end = -(-end // geometry.block_entries)
        self._free: list[tuple[int, int]] = []  # runs: first cluster, count
        self._reserving = trio.Lock()
        self._reserved = NOWHERE  # what has room in the file for new tables, and holds zeroes

    # --- taking clusters -----------------------------------------------------------------------

    def take_nowait(self, nb_clusters: int) -> Clusters | None:
        """Take up to `nb_clusters` contiguous clusters, at least one; their refcount becomes one.

        None: a refcount block must be loaded, or free clusters searched for; use `take`.
        """
        while True:
            if self._free:
                first, available = self._free[-1]
            elif self._searched < self._search_end:
                return None
            else:
                first, available = self._end, nb_clusters
            at_end = not self._free
            block = self._block_nowait(first)
            if block is None:
                return None
            if block is not _MADE:
                taken = self._take_from(block, first, min(available, nb_clusters), at_end)
                if taken is not None:
                    return taken

    async def take(self, nb_clusters: int) -> Clusters:
        """As `take_nowait`, loading what it needs."""
        while (taken := self.take_nowait(nb_clusters)) is None:
            if not self._free and self._searched < self._search_end:
                await self._search_next_block()
            else:
                first = self._next_cluster()
                if self._has_block(first):
                    await self.blocks.get(first >> self._geometry.block_bits)
                else:
                    await self._reserve_block()
        return taken

    def put_back(self, clusters: Clusters) -> None:
        """Undo a take at once: nothing was awaited since, and nothing but zeroes written."""
        lowered = self._lower_nowait(clusters)
        assert lowered
        if clusters.first + clusters.count == self._end and clusters.zeroed:
            self._end = clusters.first
        else:
            self._free.append((clusters.first, clusters.count))

    def return_nowait(self, clusters: Clusters) -> bool:
        """Undo a take of clusters that were written to perhaps, but that nothing ever pointed to:
        they are free at once, and used last. False: their refcount block is not cached."""
        if not self._lower_nowait(clusters):
            return False
        self._free.insert(0, (clusters.first, clusters.count))
        return True

    def _lower_nowait(self, clusters: Clusters) -> bool:
        block = self.blocks.peek(clusters.first >> self._geometry.block_bits)
        if block is None:
            return False
        index = clusters.first & (self._geometry.block_entries - 1)
        self.allocated -= clusters.count
        for number in range(clusters.count):
            block.set(index + number, 0)
        return True

    def _next_cluster(self) -> int:
        return self._free[-1][0] if self._free else self._end

    def _take_from(self, block: Table, first: int, count: int, at_end: bool) -> Clusters | None:
        """Raise the refcounts of a run's leading free clusters; None if the first is in use."""
        entries = block.entries
        index = first & (self._geometry.block_entries - 1)
        count = min(count, self._geometry.block_entries - index)
        taken = 0
        while taken < count and entries[index + taken] == 0:
            self._metadata.assert_free(first + taken)
            block.set(index + taken, 1)
            taken += 1
        self.allocated += taken
        self._consume(max(taken, 1), at_end)
        return Clusters(first, taken, at_end and self._end_is_zero) if taken else None

    def _consume(self, count: int, at_end: bool) -> None:
        if at_end:
            self._end += count
            return
        first, available = self._free.pop()
        if available > count:
            self._free.append((first + count, available - count))

    # --- refcount blocks and the refcount table --------------------------------------------------

    def _block_nowait(self, cluster: int) -> Table | None:
        """The block for a cluster about to be taken. None: not cached, or no room was reserved yet
        for a new one. _MADE: it was just made, in the place of the cluster; choose again."""
        index = cluster >> self._geometry.block_bits
        if self._has_block(cluster):
            return self.blocks.peek(index)
        if not self._take_reserved(self._place_of_block(cluster)):
            return None
        if index >= len(self.table.entries):
            self._grow_table()
            return _MADE
        self._make_block(index, cluster)
        self._consume(1, not self._free)
        return _MADE

    def _has_block(self, cluster: int) -> bool:
        index = cluster >> self._geometry.block_bits
        return index < len(self.table.entries) and bool(self.table.entries[index] & BLOCK_MASK)

    def _place_of_block(self, cluster: int) -> range:
        """The clusters that a block for this one, which has none, will take, with a larger table if
        it needs one."""
        if cluster >> self._geometry.block_bits < len(self.table.entries):
            return range(cluster, cluster + 1)
        start, _, _, end = self._larger_table()
        return range(start, end)

    def _take_reserved(self, clusters: range) -> bool:
        if clusters == self._reserved:
            self._reserved = NOWHERE
            return True
        if self._reserving.locked():  # others wait, lest zeroes be written over what they made
            return False
        return self._clear_nowait(clusters)

    async def _reserve_block(self) -> None:
        """Reserve room for the block of the next cluster, if that still needs one."""
        async with self._reserving:
            cluster = self._next_cluster()
            if not self._has_block(cluster):
                clusters = self._place_of_block(cluster)
                await self._clear(clusters)
                self._reserved = clusters

    def reserve_nowait(self, clusters: Clusters) -> bool:
        """See that the file has room for a table in clusters just taken; False: use `reserve`.
        Raises OSError."""
        return self._clear_nowait(range(clusters.first, clusters.first + clusters.count))

    async def reserve(self, clusters: Clusters) -> None:
        """As `reserve_nowait`, however long it takes."""
        await self._clear(range(clusters.first, clusters.first + clusters.count))

    def _clear_nowait(self, clusters: range) -> bool:
        bits = self._geometry.cluster_bits
        nb_bytes = len(clusters) << bits
        return (
            nb_bytes <= MAX_INLINE
            and isinstance(self._file, Leaf)
            and self._file.write_nowait(clusters.start << bits, bytes(nb_bytes))
        )

    async def _clear(self, clusters: range) -> None:
        bits = self._geometry.cluster_bits
        await self._file.write(clusters.start << bits, bytes(len(clusters) << bits))

    def _make_block(self, index: int, cluster: int) -> Table:
        """A new block for `index`, placed in `cluster`."""
        geometry = self._geometry
        self._metadata.assert_free(cluster)
        self.allocated += 1
        self.blocks.make_room()  # nothing is loaded in a file that only grows
        block = Table(
            empty_refcounts(geometry.block_entries, geometry.refcount_bits),
            cluster << geometry.cluster_bits,
            entry_bits=geometry.refcount_bits,
            fresh=True,
        )
        self._redo.watch(block, REFCOUNT_BLOCK)
        self.blocks.add(index, block)
        self._metadata.add(block.host_offset)
        if cluster >> geometry.block_bits == index:
            block.set(cluster & (geometry.block_entries - 1), 1)
        self.table.set(index, block.host_offset)  # last: the process may die in between
        return block

    def _larger_table(self) -> tuple[int, int, int, int]:
        """Where a refcount table half as large again goes: its first cluster, how many clusters it
        has, how many blocks follow it, and the first cluster after those.

        It goes to the end of the file. That is past the old table's reach, so the refcounts of the
        new table's own clusters need new blocks, right behind it.
        """
        geometry = self._geometry
        start = self._end
        first_block = start >> geometry.block_bits
        nb_clusters = geometry.clusters(
            max(self.table.nb_bytes * 3 // 2, (first_block + 1) * 8)
        ) + 1
        end = start + nb_clusters + 1
        while (end - 1) >> geometry.block_bits >= first_block + end - start - nb_clusters:
            end += 1
        nb_blocks = end - start - nb_clusters
        if (
            nb_clusters * geometry.cluster_size > MAX_REFCOUNT_TABLE_BYTES
            or first_block + nb_blocks > nb_clusters * geometry.l2_entries
        ):
            raise OSError(errno.EFBIG, f"{self._file.filename}: the refcount table cannot grow")
        return start, nb_clusters, nb_blocks, end

    def _grow_table(self) -> None:
        """Move the refcount table to where there is room for a larger one."""
        geometry = self._geometry
        old = self.table
        start, nb_clusters, nb_blocks, end = self._larger_table()
        first_block = start >> geometry.block_bits
        host_offset = start << geometry.cluster_bits
        entries = old.entries[:]
        entries.extend([0] * (nb_clusters * geometry.l2_entries - len(entries)))
        self.table = self._redo.watch(Table(entries, host_offset, fresh=True), REFCOUNT_TABLE)
        self.moved_from.append((old.host_offset, geometry.clusters(old.nb_bytes)))
        self.allocated += nb_clusters
        for cluster in range(start, start + nb_clusters):
            self._metadata.assert_free(cluster)
            self._metadata.add(cluster << geometry.cluster_bits)
        for number in range(nb_blocks):
            block = self._make_block(first_block + number, start + nb_clusters + number)
            low = (first_block + number) << geometry.block_bits
            for cluster in range(max(low, start), min(low + geometry.block_entries, end)):
                block.set(cluster - low, 1)
        self._end = end
        self._redo.moved(self.table, nb_clusters)  # last: as above

    async def load_block(self, index: int) -> Table:
        """Read one refcount block (the cache's loader). Raises CorruptImage."""
        geometry = self._geometry
        host_offset = self.table.entries[index] & BLOCK_MASK
        if host_offset & geometry.in_cluster:
            raise CorruptImage(
                f"{self._file.filename}: refcount block {index} at {host_offset:#x} is not aligned"
            )
        data = bytearray(geometry.cluster_size)
        await self._file.read(host_offset, memoryview(data))
        block = Table(
            decode_refcounts(data, geometry.refcount_bits),
            host_offset,
            entry_bits=geometry.refcount_bits,
        )
        return self._redo.watch(block, REFCOUNT_BLOCK)

    async def _search_next_block(self) -> None:
        """Look for free clusters in the next block of the image that was not searched yet."""
        index = self._searched
        geometry = self._geometry
        low = index << geometry.block_bits
        count = min(geometry.block_entries, self._end - low)
        if index >= len(self.table.entries) or not self.table.entries[index] & BLOCK_MASK:
            found = [(0, count)]
        else:
            block = await self.blocks.get(index)
            if self._searched != index:  # somebody else was faster
                return
            found = free_runs(block.entries, count)
        self._searched = index + 1
        # Cluster 0 is the header; a refcount of zero there is damage, not room.
        self._free[:0] = [
            (low + first, length) for first, length in reversed(found) if low + first > 0
        ]

    # --- lowering --------------------------------------------------------------------------------

    async def lower(self, clusters: list[int]) -> int:
        """Lower the refcounts of leading clusters, some of one refcount block, by one for each time
        they are listed; give the room of those that become free back to the file. Returns how
        many of the list were dealt with.

        Only for what has left quarantine, ascending, one call at a time. Raises OSError with
        nothing lowered.
        """
        geometry = self._geometry
        index = clusters[0] >> geometry.block_bits
        low = index << geometry.block_bits
        listed = clusters[: min(bisect_left(clusters, low + geometry.block_entries), MAX_LOWERED)]
        if index >= len(self.table.entries) or not self.table.entries[index] & BLOCK_MASK:
            return len(listed)  # never counted: nothing to lower
        block = await self.blocks.get(index)
        times = Counter(listed)
        freed = list(runs(c for c, count in times.items() if block.entries[c - low] == count))
        # Discarded while they still count as used: once a refcount is zero, even if only the
        # search for free clusters sees it, somebody may be writing to the cluster.
        for first, count in freed if self._pass_discard else ():
            with suppress(OSError):  # a hint
                await self._file.discard(
                    first << geometry.cluster_bits, count << geometry.cluster_bits
                )
        block = await self.blocks.get(index)
        for cluster, count in times.items():
            block.set(cluster - low, max(block.entries[cluster - low] - count, 0))
        for first, count in freed:
            self.freed += count
            for cluster in range(first, first + count):
                self._metadata.discard(cluster << geometry.cluster_bits)
            # What lies in a block not searched yet will be found by the search.
            if index < self._searched or self._searched >= self._search_end:
                self._free.append((first, count))
        return len(listed)


_MADE = Table.__new__(Table)
NOWHERE = range(0)


def runs(clusters: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The runs (first, count) of ascending cluster indices."""
    first = count = 0
    for cluster in clusters:
        if count and cluster == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = cluster, 1
    if count:
        yield first, count


def free_runs(entries: array[int], count: int) -> list[tuple[int, int]]:
    """The runs (first, length) of zeroes among the first `count` entries, ascending."""
    found: list[tuple[int, int]] = []
    index = 0
    while index < count:
        try:
            index = entries.index(0, index, count)
        except ValueError:
            break
        start = index
        while index < count and entries[index] == 0:
            index += 1
        found.append((start, index - start))
    return found

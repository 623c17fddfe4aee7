"""Host clusters that were unlinked and may not be handed out again yet.

A cluster leaves quarantine when (a) the table that no longer points to it is durable and (b) every
request that may have resolved onto it is done. Only then is its refcount lowered, even in memory.

That is also why the metadata caches need no dependency in this direction: a refcount block in the
cache never holds a decrement whose unlinking is not durable, so refcount blocks may be written at
any time, and the order "refcounts, then tables that link" has no cycle (QEMU orders the two caches
both ways and breaks cycles by flushing). A crash in between leaks what was in quarantine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.epoch import Epochs

__all__ = ["Quarantine"]


# An epoch before all that any request can be in.
OLDEST = -1


class Quarantine:
    """Clusters by how far they have come: unlinked -> sealed (being written) -> durable."""

    def __init__(self, epochs: Epochs) -> None:
        self._epochs = epochs
        self._unlinked: list[int] = []
        self._sealed: list[tuple[int, list[int]]] = []
        self._durable: list[tuple[int, list[int]]] = []

    def __len__(self) -> int:
        return len(self._unlinked) + sum(
            len(clusters) for _, clusters in (*self._sealed, *self._durable)
        )

    def add(self, cluster: int) -> None:
        """The cluster with this index lost one reference, in the caches."""
        self._unlinked.append(cluster)

    def seal(self) -> None:
        """The tables are being snapshotted: what was unlinked up to now goes with them."""
        if self._unlinked:
            self._sealed.append((self._epochs.advance(), self._unlinked))
            self._unlinked = []

    def mark_durable(self) -> None:
        """All snapshots taken so far are written and flushed."""
        self._durable += self._sealed
        self._sealed = []

    def release(self) -> list[int]:
        """Take out the clusters that nobody can reach any more, in ascending order."""
        oldest = self._epochs.oldest()
        released = [cluster for tag, group in self._durable if tag < oldest for cluster in group]
        self._durable = [(tag, group) for tag, group in self._durable if tag >= oldest]
        return sorted(released)

    def put_back(self, clusters: list[int]) -> None:
        """Clusters that `release` gave out but that could not be freed: it gives them out again."""
        if clusters:
            self._durable.append((OLDEST, clusters))

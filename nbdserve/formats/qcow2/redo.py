"""How the tables of an image enter the redo log: which entries, and in which stage they would be
written.

Law: a table that belongs to an image opened for writing is *watched* from the moment it is made or
loaded, so every change of it is in the log before the request that made it is answered. The stages
are those of ordering.py, so whoever replays the log keeps the write order without knowing it.

Without a guardian there is no log, and nothing is watched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.block.redo import CLEAR, OFFSET, PUT, REACHED, WIDTH, encode
from nbdserve.formats.qcow2.header import refcount_table_update
from nbdserve.formats.qcow2.ordering import STAGE, TABLES, What

if TYPE_CHECKING:
    from nbdserve.block.redo import RedoLog
    from nbdserve.formats.qcow2.ordering import TableKind
    from nbdserve.formats.qcow2.tables import Table

__all__ = ["Redo", "Watcher"]


class Watcher:
    """Enters the changes of one kind of table into the log."""

    __slots__ = ("_append", "_clear", "_put")

    def __init__(self, log: RedoLog, kind: TableKind) -> None:
        self._append = log.append
        self._clear = encode(CLEAR, STAGE[kind.if_fresh])
        self._put = encode(PUT, STAGE[kind.otherwise])

    def watch(self, table: Table) -> None:
        """Every change from now on is entered; of a new table what it holds already, too."""
        table.watcher = self
        if table.fresh:
            self._append(self._clear + table.host_offset * OFFSET, table.nb_bytes)
            for index, value in enumerate(table.entries):
                if value:
                    self.changed(table, index, value)

    def changed(self, table: Table, index: int, value: int) -> None:
        """An entry has got a value."""
        width = table.entry_bits >> 3
        if not width:
            index, value = table.byte_of(index)
            width = 1
        offset = table.host_offset + index * width
        self._append(offset * OFFSET + width * WIDTH + self._put, value)

    def written(self, table: Table) -> None:
        """A new table is in the file."""
        self._append(encode(REACHED, offset=table.host_offset), 0)


class Redo:
    """The log of one image, or none; `low`: it is time for a write-back."""

    def __init__(self, log: RedoLog | None) -> None:
        self._log = log
        self._watchers = {} if log is None else {kind: Watcher(log, kind) for kind in TABLES}

    @property
    def low(self) -> bool:
        """Whether nothing should be changed before a write-back has made room."""
        return self._log is not None and self._log.low

    def watch(self, table: Table, kind: TableKind) -> Table:
        """A table that was just made or loaded. Returns it."""
        if self._log is not None:
            self._watchers[kind].watch(table)
        return table

    def moved(self, table: Table, nb_clusters: int) -> None:
        """The refcount table is in another place now, all of it, which the header has to say."""
        if self._log is not None:
            update = refcount_table_update(table.host_offset, nb_clusters)
            self._log.append_all(
                [
                    (encode(PUT, STAGE[What.HEADER], 1, offset), byte)
                    for offset, byte in enumerate(update.data, update.offset)
                ]
            )

    def begin_write_back(self) -> int:
        """What is dirty is being snapshotted; the result is for `written_back`."""
        return 0 if self._log is None else self._log.mark()

    def written_back(self, mark: int) -> None:
        """That snapshot is written."""
        if self._log is not None:
            self._log.drop(mark)

    def stop(self) -> None:
        """The image is damaged, and nobody shall write to it any more."""
        if self._log is not None:
            self._log.stop()

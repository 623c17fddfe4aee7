"""Metadata tables in memory: an array of host-order ints, and what of it is not on disk yet.

Law: *clean means written*. A changed entry marks its slice dirty; `snapshot` takes the bytes of
all dirty slices at one moment; only `written` makes them clean, and `not_written` gives them back.
Entries that change between the two are dirty again and belong to the next snapshot, so a table can
go on changing while an older state of it is on the way to the disk.

A slice is the unit of writing: large enough to batch neighbours, small enough that one changed
entry does not cost a whole 64 KiB table.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nbdserve.formats.qcow2.redo import Watcher

__all__ = [
    "SLICE_SIZE",
    "Table",
    "TableWrite",
    "decode_refcounts",
    "decode_table",
    "empty_refcounts",
]

SLICE_SIZE = 4096

# array type codes by width in bytes; 'Q' and 'I' are 8 and 4 bytes wherever CPython runs on Linux.
TYPECODES = {1: "B", 2: "H", 4: "I", 8: "Q"}
SWAP = sys.byteorder == "little"

# A byte of 1-, 2- or 4-bit refcounts -> the refcounts in it, the first in the lowest bits.
UNPACKED = {
    bits: [
        bytes((byte >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits))
        for byte in range(256)
    ]
    for bits in (1, 2, 4)
}


class TableWrite(NamedTuple):
    """Bytes of a table to be written at a host offset."""

    host_offset: int
    data: bytes


def decode_table(data: bytes | bytearray | memoryview, width: int = 8) -> array[int]:
    """Big-endian entries of `width` bytes each."""
    entries = array(TYPECODES[width])
    entries.frombytes(data)
    if SWAP and width > 1:
        entries.byteswap()
    return entries


def decode_refcounts(data: bytes | bytearray | memoryview, refcount_bits: int) -> array[int]:
    """A refcount block; one array element per refcount whatever its width."""
    if refcount_bits >= 8:
        return decode_table(data, refcount_bits // 8)
    unpacked = UNPACKED[refcount_bits]
    return array("B", b"".join([unpacked[byte] for byte in bytes(data)]))


class Table:
    """One table: L1, L2, refcount table or refcount block.

    `fresh`: nothing on disk points to it yet, so it may be written in any order. `registry`: where
    it enters itself while it is dirty; that of the cache which holds it, so that finding what is
    dirty does not cost a look at all tables. `watcher`: who is told of each change.
    """

    __slots__ = (
        "_entries_per_slice",
        "_in_flight",
        "dirty",
        "entries",
        "entry_bits",
        "fresh",
        "host_offset",
        "registry",
        "watcher",
    )

    def __init__(
        self, entries: array[int], host_offset: int, *, entry_bits: int = 64, fresh: bool = False
    ) -> None:
        self.entries = entries
        self.host_offset = host_offset
        self.fresh = fresh
        self.registry: dict[Table, None] = {}
        self.dirty: set[int] = set()
        self._in_flight: set[int] = set()
        self.entry_bits = entry_bits
        self.watcher: Watcher | None = None
        self._entries_per_slice = SLICE_SIZE * 8 // entry_bits
        if fresh:
            self.touch_all()

    @property
    def nb_bytes(self) -> int:
        """The table's size on disk."""
        return len(self.entries) * self.entry_bits // 8

    @property
    def clean(self) -> bool:
        """Whether the disk (or the OS) has all of it."""
        return not self.dirty and not self._in_flight

    def slices(self, first: int, last: int) -> range:
        """The numbers of the slices that hold the entries from `first` to `last`."""
        return range(first // self._entries_per_slice, last // self._entries_per_slice + 1)

    def is_written(self, number: int) -> bool:
        """Whether the disk (or the OS) has all of a slice."""
        return number not in self.dirty and number not in self._in_flight

    def set(self, index: int, value: int) -> None:
        """Change one entry."""
        self.entries[index] = value
        if not self.dirty:
            self.registry[self] = None
        self.dirty.add(index // self._entries_per_slice)
        if self.watcher is not None:
            self.watcher.changed(self, index, value)

    def touch_all(self) -> None:
        """Mark the whole table dirty."""
        self.dirty.update(self.slices(0, len(self.entries) - 1))
        self.registry[self] = None

    def snapshot(self) -> list[TableWrite]:
        """The bytes of all dirty slices as of now, neighbours joined; one snapshot at a time."""
        assert not self._in_flight
        writes: list[TableWrite] = []
        run: list[int] = []
        for index in sorted(self.dirty):
            if run and index != run[-1] + 1:
                writes.append(self._encode(run[0], run[-1]))
                run = []
            run.append(index)
        if run:
            writes.append(self._encode(run[0], run[-1]))
        self._in_flight = self.dirty
        self.dirty = set()
        self.registry.pop(self, None)
        return writes

    def written(self) -> None:
        """The snapshot has been written."""
        self._in_flight = set()
        if self.fresh:
            self.fresh = False
            if self.watcher is not None:
                self.watcher.written(self)

    def not_written(self) -> None:
        """The snapshot was not, or not surely, written."""
        self.dirty |= self._in_flight
        self._in_flight = set()
        if self.dirty:
            self.registry[self] = None

    def byte_of(self, index: int) -> tuple[int, int]:
        """(number, value) of the byte that holds an entry of less than eight bits."""
        per_byte = 8 // self.entry_bits
        number = index // per_byte
        first = number * per_byte
        return number, _pack(self.entries[first : first + per_byte], self.entry_bits)[0]

    def _encode(self, first: int, last: int) -> TableWrite:
        start = first * self._entries_per_slice
        entries = self.entries[start : (last + 1) * self._entries_per_slice]
        if self.entry_bits < 8:
            data = _pack(entries, self.entry_bits)
        else:
            if SWAP and self.entry_bits > 8:
                entries.byteswap()
            data = entries.tobytes()
        return TableWrite(self.host_offset + first * SLICE_SIZE, data)


def _pack(entries: array[int], bits: int) -> bytes:
    per_byte = 8 // bits
    data = bytearray(len(entries) // per_byte)
    for shift in range(per_byte):
        for index, value in enumerate(entries[shift::per_byte]):
            data[index] |= value << (shift * bits)
    return bytes(data)


def empty_refcounts(nb_entries: int, refcount_bits: int) -> array[int]:
    """The entries of a refcount block with nothing in it."""
    width = max(refcount_bits // 8, 1)
    return array(TYPECODES[width], bytes(nb_entries * width))

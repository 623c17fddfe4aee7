"""The write log: all that was done to some files, in order, and when each of it had returned.

A log is a list of records. A request has one where it *begins*, with its data, and an END where it
has *returned*; what lies between them may have been done or not. A write that was durable when it
returned, by FUA, has a DURABLE in place of the END. A request that failed has neither: it may have
done anything. A MARK is a note of whoever keeps the log, such as "transaction 7 is
committed". A *moment* is a number of records that have been made: moment 0 is the start.

Law: requests begin in the log in the order in which they take effect where they overlap. Whoever
keeps a log sees to that (logged.py has overlapping requests wait for each other). What a power cut
makes of it is powercut.py's.

Several files have one log, so that their order among each other is in it, too; `initial` is what
each of them held at moment 0.

In a file: MAGIC, the number of files, for each its length and bytes, then the records, each as
`HEAD` (kind, file, number, offset, length) and, where the kind has them, `length` bytes of data. A
record that is not there to its end, as of a writer that was killed, is left out.
"""

from __future__ import annotations

import enum
import struct
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

__all__ = ["CHANGES", "ENDS", "Kind", "Record", "WriteLog", "change"]

MAGIC = b"nbdserve write log 1\n"
HEAD = struct.Struct("<BBQQQ")
LENGTH = struct.Struct("<Q")


class Kind(enum.IntEnum):
    """What a record says."""

    WRITE = 0
    WRITE_ZEROES = 1
    DISCARD = 2
    FLUSH = 3
    END = 4
    DURABLE = 5
    MARK = 6


HAS_DATA = frozenset({Kind.WRITE, Kind.MARK})
CHANGES = frozenset({Kind.WRITE, Kind.WRITE_ZEROES, Kind.DISCARD})
ENDS = frozenset({Kind.END, Kind.DURABLE})


class Record(NamedTuple):
    """number: of the record that began the request; an END has that of its request. `data` is
    empty but for writes and marks."""

    kind: Kind
    file: int
    number: int
    offset: int = 0
    length: int = 0
    data: bytes = b""


class WriteLog:
    """Records and what the files held before the first of them."""

    def __init__(self, initial: Sequence[bytes] = ()) -> None:
        self.initial = list(initial)
        self.records: list[Record] = []

    def __len__(self) -> int:
        """The present moment."""
        return len(self.records)

    def add_file(self, content: bytes) -> int:
        """One more file; its number."""
        self.initial.append(content)
        return len(self.initial) - 1

    def begin(
        self, kind: Kind, file: int = 0, offset: int = 0, data: bytes | int = b""
    ) -> int:
        """A request begins; `data` is its length where it has none. Returns the number for
        `end`."""
        number = len(self.records)
        length, stored = (data, b"") if isinstance(data, int) else (len(data), data)
        self.records.append(Record(kind, file, number, offset, length, stored))
        return number

    def end(self, number: int, *, durable: bool = False) -> None:
        """The request has returned, without an error. `durable`: a write by FUA."""
        kind = Kind.DURABLE if durable else Kind.END
        self.records.append(Record(kind, self.records[number].file, number))

    def mark(self, note: bytes) -> None:
        """A note of what has happened up to now."""
        self.records.append(Record(Kind.MARK, 0, len(self.records), 0, len(note), note))

    def marks(self, moment: int) -> list[bytes]:
        """The notes made up to a moment."""
        return [record.data for record in self.records[:moment] if record.kind is Kind.MARK]

    def replay(self, moment: int | None = None) -> list[bytes]:
        """What the files held at a moment, all that had begun being done: what a crash of the
        process leaves, but not of the machine. None: now."""
        files = [bytearray(content) for content in self.initial]
        for record in self.records[:moment]:
            if record.kind in CHANGES:
                change(files[record.file], record)
        return [bytes(content) for content in files]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log to a file."""
        with open(path, "wb") as out:
            out.write(MAGIC + bytes([len(self.initial)]))
            for content in self.initial:
                out.write(LENGTH.pack(len(content)))
                out.write(content)
            for kind, file, number, offset, length, data in self.records:
                out.write(HEAD.pack(kind, file, number, offset, length))
                out.write(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WriteLog:
        """Read what `save` wrote. Raises OSError, ValueError (not a write log)."""
        log = cls()
        with open(path, "rb") as source:
            if source.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{path}: not a write log")
            for _ in range(_exactly(source, 1)[0]):
                (length,) = LENGTH.unpack(_exactly(source, LENGTH.size))
                log.initial.append(_exactly(source, length))
            log.records.extend(_records(source))
        return log


def change(content: bytearray, record: Record, start: int = 0, stop: int | None = None) -> None:
    """Do to a file what a record says, or only the bytes from `start` to `stop` of it. A discard
    leaves zeroes and does not make the file longer."""
    low = record.offset + start
    high = record.offset + (record.length if stop is None else stop)
    if record.kind is Kind.DISCARD:
        high = min(high, len(content))
    if low >= high:
        return
    if high > len(content):
        content.extend(bytes(high - len(content)))
    if record.data:
        content[low:high] = record.data[start:stop]
    else:
        content[low:high] = bytes(high - low)


def _exactly(source: IO[bytes], length: int) -> bytes:
    data = source.read(length)
    if len(data) < length:
        raise ValueError("the write log ends in the middle of what the files held at first")
    return data


def _records(source: IO[bytes]) -> Iterator[Record]:
    while len(head := source.read(HEAD.size)) == HEAD.size:
        kind, file, number, offset, length = HEAD.unpack(head)
        data = source.read(length) if kind in HAS_DATA else b""
        if kind in HAS_DATA and len(data) < length:
            return
        yield Record(Kind(kind), file, number, offset, length, data)

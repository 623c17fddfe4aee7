"""The redo log: changes of metadata that are in our memory only, kept where our death leaves them.

A format node acknowledges a write when the data is with the kernel, while the tables that lead to
it wait in its caches for a flush: the power may go, and then the order on disk decides. But if just
the process dies, the kernel has all of the data and nothing of the way to it. So each change of a
table also goes into this log, in memory shared with a second process (guardian.py), which does the
interrupted write-back in our place.

The log knows bytes at offsets of one file, not what they mean. Its records:

    PUT      a big-endian number of some width in a table has got a value
    CLEAR    there is a new table, of zeroes so far; as nothing on disk points to it yet it is
             written in a stage of its own, whatever the stage of its entries
    REACHED  that table is in the file, and may be pointed to: its entries are as any others

Stages are those of the format's write order, ascending: what a stage writes may point to what
earlier ones wrote, so each but the first waits until those, and the file's data, are durable.

Law: *a record is in the log before anybody can learn of the change*, as both happen in one
synchronous stretch. A write-back takes a mark when it takes its snapshot and drops what is before
the mark when it has written everything. Replaying what was written already changes nothing.

A log that is full has a gap from then on and is not replayed, until a later write-back has made up
for it. That is as safe as having no log, and as forgetful; who looks at `low` never gets there.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "CAPACITY",
    "CLEAR",
    "OFFSET",
    "PUT",
    "REACHED",
    "WIDTH",
    "Record",
    "RedoLog",
    "ReplayFile",
    "encode",
    "replay",
]

CAPACITY = 1 << 18  # records: 4 MiB of memory once all have been used
LOW = CAPACITY // 4  # records: room for what happens between two looks at `low`

HEAD, TAIL, GAP = range(3)  # words of the first page
STOPPED = 2  # a GAP for good
FIRST = mmap.PAGESIZE // 8

PUT, CLEAR, REACHED = range(3)

# A record's first word is its action, and multiples of these.
STAGE, WIDTH, OFFSET = 1 << 2, 1 << 4, 1 << 8

SECTOR = 512


class Record(NamedTuple):
    """action: PUT, CLEAR or REACHED; width and offset in bytes; value: of a PUT, or a length."""

    action: int
    stage: int
    width: int
    offset: int
    value: int


def encode(action: int, stage: int = 0, width: int = 0, offset: int = 0) -> int:
    """The first word of a record."""
    return offset * OFFSET + width * WIDTH + stage * STAGE + action


class RedoLog:
    """The log of one file, in memory that another process can be given."""

    def __init__(self, fd: int | None = None) -> None:
        """`fd`: of an existing log, which somebody else writes. The descriptor is the log's."""
        size = (FIRST + 2 * CAPACITY) * 8
        if fd is None:
            fd = os.memfd_create("nbdserve-redo", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
        self.fd = fd
        self._memory = mmap.mmap(fd, size)
        self._words = memoryview(self._memory).cast("Q")
        self._head = self._words[HEAD]
        self._end = self._words[TAIL] + CAPACITY  # where it would be full
        self._full = False

    def __len__(self) -> int:
        return self._words[HEAD] - self._words[TAIL]

    @property
    def low(self) -> bool:
        """Whether it is time for a write-back."""
        return self._end - self._head < LOW

    def append(self, word: int, value: int) -> None:
        """Enter a record; `word` is by `encode`."""
        head = self._head
        if head == self._end:
            self._overflow()
            return
        words = self._words
        at = FIRST + 2 * (head % CAPACITY)
        words[at] = word
        words[at + 1] = value
        self._head = words[HEAD] = head + 1  # last: a record counts once it is whole

    def append_all(self, records: Sequence[tuple[int, int]]) -> None:
        """Enter several records that count together or not at all."""
        if self._end - self._head < len(records):
            self._overflow()
            return
        words = self._words
        for number, (word, value) in enumerate(records, self._head):
            at = FIRST + 2 * (number % CAPACITY)
            words[at] = word
            words[at + 1] = value
        self._head = words[HEAD] = self._head + len(records)

    def _overflow(self) -> None:
        self._full = True
        if not self._words[GAP]:
            self._words[GAP] = 1

    def mark(self) -> int:
        """The position of what comes next; everything before is in the snapshot being taken."""
        if self._full:
            # Nobody would replay what is here; there shall be room for what comes now.
            self._full = False
            self._drop(self._head)
        return self._head

    def drop(self, mark: int) -> None:
        """Everything before the mark has been written."""
        self._drop(mark)
        if not self._full and self._words[GAP] != STOPPED:
            self._words[GAP] = 0

    def _drop(self, position: int) -> None:
        self._words[TAIL] = position
        self._end = position + CAPACITY

    def stop(self) -> None:
        """What is in the log shall never be replayed: the image was found damaged."""
        self._words[GAP] = STOPPED
        self._end = self._head
        self._full = True

    def records(self) -> Iterator[Record]:
        """What has to be replayed, the oldest first; nothing if there is a gap."""
        words = self._words
        if words[GAP]:
            return
        for number in range(words[TAIL], words[HEAD]):
            at = FIRST + 2 * (number % CAPACITY)
            word, value = words[at], words[at + 1]
            yield Record(
                word % STAGE, word % WIDTH // STAGE, word % OFFSET // WIDTH, word // OFFSET, value
            )

    def close(self) -> None:
        """Nothing is recorded any more."""
        self._words.release()
        self._memory.close()
        os.close(self.fd)


class ReplayFile(Protocol):
    """The file that a log is of."""

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes than asked for: the end of the file."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""

    def flush(self) -> None:
        """Make everything written so far durable, what lies in other files for this one too."""


class _Range(NamedTuple):
    """A new table: where it ends, and the stage in which it is to be written."""

    end: int
    stage: int


def replay(records: Iterable[Record], file: ReplayFile) -> int:
    """Write what the records say, in order of their stages. Returns how many writes that took.

    Raises OSError; what was written until then is a stage too early at no point.
    """
    sectors, new = _last_state(records)
    stages: dict[int, list[tuple[int, bytes]]] = {}
    for start, (end, stage) in new.items():
        table = bytearray(end - start)
        for sector in range(start, end, SECTOR):
            _, entries = sectors.pop(sector, (0, {}))
            for offset, data in entries.items():
                table[offset - start : offset - start + len(data)] = data
        stages.setdefault(stage, []).append((start, bytes(table)))
    for sector, (stage, entries) in sectors.items():
        old = bytearray(file.read(sector, SECTOR).ljust(SECTOR, b"\0"))
        for offset, data in entries.items():
            old[offset - sector : offset - sector + len(data)] = data
        stages.setdefault(stage, []).append((sector, bytes(old)))
    for stage in sorted(stages):
        if stage:
            file.flush()
        for offset, content in sorted(stages[stage]):
            file.write(offset, content)
    return sum(map(len, stages.values()))


def _last_state(
    records: Iterable[Record],
) -> tuple[dict[int, tuple[int, dict[int, bytes]]], dict[int, _Range]]:
    """What the records come to: {sector: (stage, {offset: bytes})} and {new table: its range}."""
    sectors: dict[int, tuple[int, dict[int, bytes]]] = {}
    new: dict[int, _Range] = {}
    for action, stage, width, offset, value in records:
        if action == PUT:
            sector = offset - offset % SECTOR
            _, entries = sectors.setdefault(sector, (stage, {}))
            entries[offset] = value.to_bytes(width, "big")
        elif action == CLEAR:
            # Whatever was there belonged to somebody else.
            for sector in range(offset, offset + value, SECTOR):
                sectors.pop(sector, None)
            new[offset] = _Range(offset + value, stage)
        else:
            new.pop(offset, None)
    return sectors, new

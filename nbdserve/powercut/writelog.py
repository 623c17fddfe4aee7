"""The write log: all that was done to some files, in order, and when each of it had returned.

A log is a list of records (records.py). A *moment* is a number of records that have been made:
moment 0 is the start. Several files have one log, so that their order among each other is in it,
too; `initial` is what each of them held at first.

Law: requests begin in the log in the order in which they take effect where they overlap. Whoever
keeps a log sees to that (filters/power_cut.py has overlapping requests wait for each other). What a
power cut makes of it is outcomes.py's.

A log without `history` forgets what is durable: after each flush that goes into `initial`, and only
what the disk may still lose is kept, with the notes. It can tell of no moment before.

A log has a bound, `max_data`: what is beyond it is refused when it begins, before it is done, as
what is not in the log would make every later outcome a lie.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from nbdserve.powercut.content import Content
from nbdserve.powercut.disk import Disk
from nbdserve.powercut.logfile import LogFile, read_log
from nbdserve.powercut.records import CHANGES, ENDS, Kind, Record, change

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

__all__ = ["CHANGES", "ENDS", "MAX_DATA", "Kind", "LogFull", "Record", "WriteLog", "change"]

MAX_DATA = 1 << 30

# What a request costs beside its data, about, in bytes.
RECORD_SIZE = 512

# A log that forgets does so after a flush, or, where there is none, after so many durable writes.
MANY_RECORDS = 4096


class LogFull(OSError):
    """There is no room for a request in the log."""


class WriteLog:
    """Records and what the files held before the first of them.

    `names`: of the files. `max_data`: bytes of data in all, of the files at first and of writes;
    None: any number.
    """

    def __init__(
        self,
        initial: Sequence[Content | bytes] = (),
        *,
        history: bool = True,
        max_data: int | None = None,
    ) -> None:
        self.initial: list[Content] = []
        self.names: list[str] = []
        self.records: list[Record] = []
        self.history = history
        self.max_data = max_data
        self.first_moment = 0
        self._numbers = 0
        self._under_way: dict[int, tuple[Kind, int]] = {}  # number -> (kind, file)
        self._forgotten = 0  # records that were made but are not there
        self._old_marks: list[bytes] = []
        self._keep = 0  # records that were left when the log last forgot
        self._size = 0
        self._stream: LogFile | None = None
        for content in initial:
            self.add_file(content)

    def __len__(self) -> int:
        """The present moment."""
        return self._forgotten + len(self.records)

    @property
    def size(self) -> int:
        """About how many bytes of memory it takes."""
        return self._size + sum(content.data_size for content in self.initial)

    @property
    def is_streamed(self) -> bool:
        """Whether each record is written to a file when it is made."""
        return self._stream is not None

    def add_file(self, content: Content | bytes, name: str = "") -> int:
        """One more file; its number. Raises OSError: it cannot be streamed."""
        if not isinstance(content, Content):
            content = Content.of(content)
        if self._stream is not None:
            self._stream.add_file(len(self.initial), content, name)
        self.initial.append(content)
        self.names.append(name)
        return len(self.initial) - 1

    def begin(
        self, kind: Kind, file: int = 0, offset: int = 0, data: bytes | int = b""
    ) -> int:
        """A request begins; `data` is its length where it has none. Returns the number for
        `end`. Raises LogFull, and OSError if it cannot be streamed; the log is as it was then."""
        length, stored = (data, b"") if isinstance(data, int) else (len(data), data)
        room = RECORD_SIZE + len(stored)
        if not self._has(room) and not self.history:
            self.forget()
        if not self._has(room):
            raise LogFull(errno.ENOMEM, f"the write log is full ({self.max_data} bytes)")
        number = self._numbers
        self._add(Record(kind, file, number, offset, length, stored))
        self._size += room
        self._under_way[number] = kind, file
        return number

    def _has(self, room: int) -> bool:
        return self.max_data is None or self.size + room <= self.max_data

    def end(self, number: int, *, durable: bool = False) -> None:
        """The request has returned, without an error. `durable`: a write by FUA."""
        kind = self._under_way[number][0]
        how = Kind.FLUSHED if kind is Kind.FLUSH else Kind.DURABLE if durable else Kind.END
        self._end(number, how)

    def refused(self, number: int) -> None:
        """The request has returned, and nothing of it was done."""
        self._end(number, Kind.NOTHING)

    def _end(self, number: int, how: Kind) -> None:
        self._add(Record(how, self._under_way[number][1], number))
        del self._under_way[number]
        if not self.history and (how is Kind.FLUSHED or len(self.records) > self._many()):
            self.forget()

    def mark(self, note: bytes) -> None:
        """A note of what has happened up to now. Raises OSError if it cannot be streamed."""
        self._add(Record(Kind.MARK, 0, self._numbers, 0, len(note), note))
        self._size += RECORD_SIZE + len(note)

    def _add(self, record: Record) -> None:
        if self._stream is not None:
            self._stream.add(record)
        self.records.append(record)
        self._numbers += 1

    def marks(self, moment: int) -> list[bytes]:
        """The notes made up to a moment."""
        return self._old_marks + [
            record.data for record in self.until(moment) if record.kind is Kind.MARK
        ]

    def until(self, moment: int | None = None) -> list[Record]:
        """The records made until then, but for those that were forgotten. Raises ValueError: the
        moment is later than now, or earlier than what it can tell of."""
        if moment is None:
            return self.records
        if not self.first_moment <= moment <= len(self):
            raise ValueError(
                f"moment {moment}: the write log has {self.first_moment} to {len(self)}"
            )
        return self.records[: moment - self._forgotten]

    def replay(self, moment: int | None = None) -> list[Content]:
        """What the files held at a moment, all that had begun being done: what a crash of the
        process leaves, but not of the machine. None: now. Raises ValueError, as `until`."""
        files = [content.copy() for content in self.initial]
        records = self.until(moment)
        refused = {record.number for record in records if record.kind is Kind.NOTHING}
        for record in records:
            if record.kind in CHANGES and record.number not in refused:
                change(files[record.file], record)
        return files

    def forget(self) -> None:
        """Keep only what the disk may still lose, and the notes."""
        disk = Disk(self.initial)
        disk.do(self.records)
        disk.settle()
        made = len(self)
        left: list[Record] = []
        for record in self.records:
            if record.kind is Kind.MARK:
                self._old_marks.append(record.data)
            elif record.number in disk.pending:
                sure = record.kind in ENDS and disk.is_durable(record.number)
                left.append(record._replace(kind=Kind.DURABLE) if sure else record)
            elif record.number in self._under_way:  # a flush
                left.append(record)
        self.initial, self.records = disk.base, left
        self.first_moment, self._forgotten, self._keep = made, made - len(left), len(left)
        self._size = sum(RECORD_SIZE + len(record.data) for record in left)
        self._size += sum(RECORD_SIZE + len(note) for note in self._old_marks)

    def _many(self) -> int:
        return 2 * self._keep + MANY_RECORDS

    def copy(self) -> WriteLog:
        """The same until now, which goes on by itself and is not streamed."""
        twin = WriteLog(history=self.history, max_data=self.max_data)
        twin.initial = [content.copy() for content in self.initial]
        twin.names, twin.records = self.names.copy(), self.records.copy()
        twin.first_moment, twin._forgotten = self.first_moment, self._forgotten
        twin._numbers, twin._keep, twin._size = self._numbers, self._keep, self._size
        twin._under_way = self._under_way.copy()
        twin._old_marks = self._old_marks.copy()
        return twin

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log to a file, in place of what is there. Raises OSError."""
        with LogFile.create(path) as out:
            self._save(out)

    def _save(self, out: LogFile) -> None:
        for number, (content, name) in enumerate(zip(self.initial, self.names, strict=True)):
            out.add_file(number, content, name)
        for note in self._old_marks:
            out.add(Record(Kind.MARK, 0, 0, 0, len(note), note))
        for record in self.records:
            out.add(record)

    def stream_to(self, path: str | os.PathLike[str]) -> None:
        """Write the log to a file, and from now on each record when it is made. Raises OSError."""
        stream = LogFile.create(path)
        try:
            self._save(stream)
        except BaseException:
            stream.close()
            raise
        self._stream = stream

    def close(self) -> None:
        """No more is streamed."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WriteLog:
        """Read what `save` or `stream_to` wrote. Raises OSError, ValueError (not a write log)."""
        files, records = read_log(path)
        log = cls.of([content for content, _ in files], records)
        log.names = [name for _, name in files]
        return log

    @classmethod
    def of(cls, initial: Sequence[Content | bytes], records: Sequence[Record]) -> WriteLog:
        """A log that has these records already, and may go on. What they leave under way is."""
        log = cls(initial)
        log.records = list(records)
        log._numbers = 1 + max((record.number for record in records), default=-1)
        log._size = sum(RECORD_SIZE + len(record.data) for record in records)
        log._under_way = {
            record.number: (record.kind, record.file)
            for record in records
            if record.kind in CHANGES or record.kind is Kind.FLUSH
        }
        for record in records:
            if record.kind in ENDS:
                log._under_way.pop(record.number, None)
        return log

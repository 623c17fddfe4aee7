"""A write log in a file: read, and written as it grows.

MAGIC, then records, each `HEAD` (kind, file, number, offset, length) and, where the kind has them,
`length` bytes of data. Beside those of records.py there are two kinds for what a file held at
first: INITIAL, some bytes of it at an offset; and FILE, when all of those have come, with the
file's size as `offset` and its name as data. So a file takes the room of its data, and one may join
later. Those are no moments.

A record is written by one system call before what it tells of is done. So a process that is killed
at any time leaves a log that lacks nothing but perhaps the end of its last record, which was not
acted upon yet; what is not there to its end is left out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import IO, TYPE_CHECKING

from nbdserve.powercut.content import Content
from nbdserve.powercut.records import ENDS, HAS_DATA, Kind, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FILE", "HEAD", "INITIAL", "MAGIC", "LogFile", "read_log", "read_records"]

MAGIC = b"nbdserve write log 2\n"
HEAD = struct.Struct("<BBQQQ")
INITIAL, FILE = 16, 17

# What is longer was not written by us: the longest request that there is has less.
MAX_LENGTH = 1 << 32


class LogFile:
    """A log that is being written. A context manager, which closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = os.fstat(fd).st_size

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> LogFile:
        """An empty log, in place of the log or the empty file that is there; of nothing else.
        Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            found = os.pread(fd, len(MAGIC), 0)
            if found and found[:19] != MAGIC[:19]:
                raise FileExistsError(
                    errno.EEXIST, "exists and is no write log", os.fspath(path)
                )
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    errno.EAGAIN, "another process writes a log there", os.fspath(path)
                ) from None
            os.ftruncate(fd, 0)
            log = cls(fd)
            log._write([MAGIC])
        except BaseException:
            os.close(fd)
            raise
        return log

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._fd)

    def add_file(self, number: int, content: Content, name: str) -> None:
        """What a file held at first. Raises OSError."""
        for offset, data in content.data():
            self._write([HEAD.pack(INITIAL, number, 0, offset, len(data)), data])
        label = os.fsencode(name)
        self._write([HEAD.pack(FILE, number, 0, content.size, len(label)), label])

    def add(self, record: Record) -> None:
        """A record was made. Raises OSError; nothing of it is in the file then."""
        kind, file, number, offset, length, data = record
        self._write([HEAD.pack(kind, file, number, offset, length), data])

    def _write(self, buffers: list[bytes]) -> None:
        length = sum(map(len, buffers))
        done = 0
        try:
            done = os.writev(self._fd, buffers)
            while done < length:  # what is not whole is not read, should we be killed here
                done += os.write(self._fd, b"".join(buffers)[done:])
        except OSError:
            os.ftruncate(self._fd, self._end)
            os.lseek(self._fd, self._end, os.SEEK_SET)
            raise
        self._end += length


def read_log(path: str | os.PathLike[str]) -> tuple[list[tuple[Content, str]], list[Record]]:
    """((content, name) of each file, records) of a log. Raises OSError, ValueError."""
    found: list[Content] = []
    names: dict[int, str] = {}
    records: list[Record] = []
    begun: dict[int, Record] = {}
    with open(path, "rb") as source:
        if source.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: not a write log")
        for head, data in read_records(source):
            kind, file, number, offset, _ = head
            if kind in (INITIAL, FILE):
                if file == len(found):
                    found.append(Content())
                if file != len(found) - 1 or file in names:
                    raise ValueError(f"{path}: damaged write log: a file comes twice, or too early")
                if kind == INITIAL:
                    found[file].write(offset, data)
                elif offset < found[file].size:
                    raise ValueError(f"{path}: damaged write log: data behind the end of a file")
                else:
                    found[file].size = offset
                    names[file] = os.fsdecode(data)
                continue
            record = _record(path, head, data)
            if record.kind is not Kind.MARK and file not in names:
                raise ValueError(f"{path}: damaged write log: there is no file {file}")
            if record.kind in ENDS:
                _check_end(path, begun.pop(number, None), record)
            elif record.kind is not Kind.MARK:
                if number in begun:
                    raise ValueError(f"{path}: damaged write log: {number} begins twice")
                begun[number] = record
            records.append(record)
    if not names or len(names) < len(found):
        raise ValueError(f"{path}: the write log ends before it says what the files held at first")
    return [(content, names[file]) for file, content in enumerate(found)], records


def _record(
    path: str | os.PathLike[str], head: tuple[int, int, int, int, int], data: bytes
) -> Record:
    try:
        return Record(Kind(head[0]), *head[1:], data)
    except ValueError:
        raise ValueError(f"{path}: damaged write log: there is no kind {head[0]}") from None


def _check_end(path: str | os.PathLike[str], begun: Record | None, end: Record) -> None:
    flushes = end.kind is Kind.FLUSHED
    if begun is None or (begun.kind is Kind.FLUSH) is not flushes or begun.file != end.file:
        raise ValueError(f"{path}: damaged write log: what ended did not begin ({end.number})")


def read_records(source: IO[bytes]) -> Iterator[tuple[tuple[int, int, int, int, int], bytes]]:
    """(head, data) of each record from here on that is there to its end."""
    with_data = {int(kind) for kind in HAS_DATA} | {INITIAL, FILE}
    size = os.fstat(source.fileno()).st_size
    while len(head := source.read(HEAD.size)) == HEAD.size:
        fields = HEAD.unpack(head)
        length = fields[4]
        if fields[0] not in with_data:
            yield fields, b""
            continue
        if length > min(MAX_LENGTH, size):
            return
        data = source.read(length)
        if len(data) < length:
            return
        yield fields, data

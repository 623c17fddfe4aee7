"""Power cuts of a server for a test: the outcomes, and the log of one in another process."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from nbdserve.powercut.logfile import FILE, HEAD, INITIAL, MAGIC, read_records
from nbdserve.powercut.powercut import Outcome
from nbdserve.powercut.writelog import Kind, Record, WriteLog

if TYPE_CHECKING:
    import pathlib

__all__ = ["ServedOutcome", "StreamedLog"]


@dataclasses.dataclass(frozen=True, slots=True)
class ServedOutcome(Outcome):
    """An outcome that can be served: it knows what it is an outcome of.

    `format`: raw if the power was cut above the format, for it is the disk; else the image's, for
    it is its file. `filename`: the image's; a backing file is named by where that lies.
    """

    format: str
    filename: str

    @classmethod
    def of(cls, outcome: Outcome, format: str, filename: str) -> ServedOutcome:
        return cls(
            outcome.moment, outcome.seed, outcome.marks, outcome.contents, format, filename
        )


class StreamedLog:
    """A log that another process writes, and the notes that this one makes of it.

    What a client has been told is in the log before, so a note belongs where the log ends when it
    is made.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._end = len(MAGIC)
        self._moment = 0
        self._notes: list[tuple[int, str]] = []

    def mark(self, note: str) -> None:
        """A note of what has happened up to now. Raises OSError."""
        with self.path.open("rb") as source:
            source.seek(self._end)
            for head, data in read_records(source):
                self._end += HEAD.size + len(data)
                self._moment += head[0] not in (INITIAL, FILE)
        self._notes.append((self._moment, note))

    def read(self) -> WriteLog:
        """All of it until now, with the notes. Raises OSError, ValueError."""
        log = WriteLog.load(self.path)
        records: list[Record] = []
        start = 0
        for moment, note in self._notes:
            data = note.encode()
            records += log.records[start:moment]
            records.append(Record(Kind.MARK, 0, 0, 0, len(data), data))
            start = moment
        noted = WriteLog.of(log.initial, records + log.records[start:])
        noted.names = log.names
        return noted

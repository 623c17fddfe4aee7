"""The records of a write log: what was asked of some files, and when it had returned.

A request has one where it *begins*, with its data, and another where it has *returned*; what lies
between them may have been done or not. What returned says how: a write that was durable then, by
FUA, has a DURABLE, a flush a FLUSHED, one that was refused and did nothing a NOTHING, everything
else an END. A request that failed has none of these: it may have done anything. A MARK is a note of
whoever keeps the log, such as "transaction 7 is committed".
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from nbdserve.powercut.content import Content

__all__ = ["CHANGES", "ENDS", "HAS_DATA", "Kind", "Record", "change"]


class Kind(enum.IntEnum):
    """What a record says."""

    WRITE = 0
    WRITE_ZEROES = 1
    DISCARD = 2
    FLUSH = 3
    END = 4
    DURABLE = 5
    MARK = 6
    FLUSHED = 7
    NOTHING = 8


HAS_DATA = frozenset({Kind.WRITE, Kind.MARK})
CHANGES = frozenset({Kind.WRITE, Kind.WRITE_ZEROES, Kind.DISCARD})
ENDS = frozenset({Kind.END, Kind.DURABLE, Kind.FLUSHED, Kind.NOTHING})


class Record(NamedTuple):
    """number: of the request, by which what begins it and what ends it are one. `data` is empty
    but for writes and marks."""

    kind: Kind
    file: int
    number: int
    offset: int = 0
    length: int = 0
    data: bytes = b""


def change(
    content: Content | bytearray, record: Record, start: int = 0, stop: int | None = None
) -> None:
    """Do to a file what a record says, or only the bytes from `start` to `stop` of it. A discard
    leaves zeroes and does not make the file longer."""
    low = record.offset + start
    high = record.offset + (record.length if stop is None else stop)
    if record.kind is Kind.DISCARD:
        high = min(high, len(content))
    if low >= high:
        return
    data = record.data
    if start or (stop is not None and stop != record.length):
        data = data[start:stop]
    if isinstance(content, Content):
        if data:
            content.write(low, data)
        else:
            content.write_zeroes(low, high - low)
        return
    if high > len(content):
        content.extend(bytes(high - len(content)))
    content[low:high] = data or bytes(high - low)

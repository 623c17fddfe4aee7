"""What an image may be after a power cut, from the record of what was done to it.

The law is that of a disk behind a page cache. When the power goes at some point of the record,

* durable are: all that had returned before a sync began that has returned; and a write with
  RWF_DSYNC (a DURABLE_WRITE) that has returned;
* of all else that had begun each sector of 512 bytes is there or is not, independently.

Nothing is said of the order between sectors that are not durable: a page cache keeps none.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from kernel.recorder import (
    ALLOCATE,
    DURABLE_WRITE,
    FAILED,
    HEAD,
    PUNCH,
    RETURNED,
    SYNC,
    WRITE,
)

if TYPE_CHECKING:
    import pathlib

SECTOR = 512
NEVER = 1 << 62
"""A position that no record reaches: what had not returned, returns there."""


class Call(NamedTuple):
    """One system call. `began`, `ended`: positions in the record."""

    kind: int
    began: int
    ended: int
    offset: int
    length: int
    data: bytes


class History:
    """All that a server did to an image, which held `initial` before."""

    def __init__(self, initial: bytes, record: bytes) -> None:
        self.initial = initial
        self.end = len(record)
        self.calls = list(_calls(record))

    @classmethod
    def read(cls, initial: bytes, log: pathlib.Path) -> History:
        return cls(initial, log.read_bytes())

    @property
    def nb_syncs(self) -> int:
        return sum(call.kind in (SYNC, DURABLE_WRITE) for call in self.calls)

    def everything(self) -> bytes:
        """The image if the power is never cut."""
        return self.after_cut(NEVER, random.Random(0), 1.0)

    def after_cut(
        self, position: int, chooser: random.Random, chance: float, *, syncs: bool = True
    ) -> bytes:
        """The image after a cut at this position of the record.

        `chance`: of a sector that is not durable to be there. `syncs`: whether syncs work; if not,
        this is what a server would leave that forgot them.
        """
        covered = 0
        for call in self.calls:
            if syncs and call.kind == SYNC and call.ended <= position:
                covered = max(covered, call.began)
        image = bytearray(self.initial)
        for call in self.calls:
            if call.began >= position or call.kind == SYNC:
                continue
            durable = call.ended <= covered or (
                syncs and call.kind == DURABLE_WRITE and call.ended <= position)
            _apply(image, call, chooser, 1.0 if durable else chance)
        return bytes(image)


def _calls(record: bytes) -> list[Call]:
    """The calls in the order in which they began; what failed may have done anything or nothing,
    and counts as never returned."""
    begun: dict[int, Call] = {}
    at = 0
    while at + HEAD.size <= len(record):
        kind, number, offset, length = HEAD.unpack_from(record, at)
        at += HEAD.size
        if kind == RETURNED:
            call = begun[number]
            begun[number] = call._replace(ended=at, length=length, data=call.data[:length])
        elif kind != FAILED:
            stored = length if kind in (WRITE, DURABLE_WRITE) else 0
            data = record[at : at + stored]
            begun[number] = Call(kind, at - HEAD.size, NEVER, offset, length, data)
            at += stored
    return sorted(begun.values(), key=lambda call: call.began)


def _apply(image: bytearray, call: Call, chooser: random.Random, chance: float) -> None:
    end = call.offset + call.length
    if call.kind == PUNCH:
        end = min(end, len(image))
    at = call.offset
    while at < end:
        stop = min(end, at + SECTOR - at % SECTOR) if chance < 1 else end
        if chance >= 1 or chooser.random() < chance:
            if stop > len(image):
                image.extend(bytes(stop - len(image)))
            if call.kind in (WRITE, DURABLE_WRITE):
                image[at:stop] = call.data[at - call.offset : stop - call.offset]
            elif call.kind != ALLOCATE:
                image[at:stop] = bytes(stop - at)
        at = stop

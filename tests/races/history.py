"""What a read may return, of requests some of which were in flight together.

NBD promises nothing for requests in flight together but that each byte is that of one of them; and
everything for one that begins after another was answered. So each request has an interval, from
when it was asked to when it was answered, and a byte read within [begin, end] may be

* what a request wrote there that began before `end`, unless another that was answered before
  `begin` began after that one was answered, and so lies between them for certain;
* the old content, unless any request that wrote there was answered before `begin`.

A request that was cut off has no end: it may have happened, in part or not at all, and hides
nothing. Everything is judged when all is over, from the outside: nothing here knows how it is done.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

__all__ = ["History", "Interval"]


@dataclasses.dataclass
class Interval:
    """One request's; `effect` is what it puts at `offset`."""

    name: str
    begin: float
    end: float = math.inf
    offset: int = 0
    effect: bytes = b""


class History:
    """Of one disk, that held `content` at the beginning."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._now = 0
        self._writes: list[Interval] = []
        self._reads: list[tuple[Interval, bytes]] = []

    def begin(self, name: str, offset: int = 0, effect: bytes = b"") -> Interval:
        """A request is asked."""
        self._now += 1
        interval = Interval(name, self._now, offset=offset, effect=effect)
        if effect:
            self._writes.append(interval)
        return interval

    def end(self, interval: Interval) -> None:
        """It was answered."""
        self._now += 1
        interval.end = self._now

    def read(self, interval: Interval, offset: int, data: bytes) -> None:
        """It was answered with data."""
        self.end(interval)
        interval.offset = offset
        self._reads.append((interval, data))

    def check(self) -> None:
        """Raises AssertionError for the first read that saw what it may not."""
        for interval, data in self._reads:
            start, stop = interval.offset, interval.offset + len(data)
            beside = [
                write
                for write in self._writes
                if write.begin < interval.end
                and write.offset < stop
                and start < write.offset + len(write.effect)
            ]
            edges = {start, stop}
            for write in beside:
                edges |= {write.offset, write.offset + len(write.effect)}
            cuts = sorted(edge for edge in edges if start <= edge <= stop)
            for low, high in itertools.pairwise(cuts):
                self._check_piece(interval, low, data[low - start : high - start], beside)

    def _check_piece(
        self, read: Interval, at: int, data: bytes, beside: list[Interval]
    ) -> None:
        """Of a piece that each write covers whole or not at all."""
        here = [w for w in beside if w.offset <= at < w.offset + len(w.effect)]
        over = [w for w in here if w.end < read.begin]
        allowed = [
            (write.name, write.effect[at - write.offset : at - write.offset + len(data)])
            for write in here
            if not any(write.end < later.begin for later in over)
        ]
        if not over:
            allowed.append(("before", self._content[at : at + len(data)]))
        if any(piece == data for _, piece in allowed):
            return
        for position, byte in enumerate(data):
            assert any(piece[position] == byte for _, piece in allowed), (
                f"{read.name} saw {byte:#x} at {at + position:#x}, which is not that of"
                f" {' or '.join(name for name, _ in allowed)}{self._whose(data[position:])}"
            )

    def _whose(self, data: bytes) -> str:
        """Where the bytes may come from, for the report."""
        piece = data[:16]
        sources = [("before", 0, self._content)]
        sources += [(write.name, write.offset, write.effect) for write in self._writes]
        for name, offset, content in sources:
            found = content.find(piece) if len(piece) >= 8 and any(piece) else -1
            if found >= 0:
                return f"; it is that of {name} at {offset + found:#x}"
        return ""

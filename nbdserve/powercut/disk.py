"""What a disk with a volatile cache certainly holds, as a write log goes on, and what it may lose.

The law, for the moment that the log has come to:

* durable is each request that had returned before a flush of its file began that has returned, and
  each write with FUA that has returned;
* every other request that had begun is there in whole, in part or not at all.

What is durable goes into `base`, unless something that is not came before it at the same place:
that could not be put below it any more. So what is left beside `base` is what the disk may still
lose, and little more, however long the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.powercut.records import CHANGES, Kind, Record, change

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from nbdserve.powercut.content import Content

__all__ = ["Disk"]


class Disk:
    """`base`: what each file certainly holds. `pending`: requests that are not in it, by number,
    in the order in which they began."""

    def __init__(self, initial: Iterable[Content]) -> None:
        self.base = [content.copy() for content in initial]
        self.pending: dict[int, Record] = {}
        self._returned: dict[int, int] = {}  # of those pending: how much had been done by then
        self._durable: set[int] = set()  # of those pending
        self._flushing: dict[int, int] = {}  # how much had been done when a flush began
        self._done = 0

    def copy(self) -> Disk:
        """The same, which goes on by itself."""
        twin = Disk(self.base)
        twin.pending = self.pending.copy()
        twin._returned = self._returned.copy()
        twin._durable = self._durable.copy()
        twin._flushing = self._flushing.copy()
        twin._done = self._done
        return twin

    def is_durable(self, number: int) -> bool:
        """Whether a request that is pending cannot be lost."""
        return number in self._durable

    def do(self, records: Sequence[Record]) -> None:
        """The log goes on."""
        for record in records:
            kind, number = record.kind, record.number
            self._done += 1
            if kind in CHANGES:
                self.pending[number] = record
            elif kind is Kind.END:
                if number in self.pending:
                    self._returned[number] = self._done
            elif kind is Kind.DURABLE:
                self._durable.add(number)
            elif kind is Kind.NOTHING:
                self.pending.pop(number, None)
            elif kind is Kind.FLUSH:
                self._flushing[number] = self._done
            elif kind is Kind.FLUSHED:
                began = self._flushing.pop(number)
                self._durable.update(
                    each
                    for each, returned in self._returned.items()
                    if returned < began and self.pending[each].file == record.file
                )
                self.settle()

    def process_dies(self) -> None:
        """Not the power goes, but the process that wrote: all that had returned is there."""
        self._durable.update(self._returned)
        self.settle()

    def settle(self) -> None:
        """Put into `base` what is durable."""
        if not self._durable:
            return
        left: list[list[Record]] = [[] for _ in self.base]
        for number, record in list(self.pending.items()):
            before = left[record.file]
            if number in self._durable and not any(_overlap(record, other) for other in before):
                change(self.base[record.file], record)
                del self.pending[number]
                self._returned.pop(number, None)
                self._durable.discard(number)
            else:
                before.append(record)


def _overlap(one: Record, other: Record) -> bool:
    return (
        one.offset < other.offset + other.length
        and other.offset < one.offset + one.length
    )

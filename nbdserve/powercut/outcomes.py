"""What the disk may hold after a power cut: pure functions of a write log, a moment and a seed.

The law is that of a disk with a volatile cache, or of a page cache. If the power goes at a moment,

* durable is each request that had returned before a flush of its file began that has returned, and
  each write with FUA that has returned;
* of every other request that had begun each sector of 512 bytes is there or is not, independently:
  so a request may be kept, lost or torn, and those of several requests come in any order.

Where requests overlap the log says which came last; of a sector the disk has what some of them left
of it in that order, the durable ones never missing. Losing all but some of the requests is the same
as doing these first, so this is every order that flushes allow.

`state_at` splits what has happened at a moment into what is certain (`base`, and the changes that
are `certain`) and what is not. `State.sample` draws one outcome: requests kept or lost whole, or
torn into pieces of 4096 or 512 bytes; all but one kept, or all but one lost, as a barrier that is
missing shows soonest there. `State.outcomes` goes through all of them. `all_cuts` does this
for all moments of a log.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.powercut.writelog import CHANGES, ENDS, Kind, Record, WriteLog, change

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["SECTOR", "Cut", "State", "all_cuts", "cut", "digest", "nb_stretches", "state_at"]

SECTOR = 512
WHOLE = NEVER = 1 << 62
TEARS = (WHOLE, 4096, SECTOR)
CHANCES = (0.1, 0.5, 0.9)

# So many outcomes of a moment are gone through one after the other; of more some are drawn, and of
# those of so many sectors in any case.
ENUMERATED = 256
MOST_SECTORS = 4096
# What is drawn of a stretch is drawn of so many of its moments, and of its last.
MOMENTS = 4
# So many more are drawn than are wanted, as some will be nothing new.
FRUITLESS = 20

Images = tuple[bytes, ...]


class Change(NamedTuple):
    """A request that is not in the base. certain: it is durable, but there is one before it in the
    same file that is not."""

    record: Record
    certain: bool


class Cut(NamedTuple):
    """The power was cut at a moment and left these contents of the files."""

    moment: int
    images: Images


class Sector(NamedTuple):
    """What a sector may hold; shorter than others where the file then ends."""

    file: int
    offset: int
    content: bytes


class State:
    """What is certain and what is not, at one moment."""

    def __init__(self, base: Images, changes: Sequence[Change]) -> None:
        self.base = base
        self.changes = changes
        self._uncertain = [
            number for number, (_, certain) in enumerate(changes) if not certain
        ]

    def sample(self, chooser: random.Random) -> Images:
        """One outcome."""
        uncertain = self._uncertain
        if not uncertain:
            return self._apply({}, WHOLE, chooser)
        tear = chooser.choice(TEARS)
        style = chooser.random()
        if style < 0.6:
            chance = chooser.choice(CHANCES)
            return self._apply(dict.fromkeys(uncertain, chance), tear, chooser)
        chosen = chooser.choice(uncertain)
        few = style < 0.8  # all but one are lost, or all but one kept
        chances = dict.fromkeys(uncertain, 0.0 if few else 1.0)
        chances[chosen] = (1.0 if few else 0.0) if tear == WHOLE else 0.5
        return self._apply(chances, tear, chooser)

    def nothing_kept(self) -> Images:
        """The outcome in which all that is not durable is lost."""
        return self._apply(dict.fromkeys(self._uncertain, 0.0), WHOLE, random.Random(0))

    def all_kept(self) -> Images:
        """The outcome in which nothing is lost."""
        return self._apply({}, WHOLE, random.Random(0))

    def _apply(
        self, chances: dict[int, float], tear: int, chooser: random.Random
    ) -> Images:
        """`chances`: of each piece of a change to be kept; those not listed are whole."""
        files = [bytearray(content) for content in self.base]
        for number, (record, _) in enumerate(self.changes):
            chance = chances.get(number, 1.0)
            content = files[record.file]
            if chance >= 1.0:
                change(content, record)
            elif chance > 0.0:
                for start, stop in pieces(record, tear):
                    if chooser.random() < chance:
                        change(content, record, start, stop)
        return tuple(map(bytes, files))

    def nb_sectors(self) -> int:
        """How many sectors the requests touch that may be there or not, each of them by itself."""
        return sum(_nb_sectors(self.changes[number].record) for number in self._uncertain)

    def sectors(self) -> list[list[Sector]]:
        """All sectors that are not in the base, and what each of them may hold."""
        touching: dict[tuple[int, int], list[tuple[Change, int, int]]] = defaultdict(list)
        for each in self.changes:
            record = each.record
            for start, stop in pieces(record, SECTOR):
                place = record.file, (record.offset + start) // SECTOR * SECTOR
                touching[place].append((each, start, stop))
        return [
            [
                Sector(file, offset, content)
                for content in _contents(self.base[file][offset : offset + SECTOR], offset, found)
            ]
            for (file, offset), found in touching.items()
        ]

    def outcomes(self, sectors: list[list[Sector]] | None = None) -> Iterator[Images]:
        """All outcomes; the first is that nothing is kept. Their number is that of the alternatives
        of all sectors multiplied. Each comes once, or more often if it is only in where the file
        might have ended, had not more been kept, that they differ."""
        for choice in itertools.product(*(self.sectors() if sectors is None else sectors)):
            files = [bytearray(content) for content in self.base]
            for file, offset, content in choice:
                if content:
                    missing = offset - len(files[file])
                    files[file].extend(bytes(max(missing, 0)))
                    files[file][offset : offset + len(content)] = content
            yield tuple(map(bytes, files))


def pieces(record: Record, tear: int) -> Iterator[tuple[int, int]]:
    """(start, stop) within a request, split where its offset is a multiple of `tear`."""
    start = 0
    while start < record.length:
        stop = min(record.length, start + tear - (record.offset + start) % tear)
        yield start, stop
        start = stop


def _nb_sectors(record: Record) -> int:
    first, end = record.offset // SECTOR, record.offset + record.length
    return -(-end // SECTOR) - first


def _contents(base: bytes, low: int, found: list[tuple[Change, int, int]]) -> list[bytes]:
    """What changes may make of a sector at `low`, in order, each kept or lost."""
    contents = {base: None}
    for (record, certain), start, stop in found:
        here = record._replace(offset=record.offset - low)
        done: dict[bytes, None] = {}
        for content in contents:
            changed = bytearray(content)
            change(changed, here, start, stop)
            done[bytes(changed)] = None
        contents = done if certain else contents | done
    return list(contents)


def state_at(log: WriteLog, moment: int, *, power: bool = True) -> State:
    """What is certain and what is not if the power goes at a moment of the log.

    Not `power`: the process that wrote is killed, and nothing else. Then all that had returned is
    certain; what had not may be there in part, as a system call that is killed may leave it.
    """
    records = log.records[:moment]
    ended = {record.number: at for at, record in enumerate(records) if record.kind in ENDS}
    durable = {record.number for record in records if record.kind is Kind.DURABLE}
    covered = [0] * len(log.initial)  # by file: what returned before this is durable
    for record in records:
        if record.kind is Kind.FLUSH and record.number in ended:
            covered[record.file] = max(covered[record.file], record.number)
    base = [bytearray(content) for content in log.initial]
    changes: list[Change] = []
    uncertain: set[int] = set()  # files with changes that are not
    for record in records:
        if record.kind not in CHANGES:
            continue
        file = record.file
        number = record.number
        limit = covered[file] if power else NEVER
        certain = number in durable or ended.get(number, NEVER) < limit
        if certain and file not in uncertain:
            change(base[file], record)
        else:
            uncertain.add(file)
            changes.append(Change(record, certain))
    return State(tuple(map(bytes, base)), changes)


def cut(log: WriteLog, moment: int, seed: int) -> Images:
    """The files as the disk would hold them after a power cut at a moment. The same for the same
    arguments."""
    return state_at(log, moment).sample(random.Random(f"{seed}/{moment}"))


def all_cuts(log: WriteLog, limit: int, *, seed: int = 0) -> Iterator[Cut]:
    """Distinct outcomes of cuts at all moments of a log, at most `limit` of them, evenly.

    Outcomes are distinct if the files differ, or the marks made until then. What may be on the disk
    only grows until a flush or a write with FUA returns: so what ends with the same record has all
    its outcomes right before that one. Where these are few all of them come; where they are not,
    some are drawn, of the moments in between, too. That a log has no more is believed when a turn
    through all of it has found nothing new.
    """
    seen: set[tuple[bytes, int]] = set()
    spans = list(_spans(log))
    if limit < len(spans):
        spans = random.Random(seed).sample(spans, limit)
    for turn in itertools.count():
        before = len(seen)
        for number, span in reversed(list(enumerate(spans))):
            marks, first, last = span
            quota = left = -(-(limit - len(seen)) // (number + 1))
            for found in _draw(log, first, last, quota, random.Random(f"{seed}/{turn}/{last}")):
                key = digest(found.images), marks
                if key in seen:
                    continue
                seen.add(key)
                yield found
                left -= 1
                if len(seen) == limit:
                    return
                if not left:
                    break
            if left == quota:
                del spans[number]
        if len(seen) == before:
            return


def nb_stretches(log: WriteLog) -> int:
    """With so many cuts `all_cuts` comes to every flush, durable write and mark of the log."""
    return sum(1 for _ in _spans(log))


def _spans(log: WriteLog) -> Iterator[tuple[int, int, int]]:
    """(marks made before, first moment, last moment) of each stretch in which nothing becomes
    certain and no mark is made."""
    marks = first = 0
    for moment, record in enumerate(log.records):
        marking = record.kind is Kind.MARK
        ending = record.kind is Kind.END and log.records[record.number].kind is Kind.FLUSH
        if marking or ending or record.kind is Kind.DURABLE:
            yield marks, first, moment
            marks += marking
            first = moment + 1
    yield marks, first, len(log)


def _draw(
    log: WriteLog, first: int, last: int, wanted: int, chooser: random.Random
) -> Iterator[Cut]:
    state = state_at(log, last)
    if state.nb_sectors() <= MOST_SECTORS:
        sectors = state.sectors()
        if math.prod(map(len, sectors)) <= ENUMERATED:
            for images in state.outcomes(sectors):
                yield Cut(last, images)
            return
    yield Cut(last, state.nothing_kept())
    yield Cut(last, state.all_kept())
    earlier = chooser.sample(range(first, last), min(MOMENTS, last - first))
    states = [(last, state), *((moment, state_at(log, moment)) for moment in earlier)]
    for _ in range(wanted + FRUITLESS):
        moment, state = chooser.choice(states)
        yield Cut(moment, state.sample(chooser))


def digest(images: Images) -> bytes:
    """Tells contents apart: 16 bytes. (SHA-256 because processors have it.)"""
    found = sha256()
    for content in images:
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.digest()[:16]

"""What the disk may hold after a power cut: pure functions of a write log, a moment and a seed.

The law is that of a disk with a volatile cache, or of a page cache. If the power goes at a moment,
what is durable (disk.py) is there. Of every other request that had begun each sector of 512 bytes
is there or is not, independently: so a request may be kept, lost or torn, and those of several
requests come in any order.

Where requests overlap the log says which came last; of a sector the disk has what some of them left
of it in that order, the durable ones never missing. Losing all but some of the requests is the same
as doing these first, so this is every order that flushes allow.

`state_at` splits what has happened at a moment into what is certain (`base`, and the changes that
are `certain`) and what is not. `State.outcome` gives each number, a seed, an outcome: where there
are few, these are all of them; else all is lost, all is kept, then by turns, so that what is
missing shows soon: one request is lost, one kept, all kept up to one, or each request or piece of
one by chance. `State.sample` draws one by chance alone. `all_cuts` does this for all moments of a
log. A moment and a seed say all of an outcome: `cut` gives it again.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.powercut.content import Content
from nbdserve.powercut.disk import Disk
from nbdserve.powercut.records import Kind, Record, change

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nbdserve.powercut.writelog import WriteLog

__all__ = [
    "SECTOR",
    "Cut",
    "State",
    "States",
    "all_cuts",
    "cut",
    "digest",
    "nb_stretches",
    "state_at",
]

SECTOR = 512
WHOLE = 1 << 62
TEARS = (WHOLE, 4096, SECTOR)
CHANCES = (0.1, 0.5, 0.9)

# So many outcomes of a moment are gone through one after the other; of more some are drawn, and of
# those of so many sectors in any case.
ENUMERATED = 256
MOST_SECTORS = 512
# A request is torn into so many pieces at most, which are larger then.
MOST_PIECES = 1024
# So many fruitless seeds one after the other, and a moment is believed to have no more outcomes.
FRUITLESS = 20
# How much of a log lies between two disks that are remembered, to find any moment's state soon.
CHECKPOINT = 512
# So many states are remembered.
REMEMBERED = 64
# So far apart are the seeds with which two searches of different seeds begin.
SEEDS = 1 << 20

Images = tuple[Content, ...]


class Change(NamedTuple):
    """A request that is not in the base. certain: it is durable, but there is one before it at the
    same place that is not."""

    record: Record
    certain: bool


class Cut(NamedTuple):
    """The power was cut at a moment, and the seed says what was lost: these contents are left."""

    moment: int
    images: Images
    seed: int


class Sector(NamedTuple):
    """What a sector may hold; shorter than others where the file then ends."""

    file: int
    offset: int
    content: bytes


class State:
    """What is certain and what is not, at one moment. What it gives away may be changed."""

    def __init__(self, base: Sequence[Content], changes: Sequence[Change], moment: int = 0) -> None:
        self.base = tuple(base)
        self.changes = changes
        self._moment = moment
        self._uncertain = [
            number for number, (_, certain) in enumerate(changes) if not certain
        ]
        self._orders: dict[int, list[int]] = {}

    # --- by a number ---------------------------------------------------------------------------

    def outcome(self, seed: int) -> Images:
        """The outcome of a number from 0 on. 0: nothing is kept; 1: everything is."""
        order = self._order
        if order is not None:
            return self._of_alternatives(order[seed % len(order)])
        if seed < 2:
            return self.all_kept() if seed else self.nothing_kept()
        search, step = divmod(seed, SEEDS)
        turn, style = divmod(max(step, 2) - 2, len(STYLES))
        if turn >= len(self._uncertain):
            return self.sample(random.Random(f"{seed}/{self._moment}"))
        return STYLES[style](self, self._shuffled(search)[turn], seed)

    @property
    def nb_outcomes(self) -> int | None:
        """How many there are; None: many."""
        return None if self._order is None else len(self._order)

    @cached_property
    def _order(self) -> list[int] | None:
        """All outcomes by their numbers among the alternatives, the worst and the best first; None
        if they are many."""
        if self.nb_sectors() > MOST_SECTORS:
            return None
        total = math.prod(map(len, self._alternatives))
        if total > ENUMERATED:
            return None
        between = list(range(1, total - 1))
        random.Random(self._moment).shuffle(between)
        return [*dict.fromkeys((0, total - 1)), *between]

    @cached_property
    def _alternatives(self) -> list[list[Sector]]:
        return self.sectors()

    def _shuffled(self, search: int) -> list[int]:
        """The uncertain changes, in an order of no meaning, another for each search."""
        if search not in self._orders:
            chooser = random.Random(f"{search}/{self._moment}")
            self._orders[search] = chooser.sample(self._uncertain, len(self._uncertain))
        return self._orders[search]

    def _of_alternatives(self, number: int) -> Images:
        choice = []
        for alternatives in reversed(self._alternatives):
            number, which = divmod(number, len(alternatives))
            choice.append(alternatives[which])
        return self._with(choice)

    def _one_lost(self, chosen: int, seed: int) -> Images:
        lost = self.changes[chosen].record
        files = [content.copy() for content in self._everything]
        content, base = files[lost.file], self.base[lost.file]
        if lost.offset + lost.length >= content.size:  # the file may end sooner without it
            return self._apply({chosen: 0.0}, WHOLE, random.Random(0))
        content.take(base, lost.offset, lost.length)
        for number, (record, _) in enumerate(self.changes):
            if number != chosen and record.file == lost.file:
                start = max(0, lost.offset - record.offset)
                stop = min(record.length, lost.offset + lost.length - record.offset)
                if start < stop:
                    change(content, record, start, stop)
        return tuple(files)

    @cached_property
    def _everything(self) -> Images:
        return self.all_kept()

    def _one_kept(self, chosen: int, seed: int) -> Images:
        files = self._files()
        for number in sorted([*self._blocked, chosen]):
            record = self.changes[number].record
            change(files[record.file], record)
        return tuple(files)

    @cached_property
    def _blocked(self) -> list[int]:
        """The changes that are certain, and not in the base."""
        return [number for number, (_, certain) in enumerate(self.changes) if certain]

    def _kept_up_to(self, chosen: int, seed: int) -> Images:
        """What began before one request is kept, what began later lost, and the one torn."""
        chances = {number: 0.0 for number in self._uncertain if number > chosen} | {chosen: 0.5}
        return self._apply(chances, SECTOR, random.Random(f"{seed}/{self._moment}"))

    def _by_chance(self, chosen: int, seed: int) -> Images:
        return self.sample(random.Random(f"{seed}/{self._moment}"))

    # --- by chance -----------------------------------------------------------------------------

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
        files = self._files()
        for number, (record, _) in enumerate(self.changes):
            chance = chances.get(number, 1.0)
            content = files[record.file]
            if chance >= 1.0:
                change(content, record)
            elif chance > 0.0:
                for start, stop in pieces(record, tear):
                    if chooser.random() < chance:
                        change(content, record, start, stop)
        return tuple(files)

    def _files(self) -> list[Content]:
        return [content.copy() for content in self.base]

    # --- all of them ---------------------------------------------------------------------------

    def nb_sectors(self) -> int:
        """How many sectors the requests touch that may be there or not, each of them by itself."""
        return sum(_nb_sectors(self.changes[number].record) for number in self._uncertain)

    def sectors(self) -> list[list[Sector]]:
        """All sectors that are not in the base, and what each of them may hold."""
        touching: dict[tuple[int, int], list[tuple[Change, int, int]]] = defaultdict(list)
        for each in self.changes:
            record = each.record
            for start, stop in _split(record, SECTOR):
                place = record.file, (record.offset + start) // SECTOR * SECTOR
                touching[place].append((each, start, stop))
        found = []
        for (file, offset), touched in touching.items():
            base = self.base[file]
            held = base.read(offset, min(SECTOR, max(0, base.size - offset)))
            contents = _contents(held, offset, touched)
            found.append([Sector(file, offset, content) for content in contents])
        return found

    def outcomes(self) -> Iterator[Images]:
        """All outcomes; the first is that nothing is kept. Their number is that of the alternatives
        of all sectors multiplied. Each comes once, or more often if it is only in where the file
        might have ended, had not more been kept, that they differ."""
        for choice in itertools.product(*self.sectors()):
            yield self._with(choice)

    def _with(self, choice: Sequence[Sector]) -> Images:
        files = self._files()
        for file, offset, content in choice:
            files[file].write(offset, content)
        return tuple(files)


STYLES = (State._one_lost, State._by_chance, State._one_kept, State._kept_up_to, State._by_chance)
"""What comes by turns, each for every request if there is time."""


def pieces(record: Record, tear: int) -> Iterator[tuple[int, int]]:
    """(start, stop) within a request, split where its offset is a multiple of `tear`, or of more,
    as the pieces of a long one are larger."""
    while record.length > MOST_PIECES * tear:
        tear *= 2
    return _split(record, tear)


def _split(record: Record, tear: int) -> Iterator[tuple[int, int]]:
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
    """What is certain and what is not if the power goes at a moment of the log. Raises ValueError:
    it has no such moment.

    Not `power`: the process that wrote is killed, and nothing else. Then all that had returned is
    certain; what had not may be there in part, as a system call that is killed may leave it.
    """
    disk = Disk(log.initial)
    disk.do(log.until(moment))
    if not power:
        disk.process_dies()
    return _state(disk, moment)


def _state(disk: Disk, moment: int) -> State:
    disk.settle()
    changes = [Change(record, disk.is_durable(number)) for number, record in disk.pending.items()]
    return State(disk.base, changes, moment)


def cut(log: WriteLog, moment: int, seed: int) -> Images:
    """The files as the disk would hold them after a power cut at a moment. The same for the same
    arguments. Raises ValueError, as `state_at`."""
    return state_at(log, moment).outcome(seed)


class States:
    """The states of a log's moments until `now`, sooner than one by one from the start."""

    def __init__(self, log: WriteLog) -> None:
        self.now = len(log)
        self._first = log.first_moment
        self._records = log.until(self.now)
        self._missing = len(log) - len(self._records)  # what the log has forgotten
        self._disks = [Disk(log.initial)]
        self._states: dict[int, State] = {}

    def at(self, moment: int) -> State:
        """That of a moment. Raises ValueError: the log has no such moment."""
        if not self._first <= moment <= self.now:
            raise ValueError(f"moment {moment}: the write log has {self._first} to {self.now}")
        if moment not in self._states:
            while len(self._states) >= REMEMBERED:
                del self._states[next(iter(self._states))]
            self._states[moment] = _state(self._disk_at(moment - self._missing), moment)
        return self._states[moment]

    def _disk_at(self, count: int) -> Disk:
        before = count // CHECKPOINT
        while len(self._disks) <= before:
            disk = self._disks[-1].copy()
            start = (len(self._disks) - 1) * CHECKPOINT
            disk.do(self._records[start : start + CHECKPOINT])
            self._disks.append(disk)
        disk = self._disks[before].copy()
        disk.do(self._records[before * CHECKPOINT : count])
        return disk


def all_cuts(log: WriteLog, limit: int, *, seed: int = 0) -> Iterator[Cut]:
    """Distinct outcomes of cuts at all moments of a log, at most `limit` of them, evenly.

    Outcomes are distinct if the files differ, or the marks made until then. What may be on the disk
    only grows until a flush or a write with FUA returns: so what ends with the same record has all
    its outcomes right before that one. It goes through these moments in turns, in an order of no
    meaning, for one outcome of each, two more, four, and so on: whoever stops early has seen
    something of all. Where the outcomes of a moment are few all of them come. That it has no more
    is believed when so many seeds have brought nothing new. `seed`: where there are more moments
    than cuts, which of them; their order; and with which of many outcomes each begins.

    A log that forgets has one moment, the present.
    """
    seen: set[tuple[bytes, int]] = set()
    spans = list(_spans(log))
    spans = random.Random(seed).sample(spans, max(0, min(limit, len(spans))))
    states = States(log)
    seeds = {last: itertools.count(seed * SEEDS) for _, last in spans}
    share = 1
    while spans:
        share = min(share, -(-(limit - len(seen)) // len(spans)))
        for span in list(spans):
            marks, last = span
            left = share
            for found in _draw(states.at(last), last, seeds[last]):
                key = digest(found.images), marks
                if key in seen:
                    continue
                seen.add(key)
                yield found
                if len(seen) == limit:
                    return
                left -= 1
                if not left:
                    break
            else:
                spans.remove(span)
        share *= 2


def _draw(state: State, moment: int, seeds: Iterator[int]) -> Iterator[Cut]:
    """Outcomes until there seem to be no more. It may be asked to go on later."""
    total = state.nb_outcomes
    if total is not None:
        seeds = itertools.islice(seeds, total)
    fruitless, seen = 0, set()
    for seed in seeds:
        images = state.outcome(seed)
        key = digest(images)
        fruitless = fruitless + 1 if key in seen else 0
        if fruitless > FRUITLESS:
            return
        seen.add(key)
        yield Cut(moment, images, seed)


def nb_stretches(log: WriteLog) -> int:
    """With so many cuts `all_cuts` comes to every flush, durable write and mark of the log."""
    return sum(1 for _ in _spans(log))


def _spans(log: WriteLog) -> Iterator[tuple[int, int]]:
    """(marks made before, last moment) of each stretch in which nothing becomes certain and no
    mark is made."""
    marks = 0
    if log.history:
        start = len(log) - len(log.records)
        for moment, record in enumerate(log.records, start=start):
            if record.kind in ENDING:
                yield marks, moment
                marks += record.kind is Kind.MARK
    yield marks, len(log)


ENDING = {Kind.MARK, Kind.FLUSHED, Kind.DURABLE}


def digest(images: Images) -> bytes:
    """Tells contents apart: 16 bytes. (SHA-256 because processors have it.)"""
    return sha256(b"".join(content.digest() for content in images)).digest()[:16]

"""Which requests meet a fault, and what it then does to them: decisions, and nothing else.

There is no clock, no task and no I/O here, but for the look whether an `if_file` exists.

Rules see each request in the order in which requests come and each counts for itself those that it
matches. All that is random is a function of the node's seed, the rule's number and how many the
rule has matched: drawn from a hash of these three, not from a generator that others draw from too.
So the same requests in the same order meet the same faults, whatever time passes between them,
whatever other rules there are and however Python's `random` changes. Bits that are flipped depend
on where the read is instead of how many there were, as they do on a medium that has rotted.

The effects of all rules that fire add up, in the order of the rules. The first that says what
becomes of the request (Fault.ends) is the last: those after it match, and do nothing.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.faults import RANDOM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from nbdserve.faults import Fault

__all__ = ["SECTOR", "Hit", "Injector", "Rule", "flip_bits", "pieces_done"]

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""


class Rule:
    """A fault of an injector. `matched`: how many requests had all its triggers but `after`,
    `count` and `probability`; `injected`: to how many it was done. `file`: the path of `if_file`,
    from now on wherever the process goes."""

    def __init__(self, fault: Fault, number: int) -> None:
        self.fault = fault
        self.number = number
        self.file = None if fault.if_file is None else os.path.abspath(fault.if_file)
        self.matched = 0
        self.injected = 0

    @property
    def is_used_up(self) -> bool:
        """Whether nothing will meet it any more."""
        return self.fault.count is not None and self.injected >= self.fault.count


class Hit(NamedTuple):
    """A request meets a rule, as its `match`th."""

    rule: Rule
    match: int
    seed: int

    @property
    def fault(self) -> Fault:
        return self.rule.fault

    def draw(self, purpose: str, nb_bytes: int) -> bytes:
        """Random bytes; each purpose has its own."""
        return _draw(self.seed, self.rule.number, self.match, purpose, nb_bytes)

    def seconds(self) -> float:
        """How long the request is held up."""
        return self.fault.delay + self.fault.jitter * _fraction(self.draw("jitter", 8))


class Injector:
    """Rules by the order in which they were added. `exists`: whether there is a file."""

    def __init__(self, seed: int, exists: Callable[[str], bool] = os.path.exists) -> None:
        self.seed = seed
        self.rules: list[Rule] = []
        self._exists = exists
        self._added = 0

    def add(self, fault: Fault) -> Rule:
        """A new rule, behind all others. No number is given twice."""
        rule = Rule(fault, self._added)
        self._added += 1
        self.rules.append(rule)
        return rule

    def decide(self, op: str, offset: int, length: int) -> list[Hit]:
        """What a request meets."""
        hits: list[Hit] = []
        is_decided = False
        for rule in self.rules:
            hit = self._matched(rule, op, offset, length)
            if hit is not None and not is_decided:
                rule.injected += 1
                hits.append(hit)
                is_decided = rule.fault.ends
        return hits

    def _matched(self, rule: Rule, op: str, offset: int, length: int) -> Hit | None:
        fault = rule.fault
        if not fault.concerns(op, offset, length):
            return None
        if rule.file is not None and not self._exists(rule.file):
            return None
        rule.matched += 1
        hit = Hit(rule, rule.matched, self.seed)
        if rule.matched <= fault.after or rule.is_used_up:
            return None
        if fault.probability < 1 and _fraction(hit.draw("probability", 8)) >= fault.probability:
            return None
        return hit


def pieces_done(hit: Hit, offset: int, length: int) -> list[tuple[int, int]]:
    """(offset, length) of what a write that meets `short`, `torn` or `lost` does all the same."""
    if hit.fault.lost:
        return []
    first, last = offset // SECTOR, (offset + length - 1) // SECTOR
    kept = _kept_sectors(hit, last - first + 1)
    return [
        (max(offset, start), min(offset + length, end) - max(offset, start))
        for start, end in _runs(first + sector for sector in kept)
    ]


def _kept_sectors(hit: Hit, total: int) -> Iterable[int]:
    """Those of a write's `total` sectors that are written; never all of them."""
    short = hit.fault.short
    if short == RANDOM:
        return range(_number(hit.draw("short", 8)) % total)
    if isinstance(short, int):
        return range(min(short, total - 1))
    drawn = hit.draw("torn", -(-total // 8))
    kept = [sector for sector in range(total) if drawn[sector // 8] >> sector % 8 & 1]
    if len(kept) == total:
        del kept[_number(hit.draw("missing", 8)) % total]
    return kept


def _runs(sectors: Iterable[int]) -> list[tuple[int, int]]:
    """(start, end) in bytes of sectors in rising order, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for sector in sectors:
        start = sector * SECTOR
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, sector * SECTOR + SECTOR))
    return runs


def flip_bits(hit: Hit, offset: int, buffer: memoryview) -> list[int]:
    """Turn over bits of what a read at `offset` returns; their places in the disk, in bits.

    They lie in what the read and the fault's range have in common, and depend on nothing else: a
    read of the same bytes, or any that covers the whole range, meets the same.
    """
    start, end = hit.fault.overlap(offset, len(buffer))
    wanted = min(hit.fault.flip_bits, (end - start) * 8)
    chosen = _sample((hit.seed, hit.rule.number, start, end), (end - start) * 8, wanted)
    for bit in chosen:
        buffer[start - offset + bit // 8] ^= 1 << bit % 8
    return [start * 8 + bit for bit in chosen]


def _sample(key: tuple[int, int, int, int], total: int, wanted: int) -> list[int]:
    """So many different numbers below `total` (Floyd's algorithm)."""
    drawn = _draw(*key[:3], f"bits up to {key[3]}", 8 * wanted)
    chosen: set[int] = set()
    for turn, last in enumerate(range(total - wanted, total)):
        number = _number(drawn[8 * turn : 8 * turn + 8]) % (last + 1)
        chosen.add(last if number in chosen else number)
    return sorted(chosen)


def _draw(seed: int, rule: int, position: int, purpose: str, nb_bytes: int) -> bytes:
    return hashlib.shake_128(f"{seed} {rule} {position} {purpose}".encode()).digest(nb_bytes)


def _number(drawn: bytes) -> int:
    return int.from_bytes(drawn, "big")


def _fraction(drawn: bytes) -> float:
    """At least 0, below 1."""
    return (_number(drawn) >> 11) / (1 << 53)

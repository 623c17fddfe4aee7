"""A file in memory that fails where a plan says: `Faults` counts the operations of all files of an
image, `FaultyFile` is one of them.

A fault fails one operation, or all from one on until `lift`. `FULL` is another kind: from one
operation on the file system has no room left. Then only writes into blocks that were never written,
or that were discarded, fail, and what a discard frees may be used again.

A leaf of its own, although there is a filter that makes requests fail (filters/fault.py): half of
the ways to a file are synchronous or by submission, and a filter closes them. filtered.py does the
same trials with the filter, where what is left can fail.
"""

from __future__ import annotations

import enum
import os
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EROFS
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.powercut.writelog import Kind
from qcow2_model import MemoryFile

if TYPE_CHECKING:
    from nbdserve.block.node import Node
    from qcow2_model import Buffer

__all__ = ["FAULTS", "FULL", "Fault", "Faults", "FaultyFile", "Plan", "Until"]

BLOCK = 512
WORD = 8  # a short write ends between blocks of the file system: never within an entry of a table

WRITES = frozenset({"write", "zeroes"})
CHANGES = WRITES | {"discard"}
SYNCS = frozenset({"flush"})
READS = frozenset({"read"})


class Fault(NamedTuple):
    """What operations of some kinds fail with, and the share of their bytes that takes effect."""

    name: str
    errno: int
    kinds: frozenset[str]
    share: float = 0


FAULTS = (
    Fault("ENOSPC", ENOSPC, WRITES | SYNCS),
    Fault("EDQUOT", EDQUOT, WRITES | SYNCS),
    Fault("EFBIG", EFBIG, WRITES),
    Fault("EIO", EIO, CHANGES | SYNCS | READS | {"status"}),
    Fault("EROFS", EROFS, CHANGES),
    Fault("short write, then ENOSPC", ENOSPC, WRITES, 0.5),
    Fault("short write, then EIO", EIO, WRITES, 0.99),
    Fault("short read, then EIO", EIO, READS, 0.5),
)

FULL = Fault("no room", ENOSPC, WRITES)


class Until(enum.Enum):
    """How long a fault lasts: one operation; until the program is at its end; or for good."""

    ONCE = enum.auto()
    LIFTED = enum.auto()
    NEVER = enum.auto()


class Plan(NamedTuple):
    """Fail operation `number`, the first being 1, and perhaps all after it that a fault is of."""

    fault: Fault
    number: int
    until: Until = Until.ONCE


class Faults:
    """`kinds`: of all operations so far; `injected`: how many failed; `failed_sync`: one of these
    was a sync. While `paused`, nothing is counted and nothing fails."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.kinds: list[str] = []
        self.injected = 0
        self.failed_sync = False
        self.paused = False
        self._plan = plan

    @property
    def of_files(self) -> Faults:
        """What the files themselves do."""
        return self

    def over(self, file: FaultyFile) -> Node:
        """What the format uses as its file."""
        return file

    def lift(self) -> None:
        """Nothing fails any more, if that may happen."""
        if self._plan is not None and self._plan.until is Until.LIFTED:
            self._plan = None

    def hit(self, kind: str, missing: int) -> Fault | None:
        """One more operation; what it fails with, if it does. `missing`: blocks without room."""
        if self.paused:
            return None
        self.kinds.append(kind)
        plan, number = self._plan, len(self.kinds)
        if plan is None or kind not in plan.fault.kinds or number < plan.number:
            return None
        if plan.fault is FULL:
            if not missing:
                return None
        elif number > plan.number and plan.until is Until.ONCE:
            return None
        self.injected += 1
        self.failed_sync |= kind == "flush"
        return plan.fault

    @property
    def full(self) -> bool:
        """Whether there is no more room than what discards give back."""
        plan = self._plan
        return plan is not None and plan.fault is FULL and len(self.kinds) + 1 >= plan.number


class FaultyFile(MemoryFile):
    """One of the files that `faults` are about."""

    def __init__(
        self, content: bytes, faults: Faults, *, patience: int = 0, beside: MemoryFile | None = None
    ) -> None:
        super().__init__(content, patience=patience, beside=beside)
        self.faults = faults
        self._room = 0  # blocks that discards have given back since the file system is full
        self._blocks = set(range(-(-len(content) // BLOCK)))

    def _may_fail(self, kind: str, offset: int, data: Buffer = b"") -> None:
        blocks = set(range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)))
        full = self.faults.full
        new = blocks - self._blocks if kind in WRITES else set()
        fault = self.faults.hit(kind, max(0, len(new) - self._room) if full else 0)
        if fault is None:
            if kind in WRITES:
                self._blocks |= new
                self._room -= len(new) if full else 0
            elif kind == "discard":
                self._give_back(offset, len(data), full=full)
            return
        part = memoryview(data)[: int(len(data) * fault.share) // WORD * WORD]
        if kind == "read":
            self._get(offset, part)
        elif part:
            self._do(Kind.WRITE, offset, bytes(part))  # begun, and never completed
            self._blocks |= set(range(offset // BLOCK, -(-(offset + len(part)) // BLOCK)))
        raise OSError(fault.errno, os.strerror(fault.errno))

    def _give_back(self, offset: int, length: int, *, full: bool) -> None:
        whole = set(range(-(-offset // BLOCK), (offset + length) // BLOCK)) & self._blocks
        self._blocks -= whole
        self._room += len(whole) if full else 0

"""The faults of the product (filters/fault.py) in the place of those of the files: a fault node
stands between a format and each of its files.

What a trial plans, by the number of an operation among all, is a rule of each node here, by the
number among those that it is about; so it is met earlier or later, and by several files.
"""

from __future__ import annotations

from errno import errorcode
from typing import TYPE_CHECKING

from faults.faulty import Faults, Plan, Until
from nbdserve.faults import Fault
from nbdserve.filters.fault import FaultNode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faults.faulty import FaultyFile
    from nbdserve.filters.injector import Rule

__all__ = ["TORN", "FilterFaults"]

OPS = {
    "read": "read",
    "write": "write",
    "zeroes": "write-zeroes",
    "discard": "discard",
    "flush": "flush",
    "status": "block-status",
}

TORN = 0.51
"""The share of a fault that says: any sectors, and not the first."""


class FilterFaults:
    """In the place of Faults, done by fault nodes. A share of the bytes is a number of sectors."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.kinds: list[str] = []  # nobody counts what does not fail
        self.of_files = Faults()
        self._plan = plan
        self._nodes: list[tuple[FaultNode, list[Rule]]] = []
        self._paused = False

    def over(self, file: FaultyFile) -> FaultNode:
        """A node of the plan's faults."""
        node = FaultNode(file, seed=len(self._nodes))
        if self._plan is not None:
            node.faults.add(rule_of(self._plan))
        self._nodes.append((node, node.faults._injector.rules))
        self.paused = self._paused
        return node

    def _rules(self) -> Iterator[Rule]:
        for _, rules in self._nodes:
            yield from rules

    @property
    def injected(self) -> int:
        """How many operations failed."""
        return sum(rule.injected for rule in self._rules())

    @property
    def failed_sync(self) -> bool:
        """Whether one of these may have been a sync."""
        return any(rule.injected and "flush" in rule.fault.ops for rule in self._rules())

    @property
    def paused(self) -> bool:
        """Nothing is counted, and nothing fails."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        for node, rules in self._nodes:
            node.faults._injector.rules = [] if paused or self._plan is None else rules

    def lift(self) -> None:
        """Nothing fails any more, if that may happen."""
        if self._plan is not None and self._plan.until is Until.LIFTED:
            self._plan = None
            self.paused = self._paused


def rule_of(plan: Plan) -> Fault:
    """The fault that does what a plan says."""
    fault = plan.fault
    name = errorcode[fault.errno]
    after, count = plan.number - 1, 1 if plan.until is Until.ONCE else None
    if fault.share == TORN:
        return Fault(torn=True, error=name, after=after, count=count)
    if fault.share and "write" in fault.kinds:
        return Fault(short="random", error=name, after=after, count=count)
    ops = {OPS[kind] for kind in fault.kinds}
    return Fault(ops=ops, error=name, after=after, count=count)

"""The crash tests find what they are there to find: bugs, planted one at a time.

The table says which plans find a bug, what is seen then, and within how many crash states: about
four times as many as it took when the bug was planted here first. Without a bug the same plans are
harmless, which test_cuts.py and `make crash` show.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import pytest

from crash import planted
from crash.plans import (
    draw_plan,
    fua_plan,
    growth_plan,
    race_plan,
    reuse_plan,
    zero_overwrite_plan,
)
from crash.planted import at_stage
from crash.promises import Judge
from crash.record import record
from crash.search import crashes
from nbdserve.formats.qcow2.ordering import WRITE_ORDER, What

if TYPE_CHECKING:
    from collections.abc import Callable

    from crash.plans import Plan
    from crash.planted import Plant


class Bug(NamedTuple):
    """`rule`: the row of WRITE_ORDER that it breaks. `sees`: a regular expression."""

    plant: Plant
    plans: Callable[[str], Plan]
    sees: str
    within: int
    rule: tuple[What, What] | None = None


def writeback_plan(name: str) -> Plan:
    return draw_plan(name, mode="writeback")


CRASHES = 60  # of each plan
DATA = "neither what was durable nor what was written later"
LOOKS_FREE = r"\(guest cluster \d+\) has refcount 0"
NO_BLOCK = r"\(refcount block \d+\) has refcount 0"

BUGS = [
    Bug(at_stage(What.REFCOUNT, 2), writeback_plan, LOOKS_FREE, 100,
        (What.REFCOUNT, What.L2_ENTRY)),
    Bug(planted.no_flush_for_data, zero_overwrite_plan, DATA, 100, (What.DATA, What.L2_ENTRY)),
    Bug(planted.no_flush_of_the_data_file, zero_overwrite_plan, DATA, 600,
        (What.DATA, What.L2_ENTRY)),
    Bug(planted.lower_at_once, race_plan, LOOKS_FREE, 100,
        (What.L2_ENTRY, What.LOWERED_REFCOUNT)),
    Bug(planted.new_l2_table_at_stage_2, writeback_plan, r"L2 table \d+ at \w+ is past the end",
        200, (What.NEW_L2_TABLE, What.L1_ENTRY)),
    Bug(at_stage(What.L1_ENTRY, 1), writeback_plan, r"\(L2 table \d+\) has refcount 0", 100,
        (What.REFCOUNT, What.L1_ENTRY)),
    Bug(at_stage(What.NEW_REFCOUNT_BLOCK, 1), growth_plan, NO_BLOCK, 250,
        (What.NEW_REFCOUNT_BLOCK, What.REFCOUNT_TABLE_ENTRY)),
    Bug(at_stage(What.REFCOUNT_TABLE_ENTRY, 2), growth_plan, LOOKS_FREE, 250,
        (What.REFCOUNT_TABLE_ENTRY, What.L2_ENTRY)),
    Bug(at_stage(What.NEW_REFCOUNT_TABLE, 1), growth_plan, r"\(header\) has refcount 0", 250,
        (What.NEW_REFCOUNT_TABLE, What.HEADER)),
    Bug(at_stage(What.HEADER, 2), growth_plan, LOOKS_FREE, 250, (What.HEADER, What.L2_ENTRY)),
    Bug(planted.no_flush_before_l2, writeback_plan, "has refcount 0", 100),
    Bug(planted.reuse_before_durable, reuse_plan, DATA, 100),
    Bug(planted.reuse_while_in_use, race_plan, DATA, 2500),
    Bug(planted.ignore_fua, fua_plan, DATA, 100),
    Bug(planted.never_flush_for_fua, fua_plan, DATA, 100),
    Bug(planted.fua_on_dirty_tables, fua_plan, DATA, 200),
    Bug(planted.fua_on_tables_only_written, fua_plan, DATA, 500),
    Bug(planted.acknowledge_before_written, writeback_plan, DATA, 100),
    Bug(planted.link_before_written, writeback_plan, DATA, 100),
    Bug(planted.drop_the_tail, writeback_plan, DATA, 800),
    Bug(planted.zero_first, zero_overwrite_plan, DATA, 100),
]


def states_until_caught(bug: Bug) -> int | None:
    """How many crash states it takes to see the bug; None: more than twice as many as it may."""
    states = number = 0
    while states <= 2 * bug.within:
        plan = bug.plans(f"planted/{number}")
        number += 1
        files = plan.image.files()
        with pytest.MonkeyPatch.context() as patch:
            bug.plant(patch)
            history = record(plan, files, look=False)
        judge = Judge(history)
        for moment, images, _ in crashes(history, CRASHES):
            states += 1
            try:
                judge.assert_harmless(moment, images)
            except AssertionError as error:
                if re.search(bug.sees, str(error)):
                    return states
    return None


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.plant.__name__)
def test_a_planted_bug_is_caught(bug):
    states = states_until_caught(bug)
    assert states is not None, "not caught"
    assert states <= bug.within


def test_each_barrier_is_taken_out_once():
    assert {bug.rule for bug in BUGS if bug.rule} == {(rule.first, rule.then) for rule in
                                                      WRITE_ORDER}

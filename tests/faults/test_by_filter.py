"""Fault nodes below a format, asked all that is asked of every trial (trial.py): errors are the
client's, what was acknowledged is there, the image stays sound and works again."""

from __future__ import annotations

import logging
from errno import EIO, ENOSPC
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import pytest
import trio

from faults.faulty import FAULTS, WRITES, Fault, Plan, Until
from faults.filtered import TORN, FilterFaults
from faults.programs import PROGRAMS, Program
from faults.test_every_operation import SOAK
from faults.trial import by_backend, run_trial

if TYPE_CHECKING:
    from collections.abc import Iterator

TORN_WRITES = (
    Fault("torn write, then EIO", EIO, WRITES, TORN),
    Fault("torn write, then ENOSPC", ENOSPC, WRITES, TORN),
)
SAMPLE = 1 if SOAK else 41


@pytest.fixture(autouse=True)
def silent_log() -> Iterator[None]:
    """Each failed request and flush is logged: thousands."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_format_survives_a_fault_node_below(program: Program, tally) -> None:
    async def trials() -> None:
        number = count()
        drive = partial(by_backend, way="inline")
        for fault in (*FAULTS, *TORN_WRITES):
            for first in range(1, 25):
                for until in Until:
                    if next(number) % SAMPLE:
                        continue
                    plan = Plan(fault, first, until)
                    try:
                        tally(await run_trial(program, plan, drive, FilterFaults))
                    except BaseException as error:
                        error.add_note(f"program {program.name!r}, {plan}")
                        raise

    trio.run(trials)


def test_the_faults_are_met() -> None:
    program = next(program for program in PROGRAMS if program.name == "writes in place")
    drive = partial(by_backend, way="task")
    for fault in (*FAULTS, *TORN_WRITES):
        outcome = trio.run(
            run_trial, program, Plan(fault, 1, Until.LIFTED), drive, FilterFaults
        )
        assert outcome.injected > 0, fault
        assert set(outcome.errors) == {fault.errno}

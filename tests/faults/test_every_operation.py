"""Each operation of each program fails with each error: once, until the program is at its end, and
for good. What is asked of each trial says trial.py.

`make test` runs a sample of the trials, the same each time; NBDSERVE_SOAK=1 (`make faults`) all.
"""

from __future__ import annotations

import logging
import os
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EROFS
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import pytest
import trio

from faults.client import by_client
from faults.faulty import FAULTS, FULL, Plan, Until
from faults.programs import PROGRAMS, Program
from faults.trial import WAYS, by_backend, run_trial

if TYPE_CHECKING:
    from collections.abc import Iterator

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
SAMPLE = 1 if SOAK else 47  # one trial of so many
SAMPLE_OF_LONG = 1 if SOAK else 4 * SAMPLE  # of programs with many operations

DRIVES = {way: partial(by_backend, way=way) for way in WAYS} | {
    "client": partial(by_client, direct=False),
    "client, direct": partial(by_client, direct=True),
}


@pytest.fixture(autouse=True)
def silent_log() -> Iterator[None]:
    """Each failed request and flush is logged: thousands."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def plans(kinds: list[str]) -> Iterator[Plan]:
    """All there are for a program with these operations."""
    for fault in (*FAULTS, FULL):
        for number, kind in enumerate(kinds, 1):
            if kind in fault.kinds:
                for until in Until:
                    if not (fault is FULL and until is Until.ONCE):
                        yield Plan(fault, number, until)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_every_operation_fails_in_every_way(program: Program, tally) -> None:
    async def trials() -> None:
        number = count()
        for name, drive in DRIVES.items():
            kinds = (await run_trial(program, None, drive)).kinds
            step = SAMPLE_OF_LONG if len(kinds) > 60 else SAMPLE
            for plan in plans(kinds):
                if next(number) % step:
                    continue
                try:
                    tally(await run_trial(program, plan, drive))
                except BaseException as error:
                    error.add_note(f"program {program.name!r}, {name}, {plan}")
                    raise

    trio.run(trials)


@pytest.mark.parametrize(
    ("number", "nbd_error"),
    [(ENOSPC, 28), (EDQUOT, 28), (EFBIG, 28), (EIO, 5), (EROFS, 1)],
)
def test_the_errors_that_clients_see(number: int, nbd_error: int) -> None:
    """Written out, as the trials take them from the server's table: ENOSPC, EIO, EPERM of the
    protocol document."""
    [fault, *_] = [fault for fault in FAULTS if fault.errno == number]
    plan = Plan(fault, 5, Until.NEVER)
    program = next(program for program in PROGRAMS if program.name == "writes in place")
    outcome = trio.run(run_trial, program, plan, DRIVES["client"])
    assert set(outcome.errors) == {nbd_error}

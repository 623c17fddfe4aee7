"""The trials find bugs: each of these, planted, fails one of them."""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import trio

from faults.client import by_client
from faults.faulty import FAULTS, FaultyFile, Plan, Until
from faults.programs import PROGRAMS
from faults.trial import by_backend, run_trial
from nbdserve.formats.qcow2 import allocation, ordering, tables
from nbdserve.nbd import replies
from nbdserve.nbd.proto import NbdError

if TYPE_CHECKING:
    from collections.abc import Iterator

[PROGRAM] = [program for program in PROGRAMS if program.name == "allocating"]
TASK = partial(by_backend, way="task")
MOST = 200  # trials until a bug must have shown

write_tables, writev = ordering._write, FaultyFile.writev


async def an_error_of_the_write_back_swallowed(image, writes):
    with suppress(OSError):
        await write_tables(image, writes)


def dirty_marks_cleared_before_the_write(self):
    self._in_flight = set()


def an_allocation_not_aborted(*_):
    pass


async def a_short_write_taken_as_whole(self, offset, data):
    with suppress(OSError):
        await writev(self, offset, data)


BUGS = [
    mock.patch.object(ordering, "_write", an_error_of_the_write_back_swallowed),
    mock.patch.object(tables.Table, "not_written", dirty_marks_cleared_before_the_write),
    mock.patch.object(allocation.Allocation, "__exit__", an_allocation_not_aborted),
    mock.patch.object(FaultyFile, "writev", a_short_write_taken_as_whole),
]


@pytest.fixture(autouse=True)
def silent_log() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


async def hunt() -> bool:
    """Whether a trial fails."""
    number = 0
    kinds = (await run_trial(PROGRAM, None, TASK)).kinds
    for fault in FAULTS:
        for at, kind in enumerate(kinds, 1):
            for until in Until if kind in fault.kinds else ():
                number += 1
                if number > MOST:
                    return False
                try:
                    await run_trial(PROGRAM, Plan(fault, at, until), TASK)
                except (AssertionError, BaseExceptionGroup):
                    return True
    return False


@pytest.mark.parametrize("bug", BUGS, ids=lambda patch: patch.new.__name__)
def test_it_is_found(bug) -> None:
    with bug:
        assert trio.run(hunt)


def test_without_a_bug_nothing_is_found() -> None:
    assert not trio.run(hunt)


def test_an_error_mapped_to_another_is_seen_by_the_client() -> None:
    plan = Plan(FAULTS[0], 5, Until.NEVER)
    drive = partial(by_client, direct=False)
    right = trio.run(run_trial, PROGRAM, plan, drive)
    assert set(right.errors) == {int(NbdError.ENOSPC)}
    with mock.patch.dict(replies.ERRNO_TO_NBD, {errno.ENOSPC: NbdError.EIO}):
        wrong = trio.run(run_trial, PROGRAM, plan, drive)
    assert set(wrong.errors) == {int(NbdError.EIO)}

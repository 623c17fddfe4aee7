"""Requests are cut off before each step: one of those that race, or all, as by a server that stops.

A client that leaves cuts off nothing, its requests belong to the backend; but when the backend's
nursery is cancelled, at any await, the image must close in order, hold all that was answered, and
leak nothing. What was cut off may have happened or not.
"""

import os
from functools import partial

import pytest

from races.cases import chosen
from races.images import C
from races.scheduler import Dice, Schedule
from races.world import SUBMIT, Case, Op, explore_cuts

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"

# Allocation with copying, one who waits for it, a new table and its refcounts, discards with their
# reads, what the write-back of all that needs.
ACTORS = (
    (Op("write", 11 * C + 10, C), Op("read", 3 * C, 2 * C, way=SUBMIT)),
    (Op("write", 11 * C + 200, 100), Op("write", 190 * C, C, fua=True)),
    (Op("discard", 2 * C, 6 * C), Op("flush"), Op("write", 3 * C + 1, 300), Op("flush")),
)

IMAGES = ["backing", "data file", "edge"]


@pytest.mark.parametrize("who", [0, 1, 2, -1])
@pytest.mark.parametrize("image", IMAGES)
def test_cut_off_before_each_step(image, who):
    cases = [Case(image, ACTORS, refuses=True, tables=1)]
    seeds = [1] if image == "backing" else []
    if SOAK:
        cases += [case for _, case in chosen(image, 3) if len(case.actors) > 2]
        seeds = range(4)
    for case in cases:
        result = explore_cuts(
            case, [Schedule, *(partial(Dice, seed) for seed in seeds)], who=who
        )
        if result.failed:
            schedule, error = result.failed
            raise AssertionError(f"{case}, {schedule}") from error

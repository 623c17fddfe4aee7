"""Pairs and crowds of requests on every image: each case with the schedules of few deviations, and
some that are rolled. NBDSERVE_SOAK=1: fifty times as many; `make races`: as long as one likes."""

import os
from functools import partial

import pytest

from races.cases import PAIRS, chosen
from races.images import KINDS, prepared
from races.scheduler import Schedule, explore, rolled
from races.world import run_case

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
NUMBER = len(PAIRS) if SOAK else 20
SYSTEMATIC, ROLLED = (90, 10) if SOAK else (5, 2)


@pytest.mark.parametrize("image", KINDS)
def test_everything_at_once(image):
    for name, case in chosen(image, 1, NUMBER):
        run = partial(run_case, case)
        for result in (
            explore(run, deviations=2, most=SYSTEMATIC),
            rolled(run, range(ROLLED)),
        ):
            if result.failed:
                schedule, error = result.failed
                raise AssertionError(f"{name}: run_case({case}, {schedule})") from error


def test_a_case_runs_the_same_each_time():
    for image in ("plain", "data file"):
        prepared(image)
        for _, case in list(chosen(image, 2, 5)):
            assert run_case(case, Schedule()) == run_case(case, Schedule())

"""A client dies before each step of the server, in every way there is; NBDSERVE_SOAK=1 leaves none
out and rolls dice beside."""

import os
from functools import partial

import pytest

from races.clients import Death, explore_deaths, run_clients
from races.planted import (
    a_buffer_given_back_before_it_is_sent,
    a_buffer_given_back_when_its_client_leaves,
)
from races.scheduler import Dice, Schedule, rolled

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
STRIDE = 1 if SOAK else 31

WAYS = [
    pytest.param("plain", False, False, id="page cache"),
    pytest.param("plain", True, False, id="O_DIRECT"),
    pytest.param("backing", False, True, id="nothing at once"),
]


@pytest.mark.parametrize("death", Death, ids=lambda death: death.name)
@pytest.mark.parametrize(("image", "direct", "refuses"), WAYS)
def test_a_death_at_each_step_harms_nobody_else(image, direct, refuses, death):
    new_schedules = [Schedule, *(partial(Dice, seed) for seed in range(4 if SOAK else 0))]
    for number, new_schedule in enumerate(new_schedules):
        result = explore_deaths(
            image,
            death,
            direct=direct,
            refuses=refuses,
            new_schedule=new_schedule,
            first=number,
            stride=STRIDE,
        )
        if result.failed:
            raise AssertionError(result.failed[0]) from result.failed[1]


@pytest.mark.parametrize(("image", "direct", "refuses"), WAYS)
def test_nobody_dies(image, direct, refuses):
    run = partial(
        run_clients, image, death=Death.CLOSED, step=None, direct=direct, refuses=refuses
    )
    assert run(Schedule()) == run(Schedule()), "the same schedule makes another run"
    assert rolled(run, range(100 if SOAK else 5)).failed is None


@pytest.mark.parametrize(
    ("bug", "death", "most"),
    [
        (a_buffer_given_back_when_its_client_leaves, Death.CUT_OFF, 40),
        (a_buffer_given_back_before_it_is_sent, Death.HALF_CLOSED, 5),
    ],
)
def test_a_planted_bug_is_found(bug, death, most):
    with bug():
        result = explore_deaths("plain", death, direct=True, refuses=False, stride=5)
    assert result.failed, f"not found by {result.schedules} runs"
    assert result.schedules <= most

"""The long run's bookkeeping. That it fuzzes is seen by running it: atheris is not among what the
tests need."""

from __future__ import annotations

import pytest

from fuzz.__main__ import Result, parse, read_log, runs_of
from fuzz.keep import arcs, smallest
from fuzz.targets import TARGETS

END = """\
#2\tINITED cov: 9 ft: 12 corp: 3/40b exec/s: 0 rss: 49Mb
#4000\tDONE   cov: 76 ft: 329 corp: 67/16Kb lim: 2048 exec/s: 0 rss: 67Mb
stat::number_of_executed_units: 4001
"""


def test_what_a_target_has_done_is_read_from_its_log():
    found = read_log(TARGETS["requests"], END, 2.0, 0)
    assert found == Result("requests", 4001, 2.0, corpus=67, features=329, failures=0)
    assert "2,000" in found.line()


def test_a_target_that_ends_otherwise_has_failed():
    assert read_log(TARGETS["requests"], END, 2.0, 77).failures == 1
    assert read_log(TARGETS["requests"], "", 0.0, -9) == Result("requests", 0, 0.0, 0, 0, 1)


@pytest.mark.parametrize(
    ("argv", "runs"), [([], 370_000), (["--total", "100"], 37), (["--runs", "5"], 5)]
)
def test_how_many_inputs_a_target_gets(argv, runs):
    assert runs_of(TARGETS["requests"], parse(argv)) == runs


def test_what_is_kept_reaches_all_that_the_inputs_reach():
    target = TARGETS["requests"]
    inputs = target.module.seeds()[:20] * 2
    kept = smallest(target, inputs)
    assert 1 < len(kept) < 20
    assert set().union(*(arcs(target, data) for data in kept)) == set().union(
        *(arcs(target, data) for data in inputs)
    )

"""`make crash`: counts, and says what it found."""

from crash import planted
from crash.__main__ import arguments, report, run
from crash.search import Found, Searched
from nbdserve.config import CACHE_MODES


def test_it_goes_on_until_there_are_enough_states():
    chosen = arguments(["--states", "100", "--states-per-mode", "0", "--jobs", "1", "--limit",
                        "10", "--mode", "unsafe"])
    totals = run(chosen, map)
    assert totals.found is None
    assert len(totals.states) >= 100
    assert totals.plans.keys() == {"unsafe"}
    lines = list(totals.lines(chosen.seed, 1.0))
    assert lines[1].split() == ["unsafe", str(totals.plans["unsafe"]), str(len(totals.states))]
    assert lines[-1] == "seed 1, 1 s"


def test_a_state_counts_once():
    chosen = arguments(["--states", "5", "--states-per-mode", "0", "--jobs", "1"])

    def two_each(search, tasks):
        for number, (name, *_) in enumerate(tasks):
            yield Searched(name, "none", {b"always", bytes([number])})

    totals = run(chosen, two_each)
    assert len(totals.states) == totals.modes["none"] == 9  # of 8 plans


def test_it_goes_on_until_every_mode_has_enough():
    chosen = arguments(["--states", "30", "--states-per-mode", "20", "--jobs", "1"])
    asked = []

    def one_each(search, tasks):
        for name, mode, _ in tasks:
            asked.append(mode)
            yield Searched(name, mode or "none", {name.encode()})

    totals = run(chosen, one_each)
    assert totals.modes.keys() == set(CACHE_MODES)
    assert all(number >= 20 for number in totals.modes.values())
    assert asked[:30] == [None] * 30


def test_it_says_how_to_see_a_bug_again(monkeypatch):
    planted.ignore_fua(monkeypatch)
    chosen = arguments(["--jobs", "1", "--limit", "30", "--mode", "writeback"])
    totals = run(chosen, map)
    assert isinstance(totals.found, Found)
    lines = list(report(chosen, totals.found))
    number = totals.found.plan.split("/")[1]
    assert lines[1].endswith(f"--seed 1 --only {number} --mode writeback --limit 30'")
    requests = [line for line in lines if line.startswith("  Request")]
    assert 1 <= len(requests) <= 4

"""`make crash`: the long run.

Plans are numbered; each has a name, SEED/NUMBER, that says all of it. Every process takes every
n-th number. It ends when so many distinct crash states were looked at, in all modes together and in
each of them, that none broke a promise; or with the first that did, exit status 1, and how to see
it again. Plans have modes by chance; in the end those of a mode that lacks states have that.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from crash.plans import draw_plan
from crash.search import Found, Searched, search_by_name, search_closely, shrink
from nbdserve.config import CACHE_MODES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Task = tuple[str, str | None, int]
    SearchAll = Callable[[Callable[[Task], Searched], Sequence[Task]], Iterable[Searched]]

PROGRESS_SECONDS = 15.0


@dataclasses.dataclass
class Totals:
    """What all processes went through; a crash state counts once, whoever met it."""

    states: set[bytes] = dataclasses.field(default_factory=set)
    plans: Counter[str] = dataclasses.field(default_factory=Counter)
    modes: Counter[str] = dataclasses.field(default_factory=Counter)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    found: Found | None = None

    def add(self, searched: Searched) -> None:
        new = searched.states - self.states
        self.states |= new
        self.plans[searched.mode] += 1
        self.modes[searched.mode] += len(new)
        self.counts.update(searched.counts)
        self.counts.update({"asked qemu": searched.asked_qemu, "lived on": searched.lived_again})
        self.found = self.found or searched.found

    def lacking(self, chosen: argparse.Namespace) -> Iterator[str]:
        """The modes that have not enough states yet."""
        for mode in [chosen.mode] if chosen.mode else CACHE_MODES:
            if self.modes[mode] < chosen.states_per_mode:
                yield mode

    def lines(self, seed: int, seconds: float) -> Iterator[str]:
        """What to print at the end."""
        yield f"{'mode':13} {'programs':>9} {'distinct crash states':>22}"
        for mode in sorted(self.modes):
            yield f"{mode:13} {self.plans[mode]:9,} {self.modes[mode]:22,}"
        yield f"{'all':13} {self.plans.total():9,} {len(self.states):22,}"
        yield "reached: " + ", ".join(
            f"{name} {number:,}" for name, number in sorted(self.counts.items())
        )
        yield f"seed {seed}, {seconds:.0f} s"


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make crash CRASH_ARGS=...")
    parser.add_argument("--seed", type=int, default=1, help="of everything (default: 1)")
    parser.add_argument("--states", type=int, default=20_000,
                        help="distinct crash states to go through (default: 20000)")
    parser.add_argument("--states-per-mode", type=int, default=2000, metavar="STATES",
                        help="of them at least in each cache mode (default: 2000)")
    parser.add_argument("--limit", type=int, default=150,
                        help="crashes of each program (default: 150)")
    parser.add_argument("--mode", help="only this cache mode (default: each in turn by chance)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="processes (default: one for each processor)")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only this plan of the seed")
    return parser.parse_args(words)


def run(chosen: argparse.Namespace, search_all: SearchAll) -> Totals:
    """Search until there are enough states, or one that is bad."""
    totals = Totals()
    numbers = itertools.count() if chosen.only is None else [chosen.only]
    mode = chosen.mode
    tasks = ((f"{chosen.seed}/{number}", mode, chosen.limit) for number in numbers)
    started = told = time.monotonic()
    while batch := list(itertools.islice(tasks, 8 * chosen.jobs)):
        for searched in search_all(search_by_name, batch):
            totals.add(searched)
            if totals.found is not None:
                return totals
        if time.monotonic() > told + PROGRESS_SECONDS:
            told = time.monotonic()
            rate = len(totals.states) / (told - started)
            print(f"{totals.plans.total():,} programs, {len(totals.states):,} distinct crash"
                  f" states, {rate:.0f} a second", flush=True)
        if len(totals.states) >= chosen.states:
            mode = next(totals.lacking(chosen), None)
            if mode is None:
                break
    return totals


def report(chosen: argparse.Namespace, found: Found) -> Iterator[str]:
    """What to print of a crash that broke a promise."""
    mode = f" --mode {found.mode}"
    yield f"plan {found.plan}, crash at moment {found.moment}: {found.reason}"
    yield (f"again: make crash CRASH_ARGS='--seed {chosen.seed} --only"
           f" {found.plan.split('/')[1]}{mode} --limit {chosen.limit}'")
    plan = shrink(draw_plan(found.plan, mode=found.mode), chosen.limit)
    again = search_closely(plan, chosen.limit).found
    if again is not None:
        yield f"less is enough, in {plan.mode.name}, patience {plan.patience}, {plan.image}:"
        for batch in plan.batches:
            yield f"  {' beside '.join(map(str, batch))}"
        yield f"crash at moment {again.moment}: {again.reason}"


def main() -> int:
    chosen = arguments(sys.argv[1:])
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(chosen.jobs) as pool:
        totals = run(chosen, pool.imap_unordered)
    if totals.found is not None:
        for line in report(chosen, totals.found):
            print(line, flush=True)
        return 1
    print(*totals.lines(chosen.seed, time.monotonic() - started), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

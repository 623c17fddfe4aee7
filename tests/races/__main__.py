"""The long run (make races): the matrix, cut-offs and deaths, seed after seed, until time is up.

One line for each seed says how many schedules were run for what. The first that fails ends it with
status 1, and a call that makes it happen again; the same seeds make the same schedules.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from races.cases import chosen
from races.clients import Death, explore_deaths
from races.images import KINDS, prepared
from races.planted import PLANTED
from races.scheduler import Dice, Result, Schedule, explore, rolled
from races.world import explore_cuts, run_case

Work = Callable[[], Result]


def matrix(seed: int, image: str) -> Iterator[tuple[str, str, Work]]:
    """(section, call, work) of what a seed has for an image."""
    for _, case in chosen(image, seed):
        run = partial(run_case, case)
        call = f"run_case({case}, {{}})"
        yield "systematic", call, partial(explore, run, deviations=3, most=60, seed=seed)
        yield "rolled", call, partial(rolled, run, range(seed * 20, seed * 20 + 20))


def cuts(seed: int, image: str) -> Iterator[tuple[str, str, Work]]:
    """Some cases in which one or all are cut off at each step."""
    for _, case in random.Random(f"{seed} {image}").sample(list(chosen(image, seed)), 4):
        for who in range(-1, len(case.actors)):
            schedules = [partial(Dice, seed), partial(Dice, seed + 1)]
            yield "cut off", f"{case}: {{}}", partial(explore_cuts, case, schedules, who=who)


def deaths(seed: int, image: str) -> Iterator[tuple[str, str, Work]]:
    """Clients that die, each way, before every few steps."""
    dice = random.Random(f"{seed} {image}")
    for death in Death:
        yield "deaths", "{}", partial(
            explore_deaths,
            image,
            death,
            direct=dice.random() < 0.5,
            refuses=dice.random() < 0.3,
            new_schedule=Schedule if seed == 0 else partial(Dice, seed),
            first=dice.randrange(7),
            stride=7,
        )


def power() -> None:
    """What the matrix needs to find each planted bug, on the image where it shows."""
    for plant in PLANTED:
        done = 0
        failed = False
        with plant.bug():
            for _, case in chosen(plant.case.image, 0):
                if failed:
                    break
                result = (
                    explore_cuts(case, [Schedule], who=0)
                    if plant.cut
                    else explore(partial(run_case, case), deviations=2, most=7)
                )
                done += result.schedules
                failed = result.failed is not None
        print(f"{plant.bug.__name__}: {'found after' if failed else 'NOT found by'} {done}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="races", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--image", choices=list(KINDS), action="append", help="not all of them")
    parser.add_argument("--power", action="store_true", help="how soon planted bugs are found")
    args = parser.parse_args()
    for image in KINDS:
        prepared(image)
    if args.power:
        power()
        return 0
    end = time.monotonic() + args.seconds
    total: Counter[str] = Counter()
    for seed in itertools.count(args.seed):
        for image in args.image or KINDS:
            for section, call, work in itertools.chain(
                deaths(seed, image), cuts(seed, image), matrix(seed, image)
            ):
                result = work()
                total[section] += result.schedules
                if result.failed is not None:
                    name, error = result.failed
                    traceback.print_exception(error)
                    print(f"FAILED, seed {seed}: {call.format(name)}")
                    return 1
                if time.monotonic() > end:
                    _report(args.seed, seed, image, total)
                    return 0
        _report(args.seed, seed, "all", total)
    return 0


def _report(first: int, seed: int, image: str, total: Counter[str]) -> None:
    counts = ", ".join(f"{count} {section}" for section, count in total.items())
    print(
        f"seeds {first} to {seed} ({image}): {total.total()} schedules, none bad: {counts}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

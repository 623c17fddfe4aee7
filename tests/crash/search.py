"""Look through crashes of a plan for one that breaks a promise."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import TYPE_CHECKING, NamedTuple

from crash.plans import draw_plan
from crash.promises import Judge, assert_qemu_agrees, works_again
from crash.record import record
from nbdserve.powercut.outcomes import all_cuts, digest, nb_stretches, state_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crash.plans import Plan
    from crash.record import History
    from nbdserve.powercut.content import Content

__all__ = ["Found", "Searched", "crashes", "search", "search_by_name", "search_closely", "shrink"]


@dataclasses.dataclass
class Found:
    """A crash that broke a promise, or a plan that failed by itself (moment -1)."""

    plan: str
    mode: str
    moment: int
    reason: str


@dataclasses.dataclass
class Searched:
    """What a search went through. `states`: digests of distinct crash states."""

    plan: str
    mode: str
    states: set[bytes] = dataclasses.field(default_factory=set)
    asked_qemu: int = 0
    lived_again: int = 0
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    found: Found | None = None


class Crash(NamedTuple):
    """What the files held after it, and what tells that apart."""

    moment: int
    images: tuple[bytes, ...]
    digest: bytes


def crashes(history: History, limit: int) -> Iterator[Crash]:
    """About `limit` crashes that must be harmless: the process dies at some moments, and unless the
    mode is unsafe the power goes at others, at least once after each flush and durable write."""
    log = history.log
    chooser = random.Random(history.plan.name)
    unsafe = history.plan.mode.no_flush
    deaths = min(limit if unsafe else limit // 10, len(log) + 1)
    for moment in chooser.sample(range(len(log) + 1), deaths):
        yield _crash(moment, state_at(log, moment, power=False).sample(chooser))
    if not unsafe:
        for cut in all_cuts(log, max(limit - deaths, nb_stretches(log))):
            yield _crash(cut.moment, cut.images)


def _crash(moment: int, images: tuple[Content, ...]) -> Crash:
    return Crash(moment, tuple(map(bytes, images)), digest(images))


def search(plan: Plan, limit: int, *, qemu_every: int = 0, again_every: int = 0) -> Searched:
    """Run a plan and look at up to `limit` crashes of it. `qemu_every`: of so many of them QEMU is
    asked about one; `again_every`: one is written to again, and crashes once more."""
    searched = Searched(plan.name, plan.mode.name)
    moment = -1
    try:
        history = record(plan, plan.image.files())
        searched.counts = history.counts
        judge = Judge(history)
        for number, (moment, images, key) in enumerate(crashes(history, limit), start=1):
            judge.assert_harmless(moment, images)
            searched.states.add(key)
            if qemu_every and number % qemu_every == 1:
                searched.asked_qemu += 1
                write = searched.asked_qemu % 4 == 1
                assert_qemu_agrees(plan.image, images, write=write)
            if again_every and number % again_every == 1:
                searched.lived_again += 1
                try:
                    _live_again(plan, images, searched)
                except AssertionError as error:
                    raise AssertionError(f"living on after it: {error}") from error
    except (AssertionError, OSError, BaseExceptionGroup) as error:
        reason = f"{type(error).__name__}: {error}"
        searched.found = Found(plan.name, plan.mode.name, moment, reason)
    return searched


def search_by_name(task: tuple[str, str | None, int]) -> Searched:
    """(name of a plan, cache mode, limit): in a process of its own."""
    name, mode, limit = task
    return search_closely(draw_plan(name, mode=mode), limit)


def search_closely(plan: Plan, limit: int) -> Searched:
    """Two or three of the crashes are looked at by QEMU and live on."""
    return search(plan, limit, qemu_every=limit // 2, again_every=limit // 2)


def shrink(plan: Plan, limit: int, seconds: float = 60.0) -> Plan:
    """A plan in which something is found, less what can be left out so that something still is."""
    end = time.monotonic() + seconds
    smaller = True
    while smaller:
        smaller = False
        for shorter in _shorter(plan):
            if time.monotonic() > end:
                return plan
            if search_closely(shorter, limit).found is not None:
                plan, smaller = shorter, True
                break
    return plan


def _shorter(plan: Plan) -> Iterator[Plan]:
    """The plan without one batch, then without one request."""
    batches = plan.batches
    for number in range(len(batches)):
        yield dataclasses.replace(plan, batches=batches[:number] + batches[number + 1 :])
    for number, batch in enumerate(batches):
        for place in range(len(batch)) if len(batch) > 1 else ():
            less = batch[:place] + batch[place + 1 :]
            yield dataclasses.replace(
                plan, batches=(*batches[:number], less, *batches[number + 1 :])
            )


def _live_again(plan: Plan, images: tuple[bytes, ...], searched: Searched) -> None:
    history = works_again(plan.image, images, searched.lived_again)
    judge = Judge(history)
    for moment, later, key in crashes(history, 8):
        judge.assert_harmless(moment, later)
        searched.states.add(key)

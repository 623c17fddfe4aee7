"""Throttle groups under a clock that jumps: rates, turns, changes while serving, cancellation.

The clock goes on only when every task waits, so the times here are exact.
"""

import gc
import math
import random
from collections import Counter

import pytest
import trio
import trio.testing

from nbdserve.block.run import READ, WRITE
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.filters.throttle_group import ThrottleGroup, ThrottleGroups

KIB = 1024


def group_of(**limits):
    return ThrottleGroup("g", ThrottleLimits(**limits))


def iops(average, *more):
    return group_of(iops_total=RateLimit(average, *more))


async def client(member, op, nb_bytes, done, *, latency=0.0, key=None):
    """One request after the other, for ever."""
    while True:
        await member.admit(op, nb_bytes)
        done[key] += 1
        await trio.sleep(latency)


async def requests(member, number, *, depth, op=READ, nb_bytes=4096):
    """Seconds that `number` requests take, `depth` at a time."""
    start, left = trio.current_time(), iter(range(number))

    async def one():
        for _ in left:
            await member.admit(op, nb_bytes)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(depth):
            nursery.start_soon(one)
    return trio.current_time() - start


def idle(group):
    """Nothing waits, nobody keeps time."""
    return all(
        not lane.waiting and lane.timekeeper is None for lane in group._lanes.values()
    )


@pytest.mark.parametrize("depth", [1, 2, 16, 64])
@pytest.mark.parametrize(("number", "seconds"), [(400, 1.895), (1000, 4.895)])
async def test_the_first_burst_and_the_rate_are_qemus(autojump_clock, number, seconds, depth):
    group = iops(200)
    assert await requests(group.join(), number, depth=depth) == pytest.approx(seconds, rel=1e-3)
    assert idle(group)


@pytest.mark.parametrize(
    ("limits", "nb_bytes", "rate"),
    [
        ({"iops_total": RateLimit(1000)}, 4096, 1000),
        ({"iops_read": RateLimit(37)}, 65536, 37),
        ({"bps_total": RateLimit(1 << 20)}, 4096, 256),
        ({"bps_read": RateLimit(10 << 20)}, 1 << 20, 10),
        ({"iops_total": RateLimit(500), "bps_total": RateLimit(1 << 20)}, 4096, 256),
        ({"iops_total": RateLimit(1000), "iops_size": 4096}, 16384, 250),
    ],
    ids=str,
)
async def test_rates_hold_over_ten_seconds(autojump_clock, limits, nb_bytes, rate):
    group, done = group_of(**limits), Counter()
    member = group.join()
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(client, member, READ, nb_bytes, done)
    burst = rate / 10
    assert done[None] - burst == pytest.approx(10 * rate, rel=0.03)
    assert idle(group)


async def test_a_timer_that_is_late_costs_nothing(autojump_clock):
    """The bucket goes by the time that has passed: who wakes late finds more room."""
    member = iops(200).join()
    clock, random_ = trio.lowlevel.current_clock(), random.Random(1)

    async def one():
        while True:
            await member.admit(READ, 1)
            done[None] += 1
            clock.jump(random_.random() * 0.004)  # the machine is busy elsewhere

    done = Counter()
    start = trio.current_time()
    with trio.move_on_after(10):
        await one()
    elapsed = trio.current_time() - start
    assert done[None] == pytest.approx(200 * elapsed + 20, rel=0.01)


async def test_bursts_are_had_at_the_maximum(autojump_clock):
    """100/s, bursts of 1000/s for 2 s: 2000 fit in, less what leaks."""
    member = iops(100, 1000, 2).join()
    assert await requests(member, 1000, depth=8) == pytest.approx(0.9, abs=0.01)
    assert await requests(member, 1000, depth=8) == pytest.approx(1.0, abs=0.01)
    assert await requests(member, 1000, depth=8) > 7


# --- turns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("depths", [(1, 1), (8, 8), (2, 64), (1, 32), (4, 4, 4)])
async def test_members_share_evenly_whatever_their_depth(autojump_clock, op, depths):
    group, done = iops(300), Counter()
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for number, depth in enumerate(depths):
                member = group.join()
                for _ in range(depth):
                    nursery.start_soon(
                        lambda member=member, key=number: client(
                            member, op, 1, done, latency=1e-4, key=key
                        )
                    )
    assert sum(done.values()) == pytest.approx(3030, rel=0.01)
    for number in range(len(depths)):
        # The first burst goes to whoever is first.
        assert done[number] == pytest.approx(3000 / len(depths), abs=35)


async def test_reads_and_writes_share_a_total_evenly(autojump_clock):
    group, done = iops(200), Counter()
    member = group.join()
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for op in (READ, WRITE):
                for _ in range(8):
                    nursery.start_soon(lambda op=op: client(member, op, 1, done, key=op))
    assert sum(done.values()) == pytest.approx(2020, rel=0.02)
    assert done[READ] == pytest.approx(done[WRITE], rel=0.05)


async def test_a_read_limit_does_not_hold_writes_up(autojump_clock):
    group = group_of(iops_read=RateLimit(10))
    member = group.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: requests(member, 20, depth=4))
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(1000):
            assert member.admit_nowait(WRITE, 1 << 20)
        assert not member.admit_nowait(READ, 1)


async def test_within_a_member_the_oldest_goes_first(autojump_clock):
    member, order = iops(10).join(), []

    async def one(number):
        await member.admit(READ, 1)
        order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
    assert order == list(range(10))


async def test_nobody_jumps_the_queue(autojump_clock):
    """At 0.1 s the bucket has room, but somebody is waiting for it."""
    group = iops(10)
    one, other = group.join(), group.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: requests(one, 4, depth=4))
        await trio.testing.wait_all_tasks_blocked()
        autojump_clock.jump(0.15)  # their task could not run yet
        assert not other.admit_nowait(READ, 1)
        start = trio.current_time()
        await other.admit(READ, 1)
        assert trio.current_time() - start == pytest.approx(0.05)


async def test_when_a_deadline_comes_one_goes_whatever_the_other_lane_did(autojump_clock):
    """Two fit in; of the two that wait each goes after 0.1 s, and the debt is the next ones'."""
    member, gone = iops(10).join(), []

    async def one(op):
        await member.admit(op, 1)
        gone.append((op, round(trio.current_time() - start, 6)))

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for op in (READ, WRITE, READ, WRITE, READ):
            nursery.start_soon(one, op)
            await trio.testing.wait_all_tasks_blocked()
    assert sorted(gone[2:4], key=str) == [(READ, 0.1), (WRITE, 0.1)]
    assert gone[4] == (READ, pytest.approx(0.25, abs=0.051))


# --- limits that change ----------------------------------------------------------------------


@pytest.mark.parametrize(("until", "waiting"), [(0.5, 1099), (1.5, 1098)])
@pytest.mark.parametrize("after", [1000, 10])
async def test_new_limits_hold_for_those_that_wait(autojump_clock, after, until, waiting):
    group = iops(1)
    member, took = group.join(), []

    async def run():
        took.append(await requests(member, 1100, depth=1100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.sleep(until)  # the next ones would go at 0.9 s and 1.9 s
        assert member.statistics().waiting == waiting
        group.limits = ThrottleLimits(iops_total=RateLimit(after))
    left = waiting - after / 10 - 1
    assert took[0] - until == pytest.approx(left / after, rel=1e-3)
    assert idle(group)


async def test_without_limits_all_that_wait_go(autojump_clock):
    group = iops(1)
    member = group.join()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: requests(member, 100, depth=50))
        await trio.sleep(0.25)
        start = trio.current_time()
        group.limits = ThrottleLimits()
    assert trio.current_time() == start
    assert group.limits == ThrottleLimits()


async def test_limits_can_be_set_where_there_were_none(autojump_clock):
    group = ThrottleGroup("g")
    member = group.join()
    assert all(member.admit_nowait(READ, 1 << 30) for _ in range(1000))
    group.limits = ThrottleLimits(iops_total=RateLimit(200))
    assert await requests(member, 400, depth=4) == pytest.approx(1.895, rel=1e-3)


# --- cancellation, draining, leaving ---------------------------------------------------------


async def test_who_is_cancelled_leaves_no_debt(autojump_clock):
    group = iops(10)
    member = group.join()
    with trio.move_on_after(0.05):
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(member.admit, READ, 4096)
    assert idle(group)
    assert member.statistics().admitted == 2
    start = trio.current_time()
    await member.admit(READ, 1)
    assert trio.current_time() - start == pytest.approx(0.05)


@pytest.mark.parametrize("seed", range(20))
async def test_any_one_may_be_cancelled_and_the_others_go_on(autojump_clock, seed):
    """Timekeepers included, at any time, also at the very moment when they are let go."""
    group, chance = iops(100), random.Random(seed)
    members = [group.join(), group.join()]
    outcome = Counter()

    async def one(member, patience):
        with trio.move_on_after(patience):
            await member.admit(chance.choice((READ, WRITE)), 1)
            outcome["done"] += 1
            return
        outcome["gave up"] += 1

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(400):
            # Deadlines fall on whole hundredths: patience ends together with them, or never.
            patience = chance.choice((math.inf, chance.randrange(1, 300) / 100))
            nursery.start_soon(one, chance.choice(members), patience)
    assert sum(outcome.values()) == 400
    assert outcome["gave up"]
    assert idle(group)
    took = trio.current_time() - start
    assert outcome["done"] == pytest.approx(100 * took + 11, abs=3)
    assert sum(member.statistics().admitted for member in members) == outcome["done"]


async def test_what_is_cancelled_just_as_it_is_let_go_is_taken_back(autojump_clock):
    group = iops(10)
    member = group.join()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: requests(member, 3, depth=3))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            group._admit_next(READ)  # the deadline comes before the cancelled task could run
    assert idle(group)
    assert group._buckets._all[0].level == pytest.approx(2)


async def test_draining_lets_all_of_one_member_go(autojump_clock):
    group, done = iops(1), Counter()
    stopping, other = group.join(), group.join()
    async with trio.open_nursery() as nursery:
        for op in (READ, WRITE):
            nursery.start_soon(lambda op=op: requests(stopping, 50, depth=10, op=op))
        nursery.start_soon(lambda: client(other, READ, 1, done))
        await trio.sleep(0.5)
        before = done[None]
        stopping.drain_begin()
        await trio.testing.wait_all_tasks_blocked()
        assert stopping.statistics().waiting == 0
        assert stopping.statistics().admitted == 100
        assert stopping.admit_nowait(WRITE, 1 << 40)
        assert done[None] - before <= 1
        nursery.cancel_scope.cancel()


async def test_draining_at_the_very_moment_of_the_deadline(autojump_clock):
    member = iops(1).join()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(member.admit, READ, 1)
        await trio.testing.wait_all_tasks_blocked()
        autojump_clock.jump(5)
        member.drain_begin()
    assert member.statistics().admitted == 3


async def test_who_left_is_not_waited_for(autojump_clock):
    group = iops(200)
    one, other = group.join(), group.join()
    await requests(other, 30, depth=3)
    other.leave()
    group.limits = group.limits
    assert await requests(one, 400, depth=4) == pytest.approx(1.895, rel=1e-3)


async def test_statistics_tell_who_waited(autojump_clock):
    member = iops(10).join()
    await requests(member, 4, depth=1)
    said = member.statistics()
    assert (said.admitted, said.throttled, said.waiting) == (4, 2, 0)
    assert said.seconds_waited == pytest.approx(0.2)
    assert (said.group, said.limits) == ("g", {"iops-total": 10})


# --- by name ---------------------------------------------------------------------------------


async def test_groups_are_shared_by_name_and_the_last_limits_win(autojump_clock):
    groups = ThrottleGroups()
    slow = ThrottleLimits(iops_total=RateLimit(10))
    one = groups.join("a", slow)
    assert groups.join("a", ThrottleLimits()).group is one.group
    assert one.group.limits == slow
    assert groups.join("b", slow).group is not one.group
    fast = ThrottleLimits(iops_total=RateLimit(1000))
    assert groups.join("a", fast).group is one.group
    assert one.group.limits == fast


async def test_groups_that_are_there_from_the_beginning(autojump_clock):
    groups = ThrottleGroups({"g": ThrottleLimits(iops_total=RateLimit(10))})
    assert groups.join_existing("other") is None
    member = groups.join_existing("g")
    assert member.group.limits == ThrottleLimits(iops_total=RateLimit(10))
    member.leave()
    assert groups.join_existing("g").group is member.group
    assert groups.join("g", ThrottleLimits()).group is member.group
    other = groups.join("other", ThrottleLimits())
    assert groups.join_existing("other").group is other.group


async def test_a_group_without_members_is_forgotten():
    groups = ThrottleGroups()
    member = groups.join("a", ThrottleLimits(iops_total=RateLimit(10)))
    member.leave()
    del member
    gc.collect()
    assert groups.join("a", ThrottleLimits()).group.limits == ThrottleLimits()

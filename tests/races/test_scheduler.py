"""The scheduler finds what it is for, in toys whose interleavings can be counted, and the same each
time."""

import pytest
import trio

from races.scheduler import Deviations, Dice, Schedule, Scheduler, Stuck, explore, rolled


async def ticks(log, name, number):
    for tick in range(number):
        log.append(f"{name}{tick}")
        await trio.lowlevel.checkpoint()


def orders(run_tasks):
    """Runs `run_tasks(log, nursery)`; a function to give to `explore`, and where the logs go."""
    logs = []

    def run(schedule):
        log = []

        async def main(scheduler):
            async with trio.open_nursery() as nursery:
                run_tasks(log, nursery)
                scheduler.racing = True
            scheduler.racing = False

        scheduler = Scheduler(schedule)
        try:
            scheduler.run(main)
        finally:
            logs.append(tuple(log))
        return scheduler.counts

    return run, logs


def two_of_three(log, nursery):
    nursery.start_soon(ticks, log, "a", 3)
    nursery.start_soon(ticks, log, "b", 3)


def test_all_interleavings_of_two_tasks_are_found():
    """Of 3 ticks each there are 6! / 3! / 3! = 20 orders."""
    run, logs = orders(two_of_three)
    result = explore(run, deviations=6, most=10_000)
    assert result.failed is None
    assert result.schedules == len(logs)
    assert len(set(logs)) == 20


def test_one_deviation_holds_one_task_until_the_other_has_ended():
    run, logs = orders(two_of_three)
    explore(run, deviations=1, most=10_000)
    a, b = ("a0", "a1", "a2"), ("b0", "b1", "b2")
    assert set(logs) == {a[:k] + b + a[k:] for k in range(4)}


@pytest.mark.parametrize("schedule", [Dice(1), Dice(2), Deviations((1, 1), (4, 1)), Schedule()])
def test_a_schedule_makes_the_same_run_each_time(schedule):
    run, logs = orders(two_of_three)
    name = schedule.name
    for _ in range(5):
        run(eval(name))
    assert len(set(logs)) == 1


def test_dice_of_many_seeds_find_all_orders():
    run, logs = orders(two_of_three)
    assert rolled(run, range(300)) == (300, None)
    assert len(set(logs)) == 20


def test_a_lost_update_is_found_and_named():
    def lose(log, nursery):
        async def add():
            before = len(log)
            await trio.lowlevel.checkpoint()
            log[:] = [0] * (before + 1)

        nursery.start_soon(add)
        nursery.start_soon(add)

    run, logs = orders(lose)

    def judged(schedule):
        counts = run(schedule)
        assert len(logs[-1]) == 2, "lost"
        return counts

    result = explore(judged, deviations=2, most=100)
    name, error = result.failed
    assert str(error).startswith("lost")
    with pytest.raises(AssertionError, match="lost"):
        judged(eval(name))
    assert rolled(judged, range(20)).failed


@pytest.mark.parametrize("shield", [False, True])
def test_a_deadlock_is_no_hang(shield):
    def lock_both(log, nursery):
        one, other = trio.Lock(), trio.Lock()

        async def take(first, second):
            with trio.CancelScope(shield=shield):
                async with first:
                    await trio.lowlevel.checkpoint()
                    async with second:
                        pass

        nursery.start_soon(take, one, other)
        nursery.start_soon(take, other, one)

    run, _ = orders(lock_both)
    result = explore(run, deviations=1, most=100)
    assert isinstance(result.failed[1], Stuck)
    assert "lock_both.<locals>.take" in str(result.failed[1])
    assert result.schedules > 1


def test_a_task_that_never_ends_is_no_hang():
    async def spin(scheduler):
        while True:
            await trio.lowlevel.checkpoint()

    with pytest.raises(Stuck, match="no end after 100 steps"):
        Scheduler(Schedule(), max_steps=100).run(spin)


def test_the_clock_jumps_when_nothing_else_can_run():
    seen = []

    async def main(scheduler):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticks, seen, "a", 50)
            with trio.move_on_after(1000):
                await trio.sleep_forever()
            seen.append(trio.current_time())

    Scheduler(Schedule()).run(main)
    assert seen[:-1] == [f"a{tick}" for tick in range(50)]
    assert 1000 <= seen[-1] < 1000.1


def test_a_step_takes_time_and_so_wakes_who_sleeps():
    seen = []

    async def main(scheduler):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ticks, seen, "a", 50)
            await trio.sleep(0.02)
            seen.append("woken")

    Scheduler(Schedule()).run(main)
    assert 10 < seen.index("woken") < 40


def test_what_a_step_finds_ends_the_run():
    async def main(scheduler):
        def on_step():
            assert len(scheduler.counts) < 5, "found"

        scheduler.on_step = on_step
        scheduler.racing = True
        while True:
            await trio.lowlevel.checkpoint()

    with pytest.raises(AssertionError, match="found"):
        Scheduler(Schedule()).run(main)


def test_something_may_be_done_at_a_step():
    async def main(scheduler):
        with trio.CancelScope() as scope:
            scheduler.at = {7: scope.cancel}
            scheduler.racing = True
            await trio.sleep_forever()

    with pytest.raises(Stuck):  # there is no step 7
        Scheduler(Schedule()).run(main)


def test_sockets_are_waited_for():
    async def main(scheduler):
        scheduler.racing = True
        one, other = trio.socket.socketpair()
        with one, other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.recv, 10)
                nursery.start_soon(other.send, b"x")

    for seed in range(10):
        Scheduler(Dice(seed)).run(main)

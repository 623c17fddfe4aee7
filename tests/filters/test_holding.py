"""What holds requests up: until they are let go, a file is gone, a time is over, or at the end."""

import pytest
import trio
import trio.testing

from nbdserve.filters.holding import Holding


@pytest.fixture
def done():
    return []


async def hold(holding, done, name, *, file=None, owner=None):
    await holding.hold(owner, file)
    done.append(name)


async def test_stuck_until_released(nursery, done):
    holding = Holding()
    for name in "abc":
        nursery.start_soon(hold, holding, done, name)
    await holding.wait_stuck(3)
    assert (holding.stuck, done) == (3, [])
    assert holding.release() == 3
    assert holding.stuck == holding.release() == 0
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(done) == ["a", "b", "c"]
    nursery.start_soon(hold, holding, done, "d")
    await trio.testing.wait_all_tasks_blocked()
    assert holding.stuck == 1
    holding.release()


async def test_who_waits_for_the_stuck_is_woken_when_there_are_enough(nursery, done):
    holding = Holding()

    async def watch():
        await holding.wait_stuck(2)
        done.append("two")

    nursery.start_soon(watch)
    nursery.start_soon(hold, holding, done, "a")
    await trio.testing.wait_all_tasks_blocked()
    assert done == []
    nursery.start_soon(hold, holding, done, "b")
    await trio.testing.wait_all_tasks_blocked()
    assert done == ["two"]
    holding.release()


async def test_one_owner_is_let_go_and_not_the_other(nursery, done):
    holding = Holding()
    nursery.start_soon(hold, holding, done, "a")
    nursery.start_soon(lambda: hold(holding, done, "b", owner="b"))
    await holding.wait_stuck(2)
    holding.let_go("b")
    await trio.testing.wait_all_tasks_blocked()
    assert (done, holding.stuck) == (["b"], 1)
    holding.release()


async def test_all_are_let_go_when_the_file_is_gone_and_one_looks_for_it(autojump_clock, done):
    files, looks = {"f", "g"}, []

    def exists(path):
        looks.append(path)
        return path in files

    holding = Holding(exists)
    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(lambda number=number: hold(holding, done, number, file="f"))
        nursery.start_soon(lambda: hold(holding, done, "g", file="g"))
        nursery.start_soon(lambda: hold(holding, done, "no file"))
        await trio.sleep(1.01)
        assert done == []
        assert 45 <= looks.count("f") <= 52
        files.clear()
        files.add("g")
        await trio.sleep(0.03)
        assert sorted(done) == [*range(10)]
        assert holding.stuck == 2
        files.clear()
        await trio.sleep(0.03)
        assert done[-1] == "g"
        holding.release()
    count = len(looks)
    await trio.sleep(10)
    assert len(looks) == count


async def test_another_looks_for_the_file_if_who_did_is_cancelled_or_released(
    autojump_clock, done
):
    files = {"f"}
    holding = Holding(files.__contains__)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(lambda: hold(holding, done, "a", file="f"))
                await holding.wait_stuck(1)
                nursery.start_soon(lambda: hold(holding, done, "b", file="f", owner=1))
                nursery.start_soon(lambda: hold(holding, done, "c", file="f", owner=2))
                await holding.wait_stuck(3)
                scope.cancel()
        assert (holding.stuck, done) == (2, [])
        await trio.sleep(0.1)
        holding.let_go(1)
        await trio.sleep(0.1)
        assert done == ["b"]
        files.clear()
        await trio.sleep(0.03)
        assert done == ["b", "c"]


async def test_what_is_cancelled_leaves_nothing_behind(autojump_clock):
    holding = Holding(lambda path: True)
    for file in (None, "f"):
        with trio.move_on_after(1) as scope:
            await holding.hold(None, file)
        assert scope.cancelled_caught
    with trio.move_on_after(1) as scope:
        await holding.sleep(None, 10)
    assert scope.cancelled_caught
    assert holding.stuck == holding.release() == 0
    assert not holding._held
    assert not holding._lookouts


async def test_a_time_is_waited_for_and_cut_short_by_its_owner(autojump_clock, nursery):
    holding = Holding()
    start = trio.current_time()
    await holding.sleep(1, 5)
    assert trio.current_time() - start == pytest.approx(5)
    nursery.start_soon(holding.sleep, 1, 1000)
    nursery.start_soon(holding.sleep, 2, 3)
    await trio.testing.wait_all_tasks_blocked()
    assert (holding.stuck, holding.release()) == (0, 0)  # it is not stuck, it only takes long
    holding.let_go(1)
    await trio.sleep(4)
    assert not holding._held


async def test_drained_it_holds_nobody_up(autojump_clock):
    holding = Holding(lambda path: True)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(holding.hold, 1, None)
        nursery.start_soon(holding.hold, 1, "f")
        nursery.start_soon(holding.sleep, 1, 1000)
        await trio.testing.wait_all_tasks_blocked()
        holding.drain_begin()
    await holding.hold(1, None)
    await holding.sleep(1, 1000)
    assert trio.current_time() == start

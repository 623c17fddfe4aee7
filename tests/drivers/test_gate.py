"""The write gate: who waits for whom."""

import pytest

from nbdserve.drivers.gate import WriteGate


@pytest.fixture
def gate():
    return WriteGate()


def enter(gate, log, name, start, end, *, alone=False):
    return gate.enter(start, end, lambda: log.append(name), serialising=alone)


def test_writes_of_whole_blocks_do_not_wait_for_each_other(gate):
    log = []
    enter(gate, log, "a", 0, 10)
    enter(gate, log, "b", 5, 15)
    assert log == ["a", "b"]


def test_one_that_rewrites_waits_for_all_earlier_and_all_later_for_it(gate):
    log = []
    a = enter(gate, log, "a", 0, 10)
    b = enter(gate, log, "b", 5, 15)
    c = enter(gate, log, "c", 8, 9, alone=True)
    enter(gate, log, "d", 8, 20)
    enter(gate, log, "e", 9, 20)  # only touches
    assert log == ["a", "b", "e"]
    gate.leave(a)
    assert log == ["a", "b", "e"]
    gate.leave(b)
    assert log[3:] == ["c"]
    gate.leave(c)
    assert log[4:] == ["d"]


def test_two_that_rewrite_come_in_order(gate):
    log = []
    tokens = [enter(gate, log, name, 0, 10, alone=True) for name in "abc"]
    for done, name in enumerate("abc"):
        assert log[-1] == name
        gate.leave(tokens[done])
    assert gate.statistics() == (0, 0)


def test_who_gives_up_waiting_holds_nobody(gate):
    log = []
    a = enter(gate, log, "a", 0, 10, alone=True)
    b = enter(gate, log, "b", 0, 10, alone=True)
    enter(gate, log, "c", 0, 10, alone=True)
    gate.leave(b)
    gate.leave(a)
    assert log == ["a", "c"]


def test_one_that_fails_at_once_when_it_is_its_turn_lets_the_next_go(gate):
    log = []
    a = enter(gate, log, "a", 0, 20, alone=True)
    tokens = [gate.enter(0, 10, lambda: gate.leave(tokens[0]), serialising=True)]
    enter(gate, log, "c", 10, 20)
    enter(gate, log, "d", 0, 10)
    gate.leave(a)
    assert sorted(log) == ["a", "c", "d"]
    assert gate.statistics() == (2, 0)


def test_a_start_that_fails_leaves_nothing(gate):
    def fail():
        raise OSError(5, "no")

    with pytest.raises(OSError, match="no"):
        gate.enter(0, 10, fail, serialising=True)
    assert gate.statistics() == (0, 0)


def test_entering_at_once_is_for_those_who_meet_nobody_serialising():
    gate, went = WriteGate(), []
    first = gate.enter_nowait(0, 512)
    assert first is not None
    waiting = gate.enter(0, 100, lambda: went.append("part"), serialising=True)
    assert went == []
    assert gate.enter_nowait(4096, 8192) is None
    gate.leave(first)
    assert went == ["part"]
    gate.leave(waiting)
    last = gate.enter_nowait(4096, 8192)
    assert gate.statistics() == (1, 0)
    gate.leave(last)
    assert gate.statistics() == (0, 0)

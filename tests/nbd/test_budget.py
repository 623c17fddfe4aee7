"""The budget's arithmetic: who may hold more, who waits, who is dropped. No sockets, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.nbd.budget import FAREWELL, MEDIUM, MIN_RATE, SMALL, STALL, TICK, Budget

KIB, MIB = 1 << 10, 1 << 20
LIMIT = 16 * MIB


class Holder:
    """A connection as the budget sees it: takes what it asked for as soon as it is granted."""

    def __init__(self, budget):
        self.owes = None
        self.dropped = None
        self.woken = 0
        self.share = budget.open(self.wake, lambda: self.owes, self.drop)

    def wake(self):
        self.woken += 1

    def drop(self, reason):
        self.dropped = reason
        self.share.close()

    def take(self, nb_bytes):
        """Whether it could be begun; it holds it then."""
        if not self.share.may_take(nb_bytes):
            return False
        self.share.set_outgoing(nb_bytes)
        self.share.used()
        return True


def holders(number, limit=LIMIT):
    budget = Budget(limit)
    return budget, [Holder(budget) for _ in range(number)]


def test_below_the_limit_nobody_waits():
    budget, (one, other) = holders(2)
    assert one.take(8 * MIB)
    assert other.take(4 * MIB)
    assert not budget.short
    assert budget.used == 12 * MIB


def test_above_the_limit_small_requests_are_served_and_long_ones_wait():
    budget, (full, small, long) = holders(3)
    full.take(LIMIT)
    full.share.set_incoming(LIMIT)  # it was granted and more came: nobody is granted beside it
    assert budget.short
    assert small.take(SMALL)
    long.take(SMALL + 1)  # the lane is free
    assert not small.share.may_take(SMALL + 1)


def test_who_waits_is_woken_in_order_as_memory_comes_back():
    budget, (first, *others) = holders(4)
    first.take(12 * MIB)
    assert [other.take(8 * MIB) for other in others] == [False] * 3
    assert budget.waiting == 3
    assert budget.short
    first.share.set_outgoing(0)
    assert [other.woken for other in others] == [1, 0, 0]  # of three quarters: long ones
    assert not others[1].take(8 * MIB)
    assert others[0].take(8 * MIB)
    others[0].share.set_outgoing(0)
    assert [other.woken for other in others] == [1, 1, 0]
    assert others[1].take(8 * MIB)
    others[1].share.set_outgoing(0)
    assert others[2].take(8 * MIB)
    others[2].share.set_outgoing(0)
    assert (budget.used, budget.short, budget.waiting) == (0, False, 0)


def test_long_requests_leave_room_for_others():
    _, (long, longer, medium) = holders(3)
    assert long.take(12 * MIB)
    assert not longer.take(4 * MIB)
    assert medium.take(MEDIUM)


@pytest.mark.parametrize("nb_bytes", [MEDIUM, 4 * MIB, 64 * MIB])
def test_memory_that_nobody_gives_back_stops_nobody_for_ever(nb_bytes):
    """All of it is held by those that wait, or were never granted it: one still has a turn."""
    budget, crowd = holders(40)
    for holder in crowd:
        holder.share.set_incoming(MIB)
    assert budget.short
    turns = [holder for holder in crowd if holder.take(nb_bytes)]
    assert len(turns) == 1
    for _ in crowd[1:]:
        turns[-1].share.set_outgoing(0)
        turns[-1].share.set_incoming(0)
        turns += [holder for holder in crowd if holder.woken and holder not in turns]
        assert turns[-1].take(nb_bytes)
    assert len(turns) == len(crowd)


def test_who_leaves_waits_no_more_and_gives_back_what_it_was_granted():
    budget, (first, second, third) = holders(3)
    first.take(12 * MIB)
    assert not second.take(8 * MIB)
    assert not third.take(8 * MIB)
    second.share.close()
    first.share.close()
    assert third.woken == 1
    assert second.woken == 0
    third.share.close()  # without having used it
    assert (budget.used, budget.waiting, budget.short) == (0, 0, False)


def test_the_first_that_waits_leaves_and_the_next_has_its_turn():
    budget, (first, long, short) = holders(3)
    first.take(10 * MIB)
    assert not long.take(12 * MIB)
    assert not short.take(2 * MIB)
    long.share.close()
    assert short.woken == 1
    assert not budget.short


def looks(budget, seconds):
    for _ in range(int(seconds / TICK)):
        budget.look()


def test_who_stands_still_is_dropped_if_others_wait():
    budget, (still, owed, small, waits) = holders(4)
    assert still.take(6 * MIB)
    assert owed.take(6 * MIB)  # waits for us, not we for it
    small.take(SMALL)
    still.owes = small.owes = False
    looks(budget, 10 * STALL)
    assert still.dropped is None  # nobody wanted it
    still.share.moved += MIB
    budget.look()
    assert not waits.take(4 * MIB)
    looks(budget, STALL - TICK)
    assert still.dropped is None
    looks(budget, TICK)
    assert "stood still for 10 s while others waited" in still.dropped
    assert (owed.dropped, small.dropped) == (None, None)
    assert waits.woken == 1


def test_who_moves_is_not_dropped():
    budget, (slow, waits) = holders(2)
    slow.take(12 * MIB)
    slow.owes = False
    assert not waits.take(4 * MIB)
    for _ in range(100):
        slow.share.moved += int(MIN_RATE * TICK)
        budget.look()
    assert slow.dropped is None
    for _ in range(100):
        slow.share.moved += int(MIN_RATE * TICK) - 1
        budget.look()
    assert slow.dropped


def test_who_said_goodbye_and_does_not_read_is_dropped():
    budget, (gone, still) = holders(2)
    gone.take(KIB)
    still.take(KIB)
    gone.owes, still.owes = True, False
    looks(budget, FAREWELL - TICK)
    assert gone.dropped is None
    looks(budget, TICK)
    assert "said goodbye" in gone.dropped
    assert still.dropped is None


@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from(["take", "give", "leave"]),
            st.sampled_from([1, SMALL, SMALL + 1, MIB, MEDIUM + 1, 20 * MIB]),
        ),
        max_size=200,
    )
)
def test_any_order_of_taking_and_giving(steps):
    """The sum is right, and bounded; whoever waits has a turn once the others have given back."""
    budget, crowd = holders(10)
    for number, what, nb_bytes in steps:
        holder = crowd[number]
        if what == "take" and holder.share.held <= SMALL:
            holder.take(nb_bytes)
        elif what == "give":
            holder.share.set_outgoing(0)
        elif what == "leave":
            holder.share.close()
            crowd[number] = Holder(budget)
        assert budget.used == sum(holder.share.held for holder in crowd)
        assert budget.used <= LIMIT + MEDIUM + 20 * MIB + 10 * SMALL
        assert budget.short == (budget.used >= LIMIT or budget.waiting > 0)
    for _ in crowd:
        for holder in crowd:
            holder.share.set_outgoing(0)
            holder.share.used()
    assert (budget.used, budget.waiting) == (0, 0)

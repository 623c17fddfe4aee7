"""A throttle group: one set of buckets, shared by members that take turns.

A *member* is what limits are applied to: a block backend, or a throttle node. Reads and writes
queue apart, each in a *lane*. In a lane the members that have requests waiting are served round
robin, one request each; within a member the oldest goes first. A new request goes at once only if
nobody waits in its lane, else it would jump the queue.

There is no task of its own and no timer: one of those who wait keeps the time for its lane and
serves it when the deadline comes. It is the youngest, so that it does so for long before it must
hand over. Hence a group needs no owner and nothing is left running when it is dropped.

When a deadline comes one request goes without asking the buckets again, as in QEMU: reads and
writes that share a total would otherwise depend on which lane wakes first. After that, more go for
as long as the buckets allow.

Law: what waits is not in the buckets yet, so a request that is cancelled while it waits leaves no
debt behind. All but `admit` is synchronous; trio's thread is the lock.

Follows block/throttle-groups.c of QEMU (throttle_group_co_io_limits_intercept, timer_cb,
throttle_group_config).
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import trio

from nbdserve.block.run import READ, WRITE
from nbdserve.config import ThrottleLimits
from nbdserve.filters.bucket import Buckets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdserve.block.run import Op

__all__ = ["ThrottleGroup", "ThrottleGroups", "ThrottleMember", "ThrottleStatistics"]


class ThrottleStatistics(NamedTuple):
    """Of one member. admitted: requests let go, at once or late; throttled: those of them that had
    to wait; waiting: requests that wait now; seconds_waited: the waits of all that were throttled,
    added up; group, limits: what they wait for, limits as in ThrottleLimits.options()."""

    admitted: int
    throttled: int
    waiting: int
    seconds_waited: float
    group: str
    limits: dict[str, int]


class _Waiter:
    """A request that waits. `event` wakes its task: admitted, or to look again."""

    __slots__ = ("admitted", "event", "member", "nb_bytes")

    def __init__(self, member: ThrottleMember, nb_bytes: int) -> None:
        self.member = member
        self.nb_bytes = nb_bytes
        self.admitted = False
        self.event = trio.Event()


class _Lane:
    """One direction. `turns`: the members, the one whose turn it is first."""

    def __init__(self) -> None:
        self.turns: deque[ThrottleMember] = deque()
        self.waiting: dict[_Waiter, None] = {}  # a set in order of age
        self.deadline = math.inf
        self.timekeeper: _Waiter | None = None

    def wake_timekeeper(self) -> None:
        if self.timekeeper is not None:
            self.timekeeper.event.set()


class ThrottleGroup:
    """Limits under a name, for any number of members."""

    def __init__(self, name: str, limits: ThrottleLimits | None = None) -> None:
        """Without `limits` nothing is limited, until they are set."""
        self.name = name
        self._limits = limits or ThrottleLimits()
        # Made at the first request: a group may be made before trio runs and has a clock.
        self._buckets: Buckets | None = None
        self._lanes = {READ: _Lane(), WRITE: _Lane()}

    @property
    def limits(self) -> ThrottleLimits:
        """The limits in force. Setting them empties the buckets; whoever waits is considered anew.
        A setting needs a running trio."""
        return self._limits

    @limits.setter
    def limits(self, limits: ThrottleLimits) -> None:
        self._limits = limits
        now = trio.current_time()
        self._buckets = Buckets(limits, now)
        for op in (READ, WRITE):
            self._serve(op, now)

    def join(self) -> ThrottleMember:
        """A new member, whose turn comes after those of all others."""
        member = ThrottleMember(self)
        for lane in self._lanes.values():
            lane.turns.append(member)
        return member

    def _current(self, now: float) -> Buckets:
        if self._buckets is None:
            self._buckets = Buckets(self._limits, now)
        return self._buckets

    def _admit_nowait(self, op: Op, nb_bytes: int, *, whatever: bool) -> bool:
        now = trio.current_time()
        buckets = self._current(now)
        if not whatever and (self._lanes[op].waiting or buckets.wait(op, now)):
            return False
        buckets.add(op, nb_bytes)
        return True

    def _take_back(self, op: Op, nb_bytes: int) -> None:
        self._current(trio.current_time()).take_back(op, nb_bytes)

    async def _wait(self, op: Op, waiter: _Waiter) -> None:
        """Return when `waiter` was admitted; cancelled, it is as if it had never come."""
        lane = self._lanes[op]
        lane.waiting[waiter] = None
        waiter.member._queues[op].append(waiter)
        if len(lane.waiting) == 1:
            self._serve(op, trio.current_time())
        try:
            while not waiter.admitted:
                waiter.event = trio.Event()
                if lane.timekeeper in (None, waiter):
                    await self._keep_time(op, waiter)
                else:
                    await waiter.event.wait()
        except trio.Cancelled:
            self._withdraw(op, waiter)
            raise
        finally:
            if lane.timekeeper is waiter:
                lane.timekeeper = next(reversed(lane.waiting), None)
                lane.wake_timekeeper()

    async def _keep_time(self, op: Op, waiter: _Waiter) -> None:
        """Serve the lane when its deadline comes, unless `waiter` is woken before."""
        lane = self._lanes[op]
        lane.timekeeper = waiter
        with trio.move_on_at(lane.deadline):
            await waiter.event.wait()
        now = trio.current_time()
        if not waiter.admitted and now >= lane.deadline:
            self._admit_next(op)
            self._serve(op, now)

    def _withdraw(self, op: Op, waiter: _Waiter) -> None:
        if waiter.admitted:  # after the cancellation, before its task could run
            self._take_back(op, waiter.nb_bytes)
        else:
            del self._lanes[op].waiting[waiter]
            waiter.member._queues[op].remove(waiter)

    def _serve(self, op: Op, now: float) -> None:
        """Admit from the lane while the buckets allow; else set its deadline."""
        lane, buckets = self._lanes[op], self._current(now)
        lane.deadline = math.inf
        while lane.waiting:
            seconds = buckets.wait(op, now)
            if seconds:
                lane.deadline = now + seconds
                break
            self._admit_next(op)
        lane.wake_timekeeper()

    def _admit_next(self, op: Op) -> None:
        """The oldest request of the member whose turn it is goes. Somebody waits."""
        turns = self._lanes[op].turns
        member = next(member for member in turns if member._queues[op])
        turns.remove(member)
        turns.append(member)
        self._admit(op, member._queues[op].popleft())

    def _admit(self, op: Op, waiter: _Waiter) -> None:
        del self._lanes[op].waiting[waiter]
        self._current(trio.current_time()).add(op, waiter.nb_bytes)
        waiter.admitted = True
        waiter.event.set()

    def _let_go(self, member: ThrottleMember) -> None:
        for op, queue in member._queues.items():
            while queue:
                self._admit(op, queue.popleft())

    def _leave(self, member: ThrottleMember) -> None:
        for lane in self._lanes.values():
            lane.turns.remove(member)


class ThrottleMember:
    """One member of a group; made by `ThrottleGroup.join`."""

    def __init__(self, group: ThrottleGroup) -> None:
        self.group = group
        self._queues: dict[Op, deque[_Waiter]] = {READ: deque(), WRITE: deque()}
        self._draining = False
        self._admitted = 0
        self._throttled = 0
        self._seconds_waited = 0.0

    def admit_nowait(self, op: Op, nb_bytes: int) -> bool:
        """Let a request go if it need not wait. False: it was not counted; use `admit`."""
        admitted = self.group._admit_nowait(op, nb_bytes, whatever=self._draining)
        self._admitted += admitted
        return admitted

    def take_back(self, op: Op, nb_bytes: int) -> None:
        """A request that `admit_nowait` let go could not be done now, and will ask again."""
        self._admitted -= 1
        self.group._take_back(op, nb_bytes)

    async def admit(self, op: Op, nb_bytes: int) -> None:
        """Return when a request of that many bytes may go. Not a checkpoint if that is now."""
        if self.admit_nowait(op, nb_bytes):
            return
        since = trio.current_time()
        await self.group._wait(op, _Waiter(self, nb_bytes))
        self._admitted += 1
        self._throttled += 1
        self._seconds_waited += trio.current_time() - since

    def drain_begin(self) -> None:
        """Let go all that wait, and hold nothing up from now on (QEMU: io_limits_disabled). It is
        counted all the same, so other members of the group pay for it."""
        self._draining = True
        self.group._let_go(self)

    def leave(self) -> None:
        """Leave the group; nothing may wait, and nothing be asked, any more."""
        self.group._leave(self)

    def statistics(self) -> ThrottleStatistics:
        """Counters since the member joined."""
        return ThrottleStatistics(
            self._admitted,
            self._throttled,
            sum(len(queue) for queue in self._queues.values()),
            self._seconds_waited,
            self.group.name,
            self.group.limits.options(),
        )


class ThrottleGroups:
    """The groups of a process by name. A group lives as long as it has members, or as this does if
    it was made without any."""

    def __init__(self, limits: Mapping[str, ThrottleLimits] | None = None) -> None:
        """`limits`: groups to begin with."""
        self._groups: WeakValueDictionary[str, ThrottleGroup] = WeakValueDictionary()
        self._made = [ThrottleGroup(name, limit) for name, limit in (limits or {}).items()]
        self._groups.update({group.name: group for group in self._made})

    def join_existing(self, name: str) -> ThrottleMember | None:
        """A new member of the group of that name; None if there is no such group."""
        group = self._groups.get(name)
        return None if group is None else group.join()

    def join(self, name: str, limits: ThrottleLimits) -> ThrottleMember:
        """A new member of the group of that name. Limits, if there are any, replace those that the
        group had: the last one wins, as in QEMU. Needs a running trio."""
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = ThrottleGroup(name, limits)
        elif limits.options():
            group.limits = limits
        return group.join()

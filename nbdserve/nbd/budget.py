"""Memory that clients make the server hold: one budget of bytes for all connections.

What a connection holds between two looks at it is what its client still owes something for: an
incomplete request, requests under way, replies that the client has not read. Each connection could
hold 64 MiB and more; of a thousand no machine has that much. So all that is held is counted here,
in one sum, and there is one bound for it.

Laws:
- Below LIMIT nobody notices. Above it the server is *short*: nothing is refused, but less is
  received, requests wait, and clients feel it as back pressure.
- Whatever others hold, each connection may hold SMALL. So requests up to that length are served
  always: an honest client beside any number of bad ones has its next request answered.
- Longer ones wait their turn, first come first served (`may_take`), in two lanes: up to MEDIUM, and
  longer, which leave a quarter of LIMIT to the others. In each somebody always has a turn: if none
  of those that had one holds anything, the next has it, LIMIT or not. So who waits cannot make all
  others wait, whatever it holds itself.
- Who has one must use it. A client that holds more than SMALL, owes us bytes or leaves ours
  unread, and moves less than MIN_RATE, for STALL, loses its connection, if somebody waits. If
  nobody does it may stand still as long as it likes: it may be a virtual machine that was paused.
  But one that has said goodbye and does not read what it asked for is dropped after FAREWELL.
  (qemu-nbd and nbdkit drop neither, and count nothing but the requests of each connection.)

So the server holds at most LIMIT, twice a longest request (what went over it, and the first of a
lane), and a few times SMALL for each connection.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from nbdserve.block.units import KIB, MIB
from nbdserve.nbd.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CAPACITY", "OUTGOING", "SMALL", "TICK", "Budget", "Share"]

# Bytes. One client that copies an image holds 16 to 64 MiB, so that some of these have no need to
# know of each other; and it is what a small virtual machine can spare.
LIMIT = 256 * MIB

# Bytes that each connection may hold. A thousand hold 64 MiB.
SMALL = 64 * KIB

# Bytes of what no client need think about, as Linux and QEMU split requests, and of a header.
MEDIUM = MIB + 28

# Seconds that a client may stand still: while others wait for its memory, and if it has said
# goodbye. And bytes a second below which it does.
STALL = 10.0
FAREWELL = 60.0
MIN_RATE = 16 * KIB

# Seconds between two looks at all connections.
TICK = 5.0

# Sizes of the buffers that whoever is being served works with: received bytes, replies.
CAPACITY = MIB
OUTGOING = MIB + 272 * KIB


class Share:
    """What one connection holds. `late` is added to and taken from; `incoming` and `outgoing` are
    set."""

    __slots__ = (
        "_budget", "_drop", "_incoming", "_outgoing", "_owes", "_seen", "_still",
        "_still_wanted", "_wake",
        "granted", "held", "moved",
    )  # fmt: skip

    def __init__(
        self,
        budget: Budget,
        wake: Callable[[], None],
        owes: Callable[[], bool | None],
        drop: Callable[[str], None],
    ) -> None:
        self.held = 0  # bytes, what was granted and not used yet included
        self.granted = 0
        self.moved = 0  # bytes that the client has sent or taken while it owed us some
        self._incoming = 0
        self._outgoing = 0
        self._budget = budget
        self._wake = wake
        self._owes = owes
        self._drop = drop
        self._seen = 0
        self._still = self._still_wanted = 0.0  # seconds

    @property
    def short(self) -> bool:
        """Whether the server is."""
        return self._budget.short

    def add(self, nb_bytes: int) -> None:
        """Hold so many more, or fewer."""
        budget = self._budget
        self.held += nb_bytes
        budget.used += nb_bytes
        if budget.short or budget.used >= budget.limit:
            budget.settle()

    def set_incoming(self, nb_bytes: int) -> None:
        """What was received and not executed yet."""
        if nb_bytes != self._incoming:
            more, self._incoming = nb_bytes - self._incoming, nb_bytes
            self.add(more)

    def set_outgoing(self, nb_bytes: int) -> None:
        """Replies that the socket has not taken."""
        if nb_bytes != self._outgoing:
            more, self._outgoing = nb_bytes - self._outgoing, nb_bytes
            self.add(more)

    def may_take(self, nb_bytes: int) -> bool:
        """Whether a request of that length can be begun. If not, `wake` is called when it can."""
        return nb_bytes <= max(SMALL, self.granted) or self._budget.grant(self, nb_bytes)

    def grant(self, nb_bytes: int) -> None:
        """From now on so much is held for the request that waits, and for no earlier one."""
        more, self.granted = nb_bytes - self.granted, nb_bytes
        self.held += more
        self._budget.used += more

    def used(self) -> None:
        """What was granted is counted by itself from now on, or not needed."""
        if self.granted:
            granted, self.granted = self.granted, 0
            self.add(-granted)

    def close(self) -> None:
        """The connection has ended; requests under way go on and are still counted."""
        self._budget.forget(self)
        self.set_incoming(0)
        self.set_outgoing(0)
        self.used()
        self._budget.settle()  # it may have been the first of those that wait

    def wake(self) -> None:
        """It has its turn."""
        self._wake()

    def look(self, *, wanted: bool) -> None:
        """One TICK has passed. `wanted`: others wait for memory."""
        moved, self._seen = self.moved - self._seen, self.moved
        leaving = self._owes()
        if leaving is None or moved >= MIN_RATE * TICK:
            self._still = self._still_wanted = 0.0
            return
        self._still += TICK
        self._still_wanted = self._still_wanted + TICK if wanted and self.held > SMALL else 0.0
        if self._still_wanted >= STALL:
            self._drop(f"stood still for {STALL:g} s while others waited for the memory it held")
        elif leaving and self._still >= FAREWELL:
            self._drop(f"said goodbye and has not read its replies for {FAREWELL:g} s")


class _Lane:
    """Who waits for memory in order of arrival, and who was granted some."""

    def __init__(self, bound: int) -> None:
        self.waiting: deque[tuple[Share, int]] = deque()
        self._bound = bound
        self._granted: set[Share] = set()

    def has_room(self, used: int, nb_bytes: int) -> bool:
        if used + nb_bytes <= self._bound:
            return True
        self._granted = {share for share in self._granted if share.held > SMALL}
        return not self._granted

    def give(self, share: Share) -> None:
        self._granted.add(share)

    def wait(self, share: Share, nb_bytes: int) -> None:
        # What it was granted before is done, or nothing but its replies or its own turn here is
        # left of it: it must not keep the lane waiting for itself.
        self._granted.discard(share)
        if all(waiting is not share for waiting, _ in self.waiting):
            self.waiting.append((share, nb_bytes))

    def forget(self, share: Share) -> None:
        self._granted.discard(share)
        self.waiting = deque(entry for entry in self.waiting if entry[0] is not share)


class Budget:
    """That of a server. `used`: bytes held; `short`: it is time to hold no more.

    `receiving` and `sending` are the buffers that connections work with while they are served; one
    that holds nothing has none of its own.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = LIMIT if limit is None else limit
        self.used = 0
        self.short = False  # an attribute, not a property: looked at for each batch
        self.receiving = Scratch(CAPACITY)
        self.sending = Scratch(OUTGOING)
        self._shares: set[Share] = set()
        self._lanes = (_Lane(self.limit), _Lane(self.limit - self.limit // 4))

    def open(
        self,
        wake: Callable[[], None],
        owes: Callable[[], bool | None],
        drop: Callable[[str], None],
    ) -> Share:
        """A connection's. `wake`: what it waited for is granted. `owes`: None if it waits for us,
        else whether it has said goodbye. `drop(why)`: end it."""
        share = Share(self, wake, owes, drop)
        self._shares.add(share)
        return share

    def forget(self, share: Share) -> None:
        """Its connection has ended; it waits for nothing any more."""
        self._shares.discard(share)
        for lane in self._lanes:
            lane.forget(share)

    @property
    def waiting(self) -> int:
        """How many connections wait to hold more."""
        return sum(len(lane.waiting) for lane in self._lanes)

    def grant(self, share: Share, nb_bytes: int) -> bool:
        """Now, or `share` waits for it."""
        self._lanes[nb_bytes > MEDIUM].wait(share, nb_bytes)
        self.settle()
        return share.granted >= nb_bytes

    def settle(self) -> None:
        """`used` has changed: who has a turn now?"""
        woken = []
        for lane in self._lanes:
            while lane.waiting and lane.has_room(self.used, lane.waiting[0][1]):
                share, nb_bytes = lane.waiting.popleft()
                share.grant(nb_bytes)
                lane.give(share)
                woken.append(share)
        self.short = self.used >= self.limit or self.waiting > 0
        for share in woken:
            share.wake()

    def look(self) -> None:
        """One TICK has passed: drop who stands still."""
        wanted = self.waiting > 0
        for share in list(self._shares):
            share.look(wanted=wanted)

    def statistics(self) -> dict[str, int]:
        """Bytes held, and how many connections wait to hold more."""
        return {"held": self.used, "waiting": self.waiting}

"""The fault filter: a node that does to requests what its faults say, and passes on the rest.

Above a format it is the guest's disk that fails, below one the host's file. `FaultNode.faults` is
how whoever holds the node adds faults, takes them away and lets go what is stuck; what meets a
fault is said in the log.

While there are faults its ranges do not resolve and no flush takes a short way, so every request
comes by here; while there are none it is not there. A write with FUA is one request: what makes it
durable is asked of the node below from here and meets no fault of its own. A write that is gathered
from several buffers is one, too.

Decisions are injector.py's, waiting is holding.py's, a disk that is full is room.py's. A request
waits first, as all that it meets say and in their order, and is done or fails then. Those that wait
say so to the front end (`on_wait`).
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from nbdserve.block.filter import FilterNode
from nbdserve.block.run import READ, WRITE, Miss
from nbdserve.config import RateLimit, ThrottleLimits
from nbdserve.errors import DisconnectError
from nbdserve.filters.holding import Holding
from nbdserve.filters.injector import Injector, flip_bits, pieces_done
from nbdserve.filters.room import NoRoomError, Room
from nbdserve.filters.throttle_group import ThrottleGroup

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from nbdserve.block.node import Buffer, Done, Extent, Node
    from nbdserve.block.run import Op, Resolution
    from nbdserve.faults import Fault
    from nbdserve.filters.injector import Hit, Rule
    from nbdserve.filters.throttle_group import ThrottleMember

    Whole = Callable[[], Awaitable[None]]
    Part = Callable[[int, int], Awaitable[None]]

__all__ = ["FaultControl", "FaultNode"]

log = logging.getLogger("nbdserve.faults")


class _Request(NamedTuple):
    op: str
    offset: int = 0
    length: int = 0

    def __str__(self) -> str:
        if self.op == "flush":
            return self.op
        return f"{self.op} of {self.length} bytes at {self.offset}"


class FaultControl:
    """The faults of a node. All is synchronous but `wait_stuck`, and for trio's thread."""

    def __init__(self, file: Node, seed: int, room: int | None) -> None:
        self._injector = Injector(seed)
        self._holding = Holding()
        self._room = Room(file, room)
        self._bandwidths: dict[Rule, ThrottleMember] = {}
        self._draining = False

    def add(self, fault: Fault) -> Rule:
        """One more fault, behind all others: a handle, which counts what it `matched` and where
        it was `injected`."""
        rule = self._injector.add(fault)
        if fault.bps and not self._draining:
            limits = ThrottleLimits(bps_total=RateLimit(fault.bps))
            self._bandwidths[rule] = ThrottleGroup(f"faults.{rule.number}", limits).join()
        return rule

    def remove(self, rule: Rule) -> None:
        """It happens no more, and what it holds up is let go. Raises ValueError: there is none."""
        self._injector.rules.remove(rule)
        self._holding.let_go(rule)
        bandwidth = self._bandwidths.pop(rule, None)
        if bandwidth is not None:
            bandwidth.drain_begin()

    def clear(self) -> None:
        """Remove all."""
        for rule in [*self._injector.rules]:
            self.remove(rule)

    def release(self) -> int:
        """Let go all that are stuck; how many that were."""
        return self._holding.release()

    @property
    def stuck(self) -> int:
        """How many requests are stuck."""
        return self._holding.stuck

    async def wait_stuck(self, number: int = 1) -> None:
        """Return once so many requests are stuck, or more."""
        await self._holding.wait_stuck(number)

    @property
    def room(self) -> int | None:
        """Bytes of new space that are left; None: any number. May be set."""
        return self._room.left

    @room.setter
    def room(self, left: int | None) -> None:
        self._room.left = left

    @property
    def seed(self) -> int:
        """What all that is random depends on."""
        return self._injector.seed

    @property
    def is_idle(self) -> bool:
        """Whether no request can meet anything."""
        return not self._injector.rules and self.room is None

    def drain_begin(self) -> None:
        """Let go all that is held up, and hold nothing up from now on."""
        self._draining = True
        self._holding.drain_begin()
        while self._bandwidths:
            self._bandwidths.popitem()[1].drain_begin()

    def statistics(self) -> dict[str, object]:
        """seed, room, stuck, and of each rule by its number what it matched and did."""
        return {
            "seed": self.seed,
            "room": self.room,
            "stuck": self.stuck,
            "rules": {
                str(rule.number): {"matched": rule.matched, "injected": rule.injected}
                for rule in self._injector.rules
            },
        }


class FaultNode(FilterNode):
    """A child that goes wrong."""

    driver = "fault"

    def __init__(
        self,
        file: Node,
        faults: Iterable[Fault] = (),
        *,
        seed: int = 0,
        room: int | None = None,
    ) -> None:
        """`room`: bytes of new space that the disk has left; None: no end of it."""
        super().__init__(file)
        self.faults = FaultControl(file, seed, room)
        for fault in faults:
            self.faults.add(fault)
        log.info("%s: faults by seed %d", self.filename, seed)

    # --- what becomes of a request -------------------------------------------------------------

    def _note(self, hit: Hit, request: _Request, what: str) -> None:
        number, match = hit.rule.number, hit.match
        log.info("%s: %s %s [fault %d, match %d]", self._label, request, what, number, match)

    @property
    def _label(self) -> str:
        """What the user calls it, or the image."""
        given = self.node_name and not self.node_name.startswith("#")
        return self.node_name if given else self.filename

    async def _meet(self, request: _Request) -> list[Hit]:
        """Hold a request up as its faults say. Raises OSError if it fails with nothing done; else
        what it meets, of which the last may say what becomes of it."""
        hits = self.faults._injector.decide(*request)
        if not hits:
            return hits
        self.on_wait(1)
        try:
            for hit in hits:
                await self._hold_up(hit, request)
        finally:
            self.on_wait(-1)
        fault = hits[-1].fault
        if fault.disconnect:
            self._note(hits[-1], request, "has no reply, its client is dropped")
            raise DisconnectError
        if fault.error and fault.short is None and not fault.torn:
            self._note(hits[-1], request, f"fails with {fault.error}")
            raise _os_error(fault)
        return hits

    async def _hold_up(self, hit: Hit, request: _Request) -> None:
        fault, holding = hit.fault, self.faults._holding
        seconds = hit.seconds()
        if seconds:
            self._note(hit, request, f"is held up for {seconds:.6f} s")
            await holding.sleep(hit.rule, seconds)
        if fault.bps:
            self._note(hit, request, f"shares {fault.bps} bytes a second")
            member = self.faults._bandwidths.get(hit.rule)
            if member is not None:  # neither removed meanwhile nor draining
                await member.admit(READ if request.op == "read" else WRITE, request.length)
        if fault.stuck:
            self._note(hit, request, "is stuck")
            await holding.hold(hit.rule, hit.rule.file)
            self._note(hit, request, "is let go")

    async def _change(self, request: _Request, whole: Whole, part: Part | None = None) -> None:
        """Do what changes the disk, or as much of it as its faults leave. `part` does a piece."""
        hits = await self._meet(request)
        hit = hits[-1] if hits else None
        if hit is None or not hit.fault.ends:
            await self._with_room(request, whole)
            return
        if part is None or not request.length:
            pieces = []
        else:
            pieces = pieces_done(hit, request.offset, request.length)
        done = ", ".join(f"{length} bytes at {offset}" for offset, length in pieces) or "nothing"
        number = hit.fault.errno
        end = "claims success" if number is None else f"fails with {os.strerror(number)}"
        self._note(hit, request, f"has {done} done, and {end}")
        for offset, length in pieces:
            assert part is not None
            await self._with_room(request, partial(part, offset, length))
        if number is not None:
            raise _os_error(hit.fault)

    async def _with_room(self, request: _Request, do: Whole) -> None:
        try:
            await do()
        except NoRoomError as error:
            needed, left = error.needed, error.left
            log.info(
                "%s: %s fails with ENOSPC: it needs %d bytes of room, %d are left [room]",
                self._label, request, needed, left,
            )  # fmt: skip
            raise

    # --- requests ------------------------------------------------------------------------------

    async def read(self, offset: int, buffer: memoryview) -> None:
        request = _Request("read", offset, len(buffer))
        hits = await self._meet(request)
        await self.file.read(offset, buffer)
        for hit in hits:
            if hit.fault.flip_bits:
                bits = flip_bits(hit, offset, buffer)
                places = ", ".join(f"{bit % 8} of byte {bit // 8}" for bit in bits)
                self._note(hit, request, f"has bit {places} flipped")

    async def write(self, offset: int, data: Buffer) -> None:
        await self._write(self._store, offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        await self._write(self._store_durably, offset, data)
        return True

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        await self._write(self._store, offset, data[0] if len(data) == 1 else b"".join(data))

    async def _write(
        self, store: Callable[[int, Buffer], Awaitable[None]], offset: int, data: Buffer
    ) -> None:
        view = memoryview(data)

        async def part(start: int, length: int) -> None:
            await self._store(start, view[start - offset : start - offset + length])

        await self._change(_Request("write", offset, len(view)), partial(store, offset, view), part)

    async def _store(self, offset: int, data: Buffer) -> None:
        async with self.faults._room.taken(offset, len(data)):
            await self.file.write(offset, data)

    async def _store_durably(self, offset: int, data: Buffer) -> None:
        async with self.faults._room.taken(offset, len(data)):
            durable = await self.file.write_fua(offset, data)
        if not durable:
            await self.file.flush()

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        room = self.faults._room

        async def part(offset: int, length: int) -> None:
            # Zeroes that stay allocated take room like a write, others can only give it back.
            space = room.given_back if may_unmap else room.taken
            async with space(offset, length):
                await self.file.write_zeroes(
                    offset, length, may_unmap=may_unmap, fallback=fallback
                )

        request = _Request("write-zeroes", offset, length)
        await self._change(request, partial(part, offset, length), part)

    async def discard(self, offset: int, length: int) -> None:
        async def whole() -> None:
            async with self.faults._room.given_back(offset, length):
                await self.file.discard(offset, length)

        await self._change(_Request("discard", offset, length), whole)

    async def flush(self) -> None:
        await self._change(_Request("flush"), self.file.flush)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._meet(_Request("block-status", offset, length))
        return await self.file.block_status(offset, length)

    # --- the node ------------------------------------------------------------------------------

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        return self.file.resolve(op, offset, length) if self.faults.is_idle else Miss.OPAQUE

    def allocate_nowait(self, offset: int, data: Buffer) -> bool:
        return self.faults.is_idle and self.file.allocate_nowait(offset, data)

    def flush_nowait(self) -> bool:
        return self.faults.is_idle and self.file.flush_nowait()

    def submit_flush(self, done: Done) -> bool:
        return self.faults.is_idle and self.file.submit_flush(done)

    def drain_begin(self) -> None:
        self.faults.drain_begin()

    def statistics(self) -> dict[str, object]:
        return self.faults.statistics()


def _os_error(fault: Fault) -> OSError:
    assert fault.errno is not None
    return OSError(fault.errno, f"{os.strerror(fault.errno)} (a fault)")

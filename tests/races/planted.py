"""Bugs of the kinds that races make, to be planted: each must be found, or the tests test nothing.

Each is a context manager that patches the product, and says in its first line what is wrong then.
`PLANTED`: where each is looked for, and how many schedules that may take at most.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import trio

from nbdserve.block.backend import BlockBackend
from nbdserve.block.rangelock import RangeLock
from nbdserve.formats.qcow2 import allocation, discard
from nbdserve.formats.qcow2 import node as node_module
from nbdserve.formats.qcow2.allocation import Allocation
from nbdserve.formats.qcow2.node import Qcow2Node
from nbdserve.formats.qcow2.quarantine import Quarantine
from nbdserve.formats.qcow2.refcount import Refcounts, free_runs
from nbdserve.formats.qcow2.tables import Table
from nbdserve.nbd.connection import Connection
from nbdserve.nbd.late import LateRequests
from races.images import C
from races.scheduler import Dice, Result, Schedule, explore
from races.world import QUICK, SUBMIT, Case, Op, explore_cuts, run_case

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractContextManager

    from nbdserve.formats.qcow2.image import Image

__all__ = ["PLANTED", "Plant"]

patch = mock.patch.object


# --- the quarantine ------------------------------------------------------------------------------


@contextlib.contextmanager
def quarantine_ignores_epochs() -> Iterator[None]:
    """What is durably unlinked is handed out, whoever is still reading it."""

    def release(self: Quarantine) -> list[int]:
        released = [cluster for _, group in self._durable for cluster in group]
        self._durable = []
        return sorted(released)

    with patch(Quarantine, "release", release):
        yield


@contextlib.contextmanager
def submitted_in_no_epoch() -> Iterator[None]:
    """A request by callback leaves its epoch when it is submitted, not when it is done."""

    def submit(
        self: BlockBackend,
        submit: Callable[..., None],
        host_offset: int,
        data: object,
        done: Callable[..., None],
    ) -> None:
        submit(host_offset, data, done)

    with patch(BlockBackend, "_submit", submit):
        yield


@contextlib.contextmanager
def discarded_after_it_is_free() -> Iterator[None]:
    """A cluster's room is given back to the file when somebody else may have it already."""
    lower = Refcounts.lower

    async def late(self: Refcounts, clusters: list[int]) -> int:
        discards: list[tuple[int, int]] = []

        async def later(offset: int, length: int) -> None:
            discards.append((offset, length))

        with patch(self._file, "discard", later):
            done = await lower(self, clusters)
        for offset, length in discards:
            await self._file.discard(offset, length)
        return done

    with patch(Refcounts, "lower", late):
        yield


# --- locks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def the_range_lock_does_nothing() -> Iterator[None]:
    """Whoever changes a mapping does it beside others who do."""

    @contextlib.asynccontextmanager
    async def hold(self: RangeLock, first: int, last: int) -> AsyncIterator[None]:
        yield

    with patch(RangeLock, "hold", hold):
        yield


@contextlib.contextmanager
def the_range_lock_waits_for_one() -> Iterator[None]:
    """Of those who hold the range or wait for it only the first is waited for."""
    overlapping = RangeLock._overlapping

    def one(self: RangeLock, first: int, last: int) -> list[trio.Event]:
        return overlapping(self, first, last)[:1]

    with patch(RangeLock, "_overlapping", one):
        yield


@contextlib.contextmanager
def the_range_lock_wakes_nobody() -> Iterator[None]:
    """Who waits for a range is not told that it is free."""

    @contextlib.asynccontextmanager
    async def hold(self: RangeLock, first: int, last: int) -> AsyncIterator[None]:
        entry = (first, last, trio.Event())
        earlier = self._overlapping(first, last)
        self._entries.append(entry)
        for gone in earlier:
            await gone.wait()
        yield
        self._entries.remove(entry)

    with patch(RangeLock, "hold", hold):
        yield


@contextlib.contextmanager
def the_synchronous_way_asks_no_lock() -> Iterator[None]:
    """A write that allocates at once does it under one that waits for its data."""
    with patch(RangeLock, "is_free", lambda self, first, last: True):
        yield


@contextlib.contextmanager
def a_hole_punched_after_the_answer() -> Iterator[None]:
    """A cluster of the data file is punched when it may have been written again."""
    punch = discard.punch

    async def later(image: Image, clusters: list[int]) -> None:
        trio.lowlevel.spawn_system_task(punch, image, clusters)

    with patch(discard, "punch", later):
        yield


# --- what was read before an await ---------------------------------------------------------------


@contextlib.contextmanager
def a_table_kept_across_an_await() -> Iterator[None]:
    """The L2 table is looked up before the data is written, and linked into afterwards."""
    write, link = allocation._write_data, Allocation.link

    async def look_up_first(image, reader, new, clusters, extent, offset, data):  # noqa: ANN001, ANN202
        new.kept = await image.table(offset)
        await write(image, reader, new, clusters, extent, offset, data)

    def link_there(self: Allocation, table: Table, index: int) -> None:
        link(self, getattr(self, "kept", table), index)

    with patch(allocation, "_write_data", look_up_first), patch(Allocation, "link", link_there):
        yield


@contextlib.contextmanager
def a_search_twice() -> Iterator[None]:
    """Two who look for free clusters in one refcount block both add what they find."""

    async def search(self: Refcounts) -> None:
        index = self._searched
        block = await self.blocks.get(index)
        low = index << self._geometry.block_bits
        found = free_runs(block.entries, min(self._geometry.block_entries, self._end - low))
        self._searched = index + 1
        self._free[:0] = [(low + first, count) for first, count in found]

    with patch(Refcounts, "_search_next_block", search):
        yield


@contextlib.contextmanager
def a_table_in_flight_counts_as_clean() -> Iterator[None]:
    """A table is dropped from the cache while it is being written, and read again too soon."""
    with patch(Table, "clean", property(lambda self: not self.dirty)):
        yield


@contextlib.contextmanager
def zeroes_rounded_to_clusters() -> Iterator[None]:
    """A write-zeroes takes whole clusters where the rest reads as zeroes now (QEMU 7.2)."""
    write_zeroes = node_module.write_zeroes

    async def rounded(image: Image, offset: int, length: int, **options: object) -> None:
        start, end = offset - offset % C, min(offset + length + -(offset + length) % C, 200 * C)
        if await discard._reads_as_zeroes(image, start, offset):
            length += offset - start
            offset = start
        if await discard._reads_as_zeroes(image, offset + length, end):
            length = end - offset
        await write_zeroes(image, offset, length, **options)  # type: ignore[arg-type]

    with patch(node_module, "write_zeroes", rounded):
        yield


# --- what is durable -----------------------------------------------------------------------------


@contextlib.contextmanager
def a_flush_joins_one_that_runs() -> Iterator[None]:
    """A flush is answered with one that had begun before it was asked for."""
    flush = Qcow2Node.flush

    async def join(self: Qcow2Node) -> None:
        if self._flush_lock.locked():
            async with self._flush_lock:
                return
        await flush(self)

    with patch(Qcow2Node, "flush", join):
        yield


@contextlib.contextmanager
def the_write_cache_is_looked_at_once() -> Iterator[None]:
    """A write that was under way when the write cache was turned off is not flushed."""
    with patch(BlockBackend, "_written", lambda self, done, error: done(error)):
        yield


# --- what is left over by who was cut off --------------------------------------------------------


@contextlib.contextmanager
def a_waiting_lock_left_behind() -> Iterator[None]:
    """Who is cut off while waiting for a range leaves its place in the queue behind."""

    @contextlib.asynccontextmanager
    async def hold(self: RangeLock, first: int, last: int) -> AsyncIterator[None]:
        earlier = self._overlapping(first, last)
        entry = (first, last, trio.Event())
        self._entries.append(entry)
        for gone in earlier:
            await gone.wait()
        try:
            yield
        finally:
            self._entries.remove(entry)
            entry[2].set()

    with patch(RangeLock, "hold", hold):
        yield


@contextlib.contextmanager
def an_epoch_left_behind() -> Iterator[None]:
    """Who is cut off stays in its epoch, and nothing leaves quarantine any more."""

    @contextlib.contextmanager
    def request(self: BlockBackend, kind: str, offset: int, length: int) -> Iterator[None]:
        epoch = self._epochs.enter()
        yield
        self._epochs.leave(epoch)

    with patch(BlockBackend, "_request", request):
        yield


@contextlib.contextmanager
def an_allocation_left_behind() -> Iterator[None]:
    """Who is cut off between taking clusters and linking them forgets them."""
    with patch(Allocation, "__exit__", lambda self, *error: None):
        yield


# --- the front end -------------------------------------------------------------------------------


@contextlib.contextmanager
def a_buffer_given_back_when_its_client_leaves() -> Iterator[None]:
    """The engine still reads into it, or writes from it."""
    submit, close = LateRequests._submit, LateRequests.close_account
    lent: dict[tuple[LateRequests, int], memoryview] = {}

    def keep(self, way, offset, data, done, buffer) -> bool:  # noqa: ANN001
        key = self, id(buffer)
        lent[key] = buffer

        def completed(error: OSError | None) -> None:
            if lent.pop(key, None) is not None:
                done(error)

        taken = submit(self, way, offset, data, completed, buffer)
        if not taken:
            lent.pop(key, None)
        return taken

    def give_all(self: LateRequests) -> None:
        close(self)
        for key in [key for key in lent if key[0] is self]:
            self._buffers.give(lent.pop(key))
            self.in_flight -= 1

    with patch(LateRequests, "_submit", keep), patch(LateRequests, "close_account", give_all):
        yield


@contextlib.contextmanager
def a_buffer_given_back_before_it_is_sent() -> Iterator[None]:
    """The rest of a reply that did not fit into the socket is taken from it later."""
    send = Connection._send_replies

    def send_and_give(self: Connection) -> None:
        send(self)
        self._outbox._give_lent()

    with patch(Connection, "_send_replies", send_and_give):
        yield


# --- where they are looked for -------------------------------------------------------------------


class Plant(NamedTuple):
    """`most`: schedules. `cut`: each actor is cut off at every step in turn, too."""

    bug: Callable[[], AbstractContextManager[None]]
    case: Case
    most: int
    cut: bool = False

    def hunt(self) -> Result:
        """Look for it, planted or not."""
        if not self.cut:
            return explore(partial(run_case, self.case), deviations=2, most=self.most)
        done = 0
        for who in range(len(self.case.actors)):
            result = explore_cuts(self.case, [Schedule, partial(Dice, 0)], who=who)
            done += result.schedules
            if result.failed:
                break
        return Result(done, result.failed)


REUSE = (Op("discard", 0, 8 * C), Op("flush"), Op("write", 100 * C, 9 * C), Op("flush"))

PLANTED = [
    Plant(quarantine_ignores_epochs, Case("plain", ((Op("read", 0, 3 * C),), REUSE)), 20),
    Plant(
        submitted_in_no_epoch,
        Case("plain", ((Op("read", 0, 3 * C, way=SUBMIT),), REUSE), warm=True),
        20,
    ),
    Plant(
        discarded_after_it_is_free,
        Case("plain", (REUSE, (Op("write", 120 * C, 9 * C), Op("write", 150 * C, 9 * C)))),
        30,
    ),
    Plant(
        the_range_lock_does_nothing,
        Case("backing", ((Op("write", 20 * C, 100),), (Op("write", 20 * C + 200, 100),))),
        20,
    ),
    Plant(
        the_range_lock_wakes_nobody,
        Case("backing", ((Op("write", 20 * C, 100),), (Op("write", 20 * C + 200, 100),))),
        20,
    ),
    Plant(
        the_range_lock_waits_for_one,
        # Which locks both clusters, and then changes the first alone: they are not of one kind.
        Case(
            "backing",
            ((Op("write", 11 * C, C + 100),),
             *((Op("write", 12 * C + n * 150, 100),) for n in (1, 2))),
        ),
        100,
    ),
    Plant(
        the_synchronous_way_asks_no_lock,
        Case(
            "plain",
            ((Op("write", 21 * C, C), Op("write", 20 * C, 100)),
             (Op("write", 20 * C + 200, 100, way=QUICK),)),
        ),
        50,
    ),
    Plant(
        a_hole_punched_after_the_answer,
        Case("data file", ((Op("discard", 0, 2 * C),), (Op("write", 0, 2 * C), Op("write", 0, C)))),
        20,
    ),
    Plant(
        a_table_kept_across_an_await,
        Case(
            "plain",
            ((Op("write", 20 * C, C),),
             (Op("write", 70 * C, C), Op("write", 130 * C, C), Op("flush"), Op("read", 0, C))),
            tables=1,
        ),
        20,
    ),
    Plant(a_search_twice, Case("plain", tuple((Op("write", n * C, C),) for n in (20, 30))), 20),
    Plant(
        a_table_in_flight_counts_as_clean,
        Case(
            "plain",
            ((Op("write", 20 * C, C), Op("flush")), (Op("write", 130 * C, C), Op("read", 64 * C, C),
                                                     Op("write", 20 * C, 2 * C))),
            tables=1,
            refuses=True,
        ),
        30,
    ),
    Plant(
        zeroes_rounded_to_clusters,
        Case("plain", ((Op("zero", 20 * C, 256),), (Op("write", 20 * C + 256, 256),))),
        20,
    ),
    Plant(
        a_flush_joins_one_that_runs,
        Case("plain", tuple((Op("write", n * C, C), Op("flush")) for n in (20, 30)), warm=True),
        30,
    ),
    Plant(
        the_write_cache_is_looked_at_once,
        Case("plain", ((Op("write", 5 * C, C, way=SUBMIT),), (Op("cache"),)), warm=True),
        20,
    ),
    Plant(
        a_waiting_lock_left_behind,
        Case("backing", ((Op("write", 20 * C, 100),), (Op("write", 20 * C + 200, 100),))),
        100,
        cut=True,
    ),
    Plant(
        an_epoch_left_behind,
        Case("plain", ((Op("read", 0, 3 * C),), (Op("discard", 4 * C, C),))),
        50,
        cut=True,
    ),
    Plant(
        an_allocation_left_behind,
        Case("plain", ((Op("write", 130 * C, C),), (Op("flush"),)), refuses=True),
        50,
        cut=True,
    ),
]  # fmt: skip

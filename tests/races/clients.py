"""Clients of the real front end, one of whom dies at a given step.

A Poller and Connections over socket pairs, in front of a qcow2 image (images.py), under the
scheduler: a client's death comes before any step of the whole server, so at each of its awaits.
The poller looks at a clock of its own, which moves with each look; a socket pair passes bytes at
once; so here too everything follows from the schedule.

`Death` is how it goes: it closes its socket, closes the half that it sends by, is cut off as a
server does with those who hold it up, or the whole server stops, in order or, a moment later,
cutting off all that runs.

The others must be served as if nothing had happened: every request answered without an error and
each read as history.py allows, no byte of a buffer that belongs to somebody else by then
(tests/poisoned.py), and in the end every buffer given back once, no request left, the image sound
and without leaks.
"""

from __future__ import annotations

import enum
import itertools
from typing import TYPE_CHECKING
from unittest import mock

import trio

from nbdserve.nbd import poller as poller_module
from nbdserve.nbd.poller import Poller
from poisoned import PoisonedPool
from qcow2_model import Disk, Request, pattern, read_all
from races.history import History
from races.images import SIZE, C, prepared
from races.scheduler import Result, Schedule, Scheduler
from races.world import Judge, assert_closed
from transmission import FLUSH, FUA, NO_HOLE, TRIM, WRITE_ZEROES, Client, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.block.backend import BlockBackend
    from races.history import Interval

__all__ = ["Death", "explore_deaths", "run_clients"]


class Death(enum.Enum):
    """How the first client goes."""

    CLOSED = "its socket is closed"
    HALF_CLOSED = "it sends no more, and reads its replies"
    CUT_OFF = "the server ends its task"
    STOP = "the server stops, and waits for all"
    STOP_AND_CUT = "the server stops, and waits for nobody"


STOPS = {Death.STOP, Death.STOP_AND_CUT}

# Steps that a server waits which then cuts off all.
PATIENCE = 6

LITTLE = 4096

# (kind, offset, length, flags): batches, each sent at once. They share clusters and no byte; what
# the one frees the other allocates.
DYING = [
    [
        ("read", 0, 6 * C, 0),
        ("read", 46 * C, 60 * C, 0),
        ("write", 20 * C, 100, 0),
        ("write", 4 * C, 200, 0),
        ("zero", 8 * C, 100, 0),
        ("write", 70 * C + 10, 600, FUA),
        ("trim", 60 * C, 2 * C, 0),
        ("read", 2 * C, C, 0),
        ("flush", 0, 0, 0),
    ],
    [
        ("write", 130 * C, 2 * C, 0),
        ("zero", 6 * C + 100, 600, NO_HOLE),
        ("read", 20 * C, C, 0),
        ("write", 5 * C, 100, FUA),
    ],
]
STAYING = [
    [
        ("trim", 1 * C, 2 * C, 0),
        ("write", 20 * C + 300, 100, 0),
        ("write", 4 * C + 300, 100, 0),
        ("read", 3 * C, 4 * C, 0),
        ("flush", 0, 0, 0),
    ],
    [
        ("write", 1 * C, 100, 0),
        ("write", 70 * C + 700, 100, 0),
        ("write", 132 * C, C, FUA),
        ("read", 46 * C, 2 * C, 0),
        ("zero", 62 * C, C, 0),
        ("flush", 0, 0, 0),
        ("read", 20 * C + 250, 200, 0),
    ],
    [
        ("read", 0, 40 * C, 0),
        *8 * [("read", 64 * C, 3 * C, 0)],
        ("write", 100 * C, 3 * C, 0),
        ("flush", 0, 0, 0),
    ],
]

COMMANDS = {"trim": TRIM, "zero": WRITE_ZEROES, "flush": FLUSH}


def run_clients(
    image: str, schedule: Schedule, death: Death, step: int | None, *, direct: bool, refuses: bool
) -> list[int]:
    """One run, with a death before a step or with none; `Scheduler.counts`. `direct`: the file can
    do nothing at once and buffers are the pool's, as with O_DIRECT. `refuses`: it never does."""
    files = prepared(image)
    race = _Clients(image, death, step, Scheduler(schedule))
    # Each look at the clock takes a second: nothing is spun for, and all take turns.
    with mock.patch.object(poller_module, "perf_counter", itertools.count().__next__):
        race.scheduler.run(lambda _: race.run(direct=direct, refuses=refuses))
    assert race.pool.out == {}, "buffers were not given back"
    race.pool.assert_untouched()
    disk = assert_closed(files, race.node, race.final)
    race.history.read(race.history.begin("the end"), 0, disk)
    race.history.check()
    return race.scheduler.counts


def explore_deaths(
    image: str,
    death: Death,
    *,
    direct: bool,
    refuses: bool,
    new_schedule: Callable[[], Schedule] = Schedule,
    first: int = 0,
    stride: int = 1,
) -> Result:
    """A death before each step, or each so-manieth. Stops at the first run that fails."""
    done, step = 0, first
    while True:
        schedule = new_schedule()
        try:
            counts = run_clients(image, schedule, death, step, direct=direct, refuses=refuses)
        except Exception as error:
            call = f"{image!r}, {schedule.name}, {death}, {step}, {direct=}, {refuses=}"
            return Result(done + 1, (f"run_clients({call})", error))
        done += 1
        step += stride
        if step > len(counts):
            return Result(done)


class _Clients:
    def __init__(
        self, image: str, death: Death, step: int | None, scheduler: Scheduler
    ) -> None:
        self.scheduler = scheduler
        self.pool = PoisonedPool()
        self.final: bytes | None = None
        self._files = prepared(image)
        self._death = death
        self._step = step
        self.history = History(self._files.disk)
        self._disk = Disk(self._files.disk, C, discards=self._files.kind.discards)
        self._stopping = False
        self._dead = False

    async def run(self, *, direct: bool, refuses: bool) -> None:
        poller = Poller()
        try:
            async with self._files.open(
                refuses=refuses, write_cache=True, direct=direct, buffers=self.pool
            ) as (backend, self.node):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(poller.run)
                    world = World(backend, poller, nursery)
                    try:
                        await self._race(world)
                    finally:
                        for client in world.clients:
                            client.sock.close()
                    for client in world.clients:
                        await client.ended.wait()
                    if self._stopping:
                        backend.nursery.cancel_scope.cancel()
                    else:
                        assert poller.busy == 0
                    nursery.cancel_scope.cancel()
                if not self._stopping:
                    await self._look_at_the_end(backend)
        finally:
            poller.close()

    async def _race(self, world: World) -> None:
        # Replies do not fit into the first two's sockets at once.
        dying = await world.connect(structured=True, send_buffer=LITTLE)
        staying = [
            await world.connect(structured=False, send_buffer=LITTLE),
            await world.connect(structured=True),
        ]
        await read_all(world.backend)  # tables are loaded, else nothing is done without a task
        judge = Judge(self.node)
        if self._step is not None:
            self.scheduler.at = {self._step: lambda: self._die(world, dying)}
            if self._death is Death.STOP_AND_CUT:
                cut = self._step + PATIENCE
                self.scheduler.at[cut] = lambda: self._cut_all(world)
        with judge.watching(self.scheduler):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._converse, "dying", dying, DYING)
                nursery.start_soon(self._converse, "staying", staying[0], STAYING)
                nursery.start_soon(self._read_and_write, staying[1])
                self.scheduler.racing = True
            self.scheduler.racing = False

    def _die(self, world: World, client: Client) -> None:
        self._dead = True
        match self._death:
            case Death.CLOSED:
                client.sock.close()
            case Death.HALF_CLOSED:
                client.sock._sock.shutdown(1)
            case Death.CUT_OFF:
                client.scope.cancel()
            case Death.STOP | Death.STOP_AND_CUT:
                self._stopping = True
                for each in world.clients:
                    each.connection.shutdown()

    def _cut_all(self, world: World) -> None:
        for client in world.clients:
            client.scope.cancel()
        world.backend.nursery.cancel_scope.cancel()

    # --- what clients do -----------------------------------------------------------------------

    async def _converse(self, name: str, client: Client, batches: list) -> None:
        """Send each batch at once and take its answers; until this one is dead, or all are."""
        try:
            for number, batch in enumerate(batches):
                await self._batch(f"{name} {number}", client, batch)
        except (OSError, trio.ClosedResourceError, AssertionError) as error:
            gone = self._stopping or (name == "dying" and self._dead)
            end_of_stream = not isinstance(error, AssertionError) or "end of stream" in str(error)
            if not (gone and end_of_stream):
                raise

    async def _read_and_write(self, client: Client) -> None:
        """One request at a time, over what the others do not touch."""
        for number in range(6):
            at = (150 + number) * C
            batch = [("write", at + 17, 300, FUA if number % 3 == 2 else 0)]
            await self._converse(f"third {number}w", client, [batch])
            await self._converse(f"third {number}r", client, [[("read", at, C, 0)]])

    async def _batch(self, name: str, client: Client, batch: list) -> None:
        asked: dict[int, tuple[str, int, Interval]] = {}
        messages = []
        for number, (kind, offset, length, flags) in enumerate(batch):
            tag = hash_of(f"{name}.{number}")
            if kind == "write":
                message = client.write(offset, pattern(tag, length), flags)
            elif kind == "read":
                message = client.read(offset, length, flags)
            else:
                message = client.request(COMMANDS[kind], offset, length, flags)
            model = {"trim": "discard"}.get(kind, kind)
            effect = self._disk.effect(Request(model, offset, length, tag))
            interval = self.history.begin(f"{name}.{number} {kind}", *(effect or ()))
            asked[int.from_bytes(message[8:16], "big")] = (kind, offset, interval)
            messages.append(message)
        await client.send(b"".join(messages))
        for _ in batch:
            answer = await client.answer()
            assert not answer.error, answer
            kind, offset, interval = asked[answer.cookie]
            if kind == "read":
                self.history.read(interval, offset, answer.data)
            else:
                self.history.end(interval)

    async def _look_at_the_end(self, backend: BlockBackend) -> None:
        data = bytearray(SIZE)
        interval = self.history.begin("the end")
        await backend.read(0, memoryview(data))
        self.history.read(interval, 0, bytes(data))
        await backend.flush()
        await backend.flush()
        Judge(self.node).assert_idle()
        assert not self.node.image.quarantine
        self.final = bytes(data)


def hash_of(name: str) -> int:
    """The same in each process."""
    return int.from_bytes(name.encode(), "big") % 1_000_003



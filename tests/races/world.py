"""One race: what is let loose on an image at once, under one schedule, and the judge beside it.

While it runs, before each step in which a table may have changed (`Judge.look`):

* no host cluster has two owners: header, L1 table, refcount table (a former one too, until it is
  forgotten), refcount blocks, L2 tables, guest clusters, quarantine and the list of free clusters
  are disjoint, as the node has them in memory; compressed clusters alone may share one;
* no refcount is lower than the references, with what is in quarantine; what is listed as free has
  none;
* a cluster that is handed out was nobody's, and no request of the file under way touches it.

When a flush is answered, or a write that must be durable by then: a power cut would leave what was
answered before, and an image with leaks at most.

When all requests are answered: each read saw what it may (history.py); the whole disk reads as one
of the requests in flight together left it, by the asynchronous way and by the synchronous one; no
lock, epoch, load, flush or entry of the quarantine is left; and after a clean close, which ends in
steps, an auditor that shares no line with the package finds neither error nor leak in the file, and
the same disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import trio

from nbdserve.formats.qcow2.tables import Table, decode_table
from nbdserve.powercut.outcomes import state_at
from qcow2_model import (
    COMPRESSED,
    OFFSET,
    Disk,
    MemoryFile,
    Request,
    assert_sound,
    guest_bytes,
    pattern,
    read_all,
    submit,
)
from races.history import History
from races.images import SIZE, C, Files, prepared
from races.scheduler import Result, Schedule, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from nbdserve.block.backend import BlockBackend
    from nbdserve.formats.qcow2.node import Qcow2Node
    from nbdserve.formats.qcow2.refcount import Clusters

__all__ = ["Case", "Judge", "Op", "assert_closed", "explore_cuts", "run_case"]

QUICK, TASK, SUBMIT = "quick", "task", "submit"


@dataclasses.dataclass(frozen=True)
class Op:
    """One request. `way`: quick tries the synchronous way first, submit the one by callback, each
    goes on as a task if it must. `unmap`: of a write-zeroes. A `cache` turns the write cache on or
    off by its `length`."""

    kind: str
    offset: int = 0
    length: int = 0
    way: str = TASK
    unmap: bool = True
    fua: bool = False


Actor = tuple[Op, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """What races: each actor does its requests one after the other. `tables`: in each cache.
    `refuses`: the file never does anything at once. `cut`: cancel at that step the actor of that
    number, or with -1 all that runs, as a server does that stops."""

    image: str
    actors: tuple[Actor, ...]
    tables: int | None = None
    refuses: bool = False
    settle: bool = False
    write_cache: bool = True
    warm: bool = False
    cut: tuple[int, int] | None = None


def run_case(case: Case, schedule: Schedule) -> list[int]:
    """Run it and judge; `Scheduler.counts`."""
    files = prepared(case.image)
    scheduler = Scheduler(schedule)
    scheduler.run(lambda scheduler: _Race(case, files, scheduler).run())
    return scheduler.counts


def explore_cuts(case: Case, schedules: Iterable[Callable[[], Schedule]], *, who: int) -> Result:
    """Cut an actor off, or all with -1, before each step of the race in turn, under each of the
    schedules. Stops at the first that fails."""
    done = 0
    for new_schedule in schedules:
        step = 0
        while True:
            schedule = new_schedule()
            try:
                counts = run_case(dataclasses.replace(case, cut=(step, who)), schedule)
            except Exception as error:
                return Result(done + 1, (f"{schedule.name}, {who} cut off at {step}", error))
            done += 1
            step += 1
            if step > len(counts):
                break
    return Result(done)


class _Race:
    def __init__(self, case: Case, files: Files, scheduler: Scheduler) -> None:
        self._case = case
        self._files = files
        self._scheduler = scheduler
        self._history = History(files.disk)
        self._disk = Disk(files.disk, C, discards=files.kind.discards)
        self._final: bytes | None = None

    async def run(self) -> None:
        case, files = self._case, self._files
        async with files.open(
            tables=case.tables,
            refuses=case.refuses,
            settle=case.settle,
            write_cache=case.write_cache,
        ) as (backend, node):
            self._node = node
            judge = Judge(node)
            if case.warm:
                await read_all(backend)
                node.image.refcounts.put_back(await node.image.refcounts.take(1))
            with judge.watching(self._scheduler):
                await self._let_loose(backend)
            if not self._is_stop:
                await self._afterwards(backend, judge)
        disk = assert_closed(files, node, self._final)
        if self._is_stop:
            self._history.read(self._history.begin("the end"), 0, disk)
            self._history.check()

    @property
    def _is_stop(self) -> bool:
        return self._case.cut is not None and self._case.cut[1] < 0

    async def _let_loose(self, backend: BlockBackend) -> None:
        scopes = [trio.CancelScope() for _ in self._case.actors]
        if self._case.cut is not None:
            step, which = self._case.cut
            cancelled = scopes if which < 0 else [scopes[which]]
            self._scheduler.at = {step: lambda: [scope.cancel() for scope in cancelled]}
        async with trio.open_nursery() as nursery:
            for number, (actor, scope) in enumerate(zip(self._case.actors, scopes, strict=True)):
                nursery.start_soon(self._act, backend, number, actor, scope)
            self._scheduler.racing = True
        self._scheduler.racing = False

    async def _act(
        self, backend: BlockBackend, number: int, actor: Actor, scope: trio.CancelScope
    ) -> None:
        with scope:
            for index, op in enumerate(actor):
                await self._perform(backend, op, f"{number}.{index} {op.kind}", number * 16 + index)

    async def _perform(self, backend: BlockBackend, op: Op, name: str, tag: int) -> None:
        effect = self._disk.effect(Request(op.kind, op.offset, op.length, tag + 1))
        durable = False
        interval = self._history.begin(name, *(effect or ()))
        offset, length = op.offset, op.length
        match op.kind:
            case "read":
                data = bytearray(length)
                await self._read(backend, op, memoryview(data))
                self._history.read(interval, offset, bytes(data))
                return
            case "write":
                durable = await self._write(backend, op, pattern(tag + 1, length))
            case "zero":
                await backend.write_zeroes(offset, length, may_unmap=op.unmap, fua=op.fua)
                durable = not backend.write_cache
            case "discard":
                await backend.discard(offset, length, fua=op.fua)
            case "flush":
                if not (op.way == QUICK and backend.flush_nowait()):
                    await backend.flush()
            case "status":
                extents = await backend.block_status(offset, length)
                assert 0 < sum(extent.length for extent in extents) <= length
            case "cache":
                await backend.set_write_cache(bool(length))
        self._history.end(interval)
        if op.kind == "flush" or (op.kind == "cache" and not length):
            # What was answered before it began is there, and perhaps what was under way.
            self._after_a_power_cut(f"{name}, durably", interval.begin, 0, SIZE)
        elif effect is not None and (op.fua or durable):
            now = interval.end + 0.5
            self._after_a_power_cut(f"{name}, durably", now, effect[0], len(effect[1]))

    def _after_a_power_cut(self, name: str, begin: float, offset: int, length: int) -> None:
        """If the power went now and all were lost that was not flushed: the image would have leaks
        at most, and the range would read as what was answered before `begin` or came later."""
        image = self._node.image
        content = durable_bytes(image.file)
        assert_sound(content, leaks_allowed=True)
        data = self._files.data if image.data_file is None else durable_bytes(image.data_file)
        disk = guest_bytes(content, self._files.backing or b"", data)
        interval = self._history.begin(name)
        interval.begin = begin
        self._history.read(interval, offset, disk[offset : offset + length])

    async def _read(self, backend: BlockBackend, op: Op, view: memoryview) -> None:
        if op.way == QUICK and backend.read_nowait(op.offset, view) is None:
            return
        if op.way == SUBMIT and await submit(backend.submit_read, op.offset, view):
            return
        await backend.read(op.offset, view)

    async def _write(self, backend: BlockBackend, op: Op, data: bytes) -> bool:
        """Whether the write cache was off when it was answered."""
        answered_off: list[bool] = []

        def watched(offset: int, data: bytes, done: Callable[..., None], *, fua: bool) -> bool:
            def completed(error: OSError | None) -> None:
                answered_off.append(not backend.write_cache)
                done(error)

            return backend.submit_write(offset, data, completed, fua=fua)

        quick = op.way == QUICK and not op.fua
        if quick and backend.write_nowait(op.offset, data) is None:
            return False
        if op.way == SUBMIT and await submit(watched, op.offset, data, fua=op.fua):
            return answered_off[0]
        await backend.write(op.offset, data, fua=op.fua)
        return not backend.write_cache

    async def _afterwards(self, backend: BlockBackend, judge: Judge) -> None:
        """All requests were answered."""
        data = bytearray(SIZE)
        interval = self._history.begin("the end")
        await backend.read(0, memoryview(data))
        self._history.read(interval, 0, bytes(data))
        self._history.check()
        assert await read_all(backend) == data, "reads differ, though nothing is in flight"
        judge.look()
        if self._case.settle:
            await trio.sleep(1)  # it may be at it
        judge.assert_idle()
        await backend.flush()
        await backend.flush()
        judge.assert_idle()
        assert not judge.node.image.quarantine, "what was unlinked is not freed by two flushes"
        self._final = bytes(data)


def durable_bytes(file: MemoryFile) -> bytes:
    """What of a file was flushed, or written with FUA."""
    return bytes(state_at(file.writes, len(file.writes)).nothing_kept()[0])


def assert_closed(files: Files, node: Qcow2Node, final: bytes | None) -> bytes:
    """The image is closed: nothing is wrong with it and nothing leaks, and it reads as `final`.
    Returns what it reads as."""
    image = node.image
    assert_sound(image.file.content)
    data = None if image.data_file is None else image.data_file.content
    disk = guest_bytes(image.file.content, files.backing or b"", data)
    assert final in (None, disk), "closing changes what the disk reads as"
    assert files.kind.data_file != "raw" or data == disk, "the raw data file is not the disk"
    return disk


class Judge:
    """Looks into a node without changing it."""

    def __init__(self, node: Qcow2Node) -> None:
        self.node = node
        self._changed = True

    @contextlib.contextmanager
    def watching(self, scheduler: Scheduler) -> Iterator[None]:
        """Look before each step of the race."""
        refcounts = self.node.image.refcounts
        set_entry, take = Table.set, refcounts.take_nowait

        def set_and_say(table: Table, index: int, value: int) -> None:
            self._changed = True
            set_entry(table, index, value)

        def take_and_look(nb_clusters: int) -> Clusters | None:
            taken = take(nb_clusters)
            if taken is not None:
                self._handed_out(taken)
            return taken

        def on_step() -> None:
            if self._changed:
                self._changed = False
                self.look()

        Table.set = set_and_say  # type: ignore[method-assign]
        refcounts.take_nowait = take_and_look  # type: ignore[method-assign]
        scheduler.on_step = on_step
        try:
            yield
        finally:
            Table.set = set_entry  # type: ignore[method-assign]
            del refcounts.take_nowait
            scheduler.on_step = None

    # --- who owns what -------------------------------------------------------------------------

    def owners(self) -> dict[int, list[str]]:
        """The owners of host clusters by index, as the node has them in memory."""
        image = self.node.image
        refcounts = image.refcounts
        owners: dict[int, list[str]] = {0: ["header"]}

        def own(name: str, first: int, count: int = 1) -> None:
            for cluster in range(first, first + count):
                owners.setdefault(cluster, []).append(name)

        own("L1 table", image.mapping.l1.host_offset // C, -(-image.mapping.l1.nb_bytes // C))
        own("refcount table", refcounts.table.host_offset // C, refcounts.table.nb_bytes // C)
        for host_offset, count in refcounts.moved_from:
            own("former refcount table", host_offset // C, count)
        for number, entry in enumerate(refcounts.table.entries):
            if entry:
                own(f"refcount block {number}", entry // C)
        for number, entry in enumerate(image.mapping.l1.entries):
            if entry & OFFSET:
                own(f"L2 table {number}", (entry & OFFSET) // C)
                for index, value in enumerate(self._l2_entries(number, entry & OFFSET)):
                    guest = number * (C // 8) + index
                    if value & COMPRESSED:
                        own(f"compressed {guest}", (value & OFFSET) // C)
                    elif value & OFFSET and image.data_file is None:
                        own(f"guest cluster {guest}", (value & OFFSET) // C)
        return owners

    def _l2_entries(self, number: int, host_offset: int) -> list[int]:
        image = self.node.image
        table = image.l2._tables.get(number)
        if table is not None:
            return list(table.entries)
        data = image.file.content[host_offset : host_offset + C]
        return list(decode_table(bytes(data).ljust(C, b"\0")))

    def quarantined(self) -> Counter[int]:
        """Host clusters in quarantine, each as often as it is listed."""
        quarantine = self.node.image.quarantine
        groups = [*quarantine._sealed, *quarantine._durable]
        return Counter(quarantine._unlinked) + Counter(
            cluster for _, group in groups for cluster in group
        )

    def look(self) -> None:
        """Raises AssertionError if anything has two owners, or too low a refcount."""
        image = self.node.image
        owners = self.owners()
        quarantined = self.quarantined()
        blocks = {index: t.entries for index, t in image.refcounts.blocks._tables.items()}
        bits = image.geometry.block_bits
        for cluster, names in owners.items():
            shared = all(name.startswith("compressed") for name in names)
            assert len(names) == 1 or shared, f"cluster {cluster} is {' and '.join(names)}"
            assert not quarantined[cluster] or shared, f"{names[0]} is in quarantine"
            assert cluster < image.refcounts._end, f"{names[0]} is past the end of the file"
            entries = blocks.get(cluster >> bits)
            if entries is not None:
                refcount = entries[cluster & ((1 << bits) - 1)]
                wanted = len(names) + quarantined[cluster]
                assert refcount >= wanted, f"{names} has refcount {refcount}, not {wanted}"
        seen: set[int] = set()
        for first, count in image.refcounts._free:
            for cluster in range(first, first + count):
                assert cluster not in seen, f"cluster {cluster} is listed as free twice"
                seen.add(cluster)
                assert cluster not in owners, f"{owners[cluster]} is listed as free"
                assert not quarantined[cluster], f"cluster {cluster}, in quarantine, is free"
                entries = blocks.get(cluster >> bits)
                assert entries is None or not entries[cluster & ((1 << bits) - 1)], (
                    f"cluster {cluster} is listed as free and has a refcount"
                )

    def _handed_out(self, taken: Clusters) -> None:
        owners, quarantined = self.owners(), self.quarantined()
        for cluster in range(taken.first, taken.first + taken.count):
            assert cluster not in owners, f"{owners[cluster]} is handed out"
            assert not quarantined[cluster], f"cluster {cluster}, in quarantine, is handed out"
            for offset, length in self.node.image.file.active.values():
                assert not (offset < (cluster + 1) * C and cluster * C < offset + length), (
                    f"cluster {cluster} is handed out while a request uses it"
                )

    # --- what is left over ---------------------------------------------------------------------

    def assert_idle(self) -> None:
        """No request is under way."""
        image = self.node.image
        assert not image.locks.statistics(), "a range is locked"
        assert not image.quarantine._epochs._active, "a request has not left its epoch"
        assert not self.node._flush_lock.locked(), "the flush lock is held"
        assert not self.node._release_lock.locked(), "the release lock is held"
        assert not image.l2._loading, "an L2 table is being loaded"
        assert not image.refcounts.blocks._loading, "a refcount block is being loaded"
        assert image.broken is None
        for file in (image.file, image.data_file):
            assert file is None or not file.active, "a request of the file is under way"

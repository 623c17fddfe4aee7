"""Run a plan on files in memory and keep what happened: the write log, and what was promised when.

A promise is made by an acknowledgement. A flush promises what had been acknowledged before its
batch began; a write with FUA, and in writethrough every write and write-zeroes, promises itself.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import trio
import trio._core._run as trio_run

from crash.plans import memory_files
from nbdserve.block.backend import BlockBackend
from nbdserve.formats.raw import RawNode
from qcow2_model import (
    Disk,
    Effect,
    InlineEngine,
    MemoryFile,
    Request,
    assert_sound,
    guest_bytes,
    open_memory,
    perform,
    read_all,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crash.plans import Image, Plan
    from nbdserve.powercut.writelog import WriteLog

__all__ = ["History", "record"]


class Flushed(NamedTuple):
    """From `moment` on: this content is durable, but for what requests from `batch` on write."""

    moment: int
    batch: int
    content: bytes


class Written(NamedTuple):
    """From `moment` on: this is durable, but for what requests from `batch` on write."""

    moment: int
    batch: int
    effect: Effect


class Begun(NamedTuple):
    """A request began at `moment`, and writes this."""

    moment: int
    batch: int
    effect: Effect


@dataclasses.dataclass
class History:
    """What happened. `is_raw`: the data file reads as the disk. `counts`: what was done, by name,
    to see that the plans get everywhere."""

    plan: Plan
    log: WriteLog
    flushed: list[Flushed]
    is_raw: bool = False
    written: list[Written] = dataclasses.field(default_factory=list)
    begun: list[Begun] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def image(self) -> Image:
        return self.plan.image


def record(
    plan: Plan, files: Sequence[bytes], *, leaks: bool = False, look: bool = True
) -> History:
    """Run a plan, from `files` on (`leaks`: they may have some). The disk must at all times read as
    it should, and after the clean stop nothing is wrong: raises AssertionError. Without `look`
    neither is asked, only crashes will tell: for bugs that were planted.

    The same each time: trio, which runs tasks in a random order, is given the plan's name as seed,
    as its plugin for hypothesis does.
    """
    before = trio_run._ALLOW_DETERMINISTIC_SCHEDULING, trio_run._r.getstate()
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(plan.name)
    try:
        return trio.run(lambda: _record(plan, files, leaks=leaks, look=look))
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before[0]
        trio_run._r.setstate(before[1])


async def _record(
    plan: Plan, files: Sequence[bytes], *, leaks: bool, look: bool
) -> History:
    image, mode = plan.image, plan.mode
    content = guest_bytes(files[0], image.old, files[1] if image.data_file else None)
    # After a crash a raw data file may have what was written last when the image does not yet.
    is_raw = image.data_file == "raw" and files[1] == content
    disk = Disk(content, image.cluster_size, discards=image.discards)
    file, *beside = memory_files(
        files,
        patience=plan.patience,
        stragglers=plan.stragglers,
        direct=mode.direct,
        no_flush=mode.no_flush,
    )
    history = History(plan, file.writes, [Flushed(0, 0, content)], is_raw)
    async with open_memory(
        file,
        backing=RawNode(MemoryFile(image.old)) if image.backing else None,
        data_file=beside[0] if beside else None,
        cache_sizes=image.cache_sizes,
        engine=InlineEngine(),
    ) as (backend, node):
        node.no_flush = mode.no_flush
        if not mode.writeback or mode.direct:
            backend = BlockBackend(
                node, backend._epochs, backend.nursery,
                write_cache=mode.writeback, direct=mode.direct,
            )
        for number, batch in enumerate(plan.batches):
            await _run_batch(backend, disk, history, number, batch, look=look)
        await backend.flush()
    counters = node.statistics()
    grown = (len(file.content) - len(files[0])) // image.cluster_size
    history.counts = {
        "allocated": counters["allocated_clusters"],
        "freed": counters["freed_clusters"],
        "reused": counters["allocated_clusters"] - grown,
        "evicted": counters["l2_cache"].evictions + counters["refcount_cache"].evictions,
        "tables moved": counters["written_back"].get("NEW_REFCOUNT_TABLE", 0),
        "decompressed": counters["compressed"].decompressed,
    }
    if look:
        assert_sound(file.content, leaks_allowed=leaks or image.leaks)
        holder = beside[0].content if beside else None
        assert guest_bytes(file.content, image.old, holder) == disk.content, "after a clean stop"
        assert not is_raw or beside[0].content == disk.content
    return history


async def _run_batch(
    backend: BlockBackend,
    disk: Disk,
    history: History,
    number: int,
    batch: Sequence[Request],
    *,
    look: bool,
) -> None:
    """All requests of a batch in flight together."""
    log = history.log
    before = bytes(disk.content)
    effects = {request: effect for request in batch if (effect := disk.effect(request))}
    history.begun += [Begun(len(log), number, effect) for effect in effects.values()]

    async def one(request: Request) -> None:
        for _ in range(request.delay):
            await trio.lowlevel.checkpoint()
        await perform(backend, request)
        if request.kind == "flush":
            history.flushed.append(Flushed(len(log), number, before))
        elif is_durable(request, backend) and request in effects:
            history.written.append(Written(len(log), number, effects[request]))
        else:
            return
        log.mark(f"batch {number}: {request.kind}".encode())

    async with trio.open_nursery() as nursery:
        for request in batch:
            nursery.start_soon(one, request)
    found = list(effects.values())
    actual = await read_all(backend)
    if look:
        disk.apply(found, actual)
    else:
        disk.content = bytearray(as_it_should_be(before, found, actual))


def as_it_should_be(before: bytes, effects: Sequence[Effect], actual: bytes) -> bytes:
    """What a disk must read as after requests in flight together: what each of them wrote, or,
    where two of them did, `actual`."""
    content = bytearray(before)
    for number, (offset, data) in enumerate(effects):
        content[offset : offset + len(data)] = data
        for other in effects[:number]:
            start = max(offset, other.offset)
            stop = min(offset + len(data), other.offset + len(other.data))
            if start < stop:
                content[start:stop] = actual[start:stop]
    return bytes(content)


def is_durable(request: Request, backend: BlockBackend) -> bool:
    """Whether its acknowledgement says that it is durable."""
    if request.kind == "write":
        return request.flag or not backend.write_cache
    return request.kind == "zero" and not backend.write_cache

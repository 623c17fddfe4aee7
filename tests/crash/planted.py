"""Bugs to plant: each takes a monkeypatch and spoils one thing in the product, and no more.

The first ones take out one barrier of WRITE_ORDER each; test_planted.py says which, and what must
catch it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import trio

from nbdserve.block.backend import BlockBackend
from nbdserve.formats.qcow2 import allocation, node, ordering
from nbdserve.formats.qcow2.durability import Durability
from nbdserve.formats.qcow2.image import Image
from nbdserve.formats.qcow2.node import Qcow2Node
from nbdserve.formats.qcow2.ordering import STAGE, What
from nbdserve.formats.qcow2.quarantine import Quarantine
from nbdserve.formats.qcow2.refcount import Refcounts
from nbdserve.formats.qcow2.resolve import ClusterType
from nbdserve.formats.qcow2.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from nbdserve.block.flush import Done
    from nbdserve.block.node import Buffer, Node
    from nbdserve.formats.qcow2.allocation import Allocation
    from nbdserve.formats.qcow2.read import Reader
    from nbdserve.formats.qcow2.refcount import Clusters
    from nbdserve.formats.qcow2.resolve import GuestExtent
    from nbdserve.formats.qcow2.tables import TableWrite

    Plant = Callable[[pytest.MonkeyPatch], None]


# --- barriers of WRITE_ORDER ----------------------------------------------------------------------


def at_stage(what: What, stage: int) -> Plant:
    """Have a kind of metadata written with another stage than its own."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(STAGE, what, stage)

    plant.__name__ = f"{what.name.lower()}_at_stage_{stage}"
    return plant


def new_l2_table_at_stage_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new L2 table is written together with what points to it; and where it goes nothing was
    written before, which would be durable by then and do instead."""

    async def reserve(self: Refcounts, clusters: Clusters) -> None:
        pass

    monkeypatch.setattr(Refcounts, "reserve_nowait", lambda self, clusters: True)
    monkeypatch.setattr(Refcounts, "reserve", reserve)
    at_stage(What.NEW_L2_TABLE, 2)(monkeypatch)


def no_flush_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """L2 entries go out without a flush if nothing but data had to be durable before."""
    write, real = ordering._write, ordering.write_back

    async def write_back(image: Image) -> None:
        written = False
        flush = image.file.flush

        async def flush_if_written() -> None:
            if written:
                await flush()

        async def note(image: Image, writes: list[TableWrite]) -> None:
            nonlocal written
            written = True
            await write(image, writes)

        with monkeypatch.context() as patch:
            patch.setattr(image.file, "flush", flush_if_written)
            patch.setattr(ordering, "_write", note)
            await real(image)

    monkeypatch.setattr(node, "write_back", write_back)


def no_flush_of_the_data_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """L2 entries go out without a flush of the data file."""
    _without_flush(monkeypatch, lambda image: image.data_file)


def no_flush_before_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write-back flushes nothing between its stages."""
    _without_flush(monkeypatch, lambda image: image.file)


def _without_flush(monkeypatch: pytest.MonkeyPatch, which: Callable[[Image], Node | None]) -> None:
    real = ordering.write_back

    async def nothing() -> None:
        pass

    async def write_back(image: Image) -> None:
        with monkeypatch.context() as patch:
            if which(image) is not None:
                patch.setattr(which(image), "flush", nothing)
            await real(image)

    monkeypatch.setattr(node, "write_back", write_back)


def lower_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refcount is lowered when its cluster is unlinked in memory."""
    unlink = Image._unlink

    def lower(image: Image, cluster: int) -> None:
        block = image.refcounts.blocks.peek(cluster >> image.geometry.block_bits)
        if block is None:
            unlink(image, cluster)
        else:
            index = cluster & (image.geometry.block_entries - 1)
            block.set(index, max(block.entries[index] - 1, 0))

    monkeypatch.setattr(Image, "_unlink", lower)


# --- clusters handed out too early ----------------------------------------------------------------


def reuse_before_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster is handed out again when it was unlinked in memory; its refcount stays right."""
    unlink = Image._unlink

    def reuse(image: Image, cluster: int) -> None:
        refcounts = image.refcounts
        block = refcounts.blocks.peek(cluster >> image.geometry.block_bits)
        index = cluster & (image.geometry.block_entries - 1)
        if block is None or block.entries[index] != 1:
            unlink(image, cluster)
        else:
            block.set(index, 0)
            image.metadata.discard(cluster << image.geometry.cluster_bits)
            refcounts._free.append((cluster, 1))

    monkeypatch.setattr(Image, "_unlink", reuse)


def reuse_while_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster is handed out again though a request that resolved onto it is not done."""

    def release(quarantine: Quarantine) -> list[int]:
        durable, quarantine._durable = quarantine._durable, []
        return sorted(cluster for _, group in durable for cluster in group)

    monkeypatch.setattr(Quarantine, "release", release)


# --- FUA ------------------------------------------------------------------------------------------


def ignore_fua(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write with FUA is one like any other."""
    write, submit = BlockBackend.write, BlockBackend.submit_write

    async def plain(self: BlockBackend, offset: int, data: Buffer, *, fua: bool = False) -> None:
        await write(self, offset, data)

    def submit_plain(
        self: BlockBackend, offset: int, data: Buffer, done: Done, *, fua: bool = False
    ) -> bool:
        return submit(self, offset, data, done)

    monkeypatch.setattr(BlockBackend, "write", plain)
    monkeypatch.setattr(BlockBackend, "submit_write", submit_plain)


def never_flush_for_fua(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUA that cannot be passed down, and writethrough, do not flush."""

    async def nothing(self: BlockBackend, fua: bool) -> None:
        pass

    monkeypatch.setattr(BlockBackend, "_make_durable", nothing)


def fua_on_dirty_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUA is passed down though what maps the range was not written."""
    monkeypatch.setattr(Table, "is_written", lambda self, number: True)


def fua_on_tables_only_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUA is passed down though what maps the range was written but not flushed."""
    monkeypatch.setattr(Durability, "table_written", lambda self, offset, nb_bytes: None)


# --- writes ---------------------------------------------------------------------------------------


def acknowledge_before_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes the asynchronous way is acknowledged and then done."""
    write = Qcow2Node.write

    async def later(self: Qcow2Node, offset: int, data: bytes) -> None:
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        with contextlib.suppress(OSError):
            await write(self, offset, data)

    async def acknowledge(self: Qcow2Node, offset: int, data: Buffer) -> None:
        trio.lowlevel.spawn_system_task(later, self, offset, bytes(data))

    monkeypatch.setattr(Qcow2Node, "write", acknowledge)


def link_before_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new cluster is linked before its data is written."""
    write = allocation._write_data

    async def link_first(
        image: Image, reader: Reader, new: Allocation, clusters: Clusters, extent: GuestExtent,
        offset: int, data: memoryview,
    ) -> None:
        table = await image.table(offset)
        index = (offset >> image.geometry.cluster_bits) & (image.geometry.l2_entries - 1)
        old = table.entries[index : index + clusters.count]
        new.link(table, index)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        await write(image, reader, new, clusters, extent, offset, data)
        table = await image.table(offset)
        for number, entry in enumerate(old):  # `link` comes again
            table.set(index + number, entry)

    monkeypatch.setattr(allocation, "_write_data", link_first)


def drop_the_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the data in a new cluster is not copied."""
    monkeypatch.setattr(allocation, "_to_end_of_cluster", lambda image, end: 0)


def zero_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that also covers zero clusters zeroes all host clusters of its range first (as
    qemu-nbd 7.2 does)."""
    write = Qcow2Node.write

    async def zeroes_then_data(self: Qcow2Node, offset: int, data: Buffer) -> None:
        host = []
        has_zeroes = False
        at, end = offset, offset + len(data)
        while at < end:
            extent = await self.image.mapping.extent(at, end - at)
            has_zeroes |= extent.type in (ClusterType.ZERO_ALLOC, ClusterType.ZERO_PLAIN)
            if extent.type is ClusterType.STANDARD:
                host.append((extent.host_offset, extent.length))
            at += extent.length
        for host_offset, length in host if has_zeroes else ():
            await self.image.data.write_zeroes(host_offset, length, may_unmap=False)
        await write(self, offset, data)

    monkeypatch.setattr(Qcow2Node, "write", zeroes_then_data)

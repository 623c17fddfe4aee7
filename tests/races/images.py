"""Images that races begin with: every kind of cluster, few of each, tables that end where requests
meet.

Clusters of 512 bytes, so an L2 table maps 64 of them (32 KiB of the disk). Guest clusters:

* 0 to 7, 46, 47 and 60 to 67 data, 8 and 9 zero and reserved, 10 and 11 zero, others not allocated;
* 40 to 45 are zero, and their former host clusters free;
* with `compressed` 0 to 3 are compressed, all in one host cluster;
* the second L2 table begins at 64, and there is none for 128 and more.

`edge`: none is free, and two are left until a new refcount block is needed. `growth`: two, until
the refcount table must grow too (64-bit refcounts: it reaches to 2 MiB of the file).
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import zlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import trio

from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.formats.qcow2 import node as node_module
from nbdserve.formats.qcow2.node import CacheSizes, Qcow2Node
from nbdserve.formats.qcow2.open import open_qcow2, read_header
from nbdserve.formats.raw import RawNode
from qcow2_model import COMPRESSED, MemoryFile, guest_bytes, new_image, pattern

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from qcow2_model import Buffer

__all__ = ["KINDS", "SIZE", "C", "Files", "Inline", "Kind", "StepFile", "prepared"]

C = 512
SIZE = 200 * C
PER_TABLE = C // 8
ROOM_LEFT = 2

# Seconds after which the settle task flushes: so many steps (scheduler.STEP).
SETTLE_AFTER = 0.012


@dataclasses.dataclass(frozen=True)
class Kind:
    """An image. `end`: the first cluster past the end of the file, at least."""

    version: int = 3
    refcount_bits: int = 16
    backing: bool = False
    compressed: bool = False
    data_file: str = ""  # external, raw
    end: int = 0

    @property
    def discards(self) -> bool:
        """Whether what was discarded reads as zeroes."""
        return self.version >= 3 or not self.backing


PER_BLOCK_64 = C // 8

KINDS = {
    "plain": Kind(),
    "backing": Kind(backing=True),
    "version 2": Kind(version=2),
    "version 2, backing": Kind(version=2, backing=True),
    "compressed": Kind(compressed=True),
    "data file": Kind(data_file="external"),
    "raw data file": Kind(data_file="raw"),
    "edge": Kind(refcount_bits=64, end=PER_BLOCK_64 - ROOM_LEFT),
    "growth": Kind(refcount_bits=64, end=PER_BLOCK_64 * PER_BLOCK_64 - ROOM_LEFT),
}


class StepFile(MemoryFile):
    """Each request waits once before it takes effect and once after; `active` are those under way,
    (offset, length) each. `refuses`: the synchronous ways always do."""

    refuses = False

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.active: dict[object, tuple[int, int]] = {}

    async def _wait(self) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _refuses(self) -> bool:
        return self.refuses

    def submit_read(
        self, offset: int, buffer: memoryview, done: Callable[[OSError | None], None]
    ) -> None:
        super().submit_read(offset, buffer, self._until(done, offset, len(buffer)))

    def submit_write(
        self,
        offset: int,
        data: Buffer,
        done: Callable[[OSError | None], None],
        *,
        fua: bool = False,
    ) -> None:
        super().submit_write(offset, data, self._until(done, offset, len(data)), fua=fua)

    def _until(
        self, done: Callable[[OSError | None], None], offset: int, length: int
    ) -> Callable[[OSError | None], None]:
        key = object()
        self.active[key] = (offset, length)

        def completed(error: OSError | None) -> None:
            del self.active[key]
            done(error)

        return completed

    async def read(self, offset: int, buffer: memoryview) -> None:
        key = object()
        self.active[key] = (offset, len(buffer))
        try:
            await super().read(offset, buffer)
        finally:
            del self.active[key]

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        key = object()
        self.active[key] = (offset, sum(map(len, data)))
        try:
            await super().writev(offset, data)
        finally:
            del self.active[key]

    async def discard(self, offset: int, length: int) -> None:
        key = object()
        self.active[key] = (offset, length)
        try:
            await super().discard(offset, length)
        finally:
            del self.active[key]


class Inline:
    """An engine without threads: what it runs takes an await before and one after."""

    async def run(self, function: Callable[..., object], *args: object) -> object:
        """See Engine.run."""
        await trio.lowlevel.checkpoint()
        result = function(*args)
        await trio.lowlevel.checkpoint()
        return result


@dataclasses.dataclass(frozen=True)
class Files:
    """The bytes of an image and what it needs, and those of the disk."""

    kind: Kind
    image: bytes
    data: bytes | None
    backing: bytes | None
    disk: bytes

    @asynccontextmanager
    async def open(
        self,
        *,
        tables: int | None = None,
        refuses: bool = False,
        settle: bool = False,
        **options: Any,  # noqa: ANN401 - checked by BlockBackend
    ) -> AsyncIterator[tuple[BlockBackend, Qcow2Node]]:
        """As graph.open_backend does it: at the end requests are cut off, those that the engine has
        are finished, and the image is closed. `tables`: how many each cache holds. `options`: the
        BlockBackend's."""
        file, data_file, backing = (
            None if content is None else StepFile(content)
            for content in (self.image, self.data, self.backing)
        )
        files = [each for each in (file, data_file, backing) if each is not None]
        for each in files:
            each.refuses = refuses
        assert file is not None
        sizes = None if tables is None else CacheSizes(*(2 * [tables * (C + 512)]))
        epochs = Epochs()
        node = await open_qcow2(
            file,
            RawNode(backing) if backing is not None else None,
            await read_header(file),
            Inline(),  # type: ignore[arg-type]
            epochs,
            data_file=data_file,
            read_only=False,
            cache_sizes=sizes,
        )
        if self.kind.end:  # as if the search had found nothing
            node.image.refcounts._searched = node.image.refcounts._search_end
        try:
            with mock.patch.object(node_module, "SETTLE_AFTER", SETTLE_AFTER):
                async with trio.open_nursery() as nursery:
                    if settle:
                        nursery.start_soon(node.settle)
                    yield BlockBackend(node, epochs, nursery, **options), node
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                while any(each.active for each in files):
                    await trio.lowlevel.checkpoint()
                await node.close()


@functools.cache
def prepared(name: str) -> Files:
    """The image of that name in KINDS."""
    kind = KINDS[name]
    features = {"": (0, 0), "external": (4, 0), "raw": (4, 2)}[kind.data_file]
    with tempfile.TemporaryDirectory() as folder:
        image = new_image(
            folder,
            SIZE,
            version=kind.version,
            cluster_size=C,
            refcount_bits=kind.refcount_bits,
            features=features,
        )
    disk = pattern(1000, SIZE) if kind.backing else bytes(SIZE)
    # What a cluster in a data file holds that is not mapped may be anything, but in a raw one.
    data = {"": None, "external": b"\x5a" * SIZE, "raw": bytes(SIZE)}[kind.data_file]
    empty = Files(kind, image, data, disk if kind.backing else None, disk)
    return trio.run(_fill, empty)


async def _fill(files: Files) -> Files:
    kind = files.kind
    async with files.open(write_cache=True) as (backend, node):
        first = 4 if kind.compressed else 0
        await backend.write(first * C, pattern(1001, (10 - first) * C))
        await backend.write(60 * C, pattern(1002, 8 * C))
        await backend.write_zeroes(8 * C, 2 * C, may_unmap=False)
        await backend.write_zeroes(10 * C, 2 * C, may_unmap=True)
        await backend.write(40 * C, pattern(1003, 8 * C))
        if not kind.end:
            await backend.discard(40 * C, 6 * C)
        if kind.compressed:
            await _compress(node)
        await backend.flush()
        refcounts = node.image.refcounts
        if kind.end > PER_BLOCK_64:
            refcounts._end = kind.end
        for guest in range(130, 190):
            if refcounts._end < kind.end:
                await backend.write(guest * C, pattern(guest, C))
        assert refcounts._end >= kind.end
        await backend.flush()
        file = node.image.file
        data_file = node.image.data_file
    image = bytes(file.content).ljust(kind.end * C, b"\0")
    data = None if data_file is None else bytes(data_file.content)
    return dataclasses.replace(
        files, image=image, data=data, disk=guest_bytes(image, files.backing or b"", data)
    )


async def _compress(node: Qcow2Node) -> None:
    """Guest clusters 0 to 3, as an older writer left them: side by side in one host cluster."""
    image = node.image
    taken = await image.refcounts.take(1)
    host_offset = taken.first * C
    table = await image.table(0)
    stored = bytearray()
    for cluster in range(4):
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        content = pattern(1010 + cluster, 40) * 13
        packed = packer.compress(content[:C]) + packer.flush()
        start = host_offset + len(stored)
        stored += packed
        assert len(stored) <= C
        table.set(cluster, COMPRESSED | start)  # no further sector
    await image.file.write(host_offset, stored.ljust(C, b"\0"))
    block = await image.refcounts.blocks.get(0)
    block.set(taken.first, 4)

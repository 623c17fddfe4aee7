"""What every node of the block graph is: `Node`, and `Leaf` for those that hold bytes themselves.

Two ways lead through a node, and they never mix:

* `resolve` is synchronous and pure. It maps a range to runs of leaves, folding this node and all
  below it away, or answers a `Miss`. `allocate_nowait` is its only companion that changes
  anything: a format node may there do a whole allocating write if nothing needs waiting for.
  Both, and the other `*_nowait` and `submit_*`, may be called in another thread while trio's is
  held still (nbdkit/turn.py): they must not ask trio who calls. `run_sync_soon` is how to wake.
* `read`, `write`, `write_zeroes`, `discard`, `block_status` are the complete asynchronous paths.
  They may load tables, allocate, copy, decompress; what they read before an await is stale after.

Offsets and lengths are in bytes, within `size`; callers have checked them (block/backend.py does,
once). I/O errors are OSError with the errno that the kernel gave.

A flush walks the chain that `Node.flush` spells out; nodes override its steps, not the chain.

FUA is passed down by who knows it to be legal: the synchronous way by resolving WRITE_FUA, the
asynchronous one by `write_fua`. Where it is not, a write and the chain take its place, and that is
the backend's to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nbdserve.block.flush import FlushGeneration
from nbdserve.block.run import WRITE_FUA, Miss, Op, Resolution

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Done = Callable[[OSError | None], None]

__all__ = ["MAX_INLINE", "Buffer", "Extent", "Leaf", "Node"]

Buffer = bytes | bytearray | memoryview

# The most that one synchronous call may copy, in bytes: about 0.2 ms in which nobody else runs.
MAX_INLINE = 1 << 20


class Extent(NamedTuple):
    """A piece of a block status answer, as QEMU's BDRV_BLOCK_DATA and BDRV_BLOCK_ZERO.

    data: the piece is backed by storage; zero: it reads as zeroes; allocated: this layer, not a
    backing file, decides what it reads as.
    """

    length: int
    data: bool
    zero: bool
    allocated: bool = True


class Node:
    """A node with `children`; the defaults are those of a node that hides what lies below it.

    `is_filter`: it has nothing of its own between those above and its `file`. `on_wait`: called by
    a filter above everything else with 1 when a request begins to wait for nothing but time, and
    with -1 when that ends. `driver`: its name in options and statistics. `node_name`: what the user
    calls it; names that begin with # are ours (graph.py).
    """

    is_filter = False
    driver = ""
    node_name = ""

    def __init__(
        self, filename: str, size: int, *, read_only: bool, no_flush: bool = False
    ) -> None:
        self.filename = filename
        self.size = size
        self.read_only = read_only
        self.no_flush = no_flush
        self.on_wait: Callable[[int], object] = lambda requests: None

    @property
    def children(self) -> Mapping[str, Node]:
        """The nodes below this one by role: file, backing, data-file."""
        return {}

    @property
    def cluster_size(self) -> int:
        """The unit in bytes in which this node allocates; 1 if it has none."""
        return 1

    # --- the synchronous way -------------------------------------------------------------------

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        """Map [offset, offset + length) to runs without waiting and without I/O."""
        return Miss.OPAQUE

    def allocate_nowait(self, offset: int, data: Buffer) -> bool:
        """Do a write that misses with NEEDS_ALLOC, if that can be done without waiting.

        False: nothing was changed. An OSError means that the write failed and nothing was linked.
        """
        return False

    # --- the asynchronous way ------------------------------------------------------------------

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        raise OSError(5, f"{type(self).__name__} does not read")

    async def write(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`; durable only after a later flush."""
        raise OSError(1, f"{type(self).__name__} does not write")

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        """Write `data` at `offset`; whether it is durable now, with all that maps it.

        False: it is written, and only a flush makes it durable.
        """
        await self.write(offset, data)
        return False

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        """As `write`, gathering several buffers into one request."""
        for piece in data:
            await self.write(offset, piece)
            offset += len(piece)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        """Make the range read as zeroes; `may_unmap`: it need not stay allocated.

        Without `fallback` OSError(EOPNOTSUPP) says that it would be no faster than writing.
        """
        raise OSError(95, f"{type(self).__name__} does not write zeroes")

    async def discard(self, offset: int, length: int) -> None:
        """The content of the range is no longer needed; a hint, partial units are left alone."""

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        """What the range consists of; the lengths add up to at most `length`, at least 1 byte."""
        return [Extent(length, data=True, zero=False)]

    # --- the flush chain -----------------------------------------------------------------------

    async def flush(self) -> None:
        """Make all completed writes durable (after QEMU's bdrv_co_flush).

        Steps: the node's cached metadata goes to its file, in every cache mode; its own storage is
        synced, unless `no_flush`; then the children that hold its data do the same, with
        `no_flush` too, because they may have metadata to hand over.
        """
        await self.flush_to_os()
        if not self.no_flush:
            await self.flush_to_disk()
        for role in ("file", "data-file"):
            child = self.children.get(role)
            if child is not None:
                await child.flush()

    def flush_nowait(self) -> bool:
        """Flush if there is nothing to do for it; False: there is, or may be. Raises OSError."""
        return False

    def submit_flush(self, done: Done) -> bool:
        """Flush without a task if a leaf's sync is all that is to do; `done` is called later, from
        the engine's reaper. False: use `flush`. Ask `flush_nowait` first. Raises OSError."""
        return False

    async def flush_to_os(self) -> None:
        """Write cached metadata to the file, each table after what it depends on."""

    async def flush_to_disk(self) -> None:
        """Sync what this node itself stores; only leaves store anything."""

    def presume_written(self) -> None:
        """The next flush shall sync, as after a write: what was in the files when they were opened
        may have been written by somebody else, and shall be durable too."""
        for role in ("file", "data-file"):
            child = self.children.get(role)
            if child is not None:
                child.presume_written()

    def drain_begin(self) -> None:
        """From now on hold no request up but for its I/O; let go those that are held up already.

        After QEMU's bdrv_drained_begin, for the end only: there is no way back.
        """

    async def close(self) -> None:
        """Flush what the node still holds back and release it; children are closed afterwards."""

    def statistics(self) -> dict[str, object]:
        """Counters since the node was opened, by name."""
        return {}


class Leaf(Node):
    """A node that runs point to. Host offsets may lie past the end: that reads as zeroes.

    `fua`: `submit_write` and `write_fua` can make a write durable.
    """

    fua = False

    def __init__(
        self, filename: str, size: int, *, read_only: bool, no_flush: bool = False
    ) -> None:
        super().__init__(filename, size, read_only=read_only, no_flush=no_flush)
        self.generation = FlushGeneration(filename, self.submit_sync)

    def resolve(self, op: Op, offset: int, length: int) -> Resolution:
        """One run: a leaf maps to itself."""
        if op is WRITE_FUA and not self.fua:
            return Miss.NEEDS_FLUSH
        return [(self, offset, length)]

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` at once; False if that would have to wait (the content is undefined)."""
        return False

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write at once; False, with nothing written, if that would have to wait."""
        return False

    def writev_nowait(self, offset: int, data: Sequence[Buffer]) -> bool:
        """As `write_nowait`, gathering several buffers."""
        return False

    def submit_read(self, offset: int, buffer: memoryview, done: Done) -> None:
        """Queue a read with the engine; `done` is called later, from the engine's reaper."""
        raise OSError(5, f"{type(self).__name__} does not read")

    def submit_write(
        self, offset: int, data: Buffer, done: Done, *, fua: bool = False
    ) -> None:
        """As `submit_read`, a write; `data` must stay as it is until then. `fua`: it is durable
        when `done` is called without an error."""
        raise OSError(1, f"{type(self).__name__} does not write")

    def submit_sync(self, done: Done) -> None:
        """Sync what is stored here; `generation` sees to it that one runs at a time."""
        raise OSError(22, f"{type(self).__name__} does not sync")

    def presume_written(self) -> None:
        self.generation.written += 1

    def flush_nowait(self) -> bool:
        return self.no_flush or self.generation.flush_nowait()

    def submit_flush(self, done: Done) -> bool:
        self.generation.submit(done)
        return True

    async def flush_to_disk(self) -> None:
        await self.generation.flush()

"""Nodes and system calls that do what a test wants, for tests of the layers above them.

`FakeNode` keeps bytes in memory, says in `calls` what was asked of it, fails with what
`errors` names and waits where `gates` has a closed event.  `FakeLeaf` is the same with the
synchronous way.  Nothing here is a model of a disk: tests/memory_leaf.py is that.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import trio

from nbdserve.block.node import Buffer, Extent, Leaf, Node


class FakeNode(Node):
    """A node of `size` bytes that records its calls as (name, offset, length, *what matters)."""

    def __init__(self, size: int = 1 << 20, *, no_flush: bool = False, **children: Node) -> None:
        super().__init__("fake", size, read_only=False, no_flush=no_flush)
        self.bytes = bytearray(size)
        self.calls: list[tuple[object, ...]] = []
        self.errors: dict[str, Exception] = {}
        self.gates: dict[str, trio.Event] = {}
        self.extents = 1 << 16  # length of each block status extent
        self._children = children

    @property
    def children(self) -> dict[str, Node]:
        return {name.replace("_", "-"): node for name, node in self._children.items()}

    def _record(self, name: str, *details: object) -> None:
        self.calls.append((name, *details))
        if name in self.errors:
            raise self.errors[name]

    async def _do(self, name: str, *details: object) -> None:
        self._record(name, *details)
        if name in self.gates:
            await self.gates[name].wait()
        await trio.lowlevel.checkpoint()

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._do("read", offset, len(buffer))
        buffer[:] = self.bytes[offset : offset + len(buffer)]

    async def write(self, offset: int, data: Buffer) -> None:
        await self._do("write", offset, len(data))
        self.bytes[offset : offset + len(data)] = data

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        await self._do("write_zeroes", offset, length, may_unmap, fallback)
        self.bytes[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        await self._do("discard", offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._do("block_status", offset, length)
        length = min(length, self.extents - offset % self.extents)
        hole = offset // self.extents % 2 == 1
        return [Extent(length, data=not hole, zero=hole)]

    def flush_nowait(self) -> bool:
        return False

    def submit_flush(self, done: Callable[[OSError | None], None]) -> bool:
        return False

    async def flush_to_os(self) -> None:
        await self._do("flush_to_os")

    async def flush_to_disk(self) -> None:
        await self._do("flush_to_disk")

    async def close(self) -> None:
        await self._do("close")

    def names(self) -> list[object]:
        """What was called, in order."""
        return [call[0] for call in self.calls]


class FakeLeaf(FakeNode, Leaf):
    """A leaf that answers the synchronous way at once, unless `blocks`."""

    blocks = False

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        self._record("read_nowait", offset, len(buffer))
        if not self.blocks:
            buffer[:] = self.bytes[offset : offset + len(buffer)]
        return not self.blocks

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self._record("write_nowait", offset, len(data))
        if not self.blocks:
            self.bytes[offset : offset + len(data)] = data
        return not self.blocks


def open_files() -> set[str]:
    """What this process has open, by /proc: the descriptors with what each is."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # listdir's own
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Fail unless the body closes every file that it opens."""
    before = open_files()
    yield
    after = open_files()
    assert after == before, sorted(after ^ before)

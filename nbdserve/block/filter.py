"""A filter node that changes nothing: the base of all that do.

Law: whatever a request asks comes by here, in one of the methods that a subclass overrides. So
nothing resolves (`Node.resolve` answers OPAQUE), gathered writes are single ones, a write with FUA
is a write and a flush, and no flush takes a short way round `flush`. A filter that need not see
some of that passes it on itself, and is faster for it.

A filter stands above a format, where it sees the guest's disk, or below one, where it sees the
format's file. After ``bdrv_filter_default_perms`` and the filters in QEMU's block/.

Filters of users' own have a driver's name too: `register_filter` gives it, or an installed package
does, by an entry point of the group ``nbdserve.filters``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.block.node import Node

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdserve.block.node import Buffer, Extent

__all__ = ["ENTRY_POINTS", "FilterNode", "find_filter", "register_filter"]

ENTRY_POINTS = "nbdserve.filters"

_registered: dict[str, type[FilterNode]] = {}


def register_filter(driver: str, kind: type[FilterNode]) -> None:
    """Give a class the name by which ``driver=`` asks for it. It is called with the child, and the
    node's other options by their names, with _ for -; what it raises as ValueError is told the
    user as his mistake. Another class of that name is replaced."""
    kind.driver = driver
    _registered[driver] = kind


def find_filter(driver: str) -> type[FilterNode] | None:
    """The class that has this name."""
    if driver not in _registered:
        from importlib.metadata import entry_points  # slow to import, and seldom needed

        for entry_point in entry_points(group=ENTRY_POINTS, name=driver):
            register_filter(driver, entry_point.load())
    return _registered.get(driver)


class FilterNode(Node):
    """`file`, the child, and all that it is asked."""

    is_filter = True

    def __init__(self, file: Node) -> None:
        self.file = file
        super().__init__(
            file.filename, file.size, read_only=file.read_only, no_flush=file.no_flush
        )

    @property
    def children(self) -> Mapping[str, Node]:
        return {"file": self.file}

    @property
    def size(self) -> int:
        """The child's, which grows if it is a file below a format."""
        return self.file.size

    @size.setter
    def size(self, size: int) -> None:
        """Nothing: it is the child's own."""

    @property
    def cluster_size(self) -> int:
        return self.file.cluster_size

    @property
    def is_device(self) -> bool:
        """Whether what lies behind the end is not known to be zero."""
        found: bool = getattr(self.file, "is_device", True)
        return found

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self.file.read(offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        await self.file.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        await self.file.write_zeroes(offset, length, may_unmap=may_unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        await self.file.discard(offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self.file.block_status(offset, length)

    async def flush(self) -> None:
        await self.file.flush()

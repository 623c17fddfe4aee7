"""The throttle filter: a node that passes on what it is asked when its group allows.

It stands anywhere in a tree, over a format node or below one, where a backend's own throttle
stands above the root. Reads wait in the read lane; writes, write-zeroes and discards in the write
lane, by their length, although two of these move no data: what costs the disk is limited. A flush
is never held up: it adds no load of its own, and who waits for it holds locks.

Its ranges do not resolve: what a resolved run does is seen by nobody, so every request takes the
asynchronous way. Where one throttle for all of an export is wanted the backend's costs less.

Follows block/throttle.c of QEMU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.block.node import Node
from nbdserve.block.run import READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nbdserve.block.node import Buffer, Extent
    from nbdserve.block.run import Op
    from nbdserve.filters.throttle_group import ThrottleMember

__all__ = ["ThrottleNode"]


class ThrottleNode(Node):
    """A child behind the limits of a throttle group."""

    is_filter = True
    driver = "throttle"

    def __init__(self, file: Node, member: ThrottleMember) -> None:
        """`member` is this node's own: it leaves its group when the node is closed."""
        super().__init__(
            file.filename, file.size, read_only=file.read_only, no_flush=file.no_flush
        )
        self._file = file
        self._member = member

    @property
    def children(self) -> Mapping[str, Node]:
        return {"file": self._file}

    @property
    def cluster_size(self) -> int:
        return self._file.cluster_size

    async def _admit(self, op: Op, nb_bytes: int) -> None:
        if self._member.admit_nowait(op, nb_bytes):
            return
        self.on_wait(1)
        try:
            await self._member.admit(op, nb_bytes)
        finally:
            self.on_wait(-1)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._admit(READ, len(buffer))
        await self._file.read(offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._admit(WRITE, len(data))
        await self._file.write(offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        await self._admit(WRITE, len(data))
        return await self._file.write_fua(offset, data)

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        await self._admit(WRITE, sum(len(piece) for piece in data))
        await self._file.writev(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        await self._admit(WRITE, length)
        await self._file.write_zeroes(offset, length, may_unmap=may_unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        await self._admit(WRITE, length)
        await self._file.discard(offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return await self._file.block_status(offset, length)

    def flush_nowait(self) -> bool:
        return self._file.flush_nowait()

    def submit_flush(self, done: Callable[[OSError | None], None]) -> bool:
        return self._file.submit_flush(done)

    async def flush(self) -> None:
        await self._file.flush()

    def drain_begin(self) -> None:
        self._member.drain_begin()

    async def close(self) -> None:
        self._member.leave()

    def statistics(self) -> dict[str, object]:
        return self._member.statistics()._asdict()

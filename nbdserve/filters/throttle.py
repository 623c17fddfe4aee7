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

from nbdserve.block.filter import FilterNode
from nbdserve.block.run import READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdserve.block.node import Buffer, Node
    from nbdserve.block.run import Op
    from nbdserve.filters.throttle_group import ThrottleMember

__all__ = ["ThrottleNode"]


class ThrottleNode(FilterNode):
    """A child behind the limits of a throttle group."""

    driver = "throttle"

    def __init__(self, file: Node, member: ThrottleMember) -> None:
        """`member` is this node's own: it leaves its group when the node is closed."""
        super().__init__(file)
        self._member = member

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
        await self.file.read(offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        await self._admit(WRITE, len(data))
        await self.file.write(offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        await self._admit(WRITE, len(data))
        return await self.file.write_fua(offset, data)

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        await self._admit(WRITE, sum(len(piece) for piece in data))
        await self.file.writev(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        await self._admit(WRITE, length)
        await self.file.write_zeroes(offset, length, may_unmap=may_unmap, fallback=fallback)

    async def discard(self, offset: int, length: int) -> None:
        await self._admit(WRITE, length)
        await self.file.discard(offset, length)

    def flush_nowait(self) -> bool:
        return self.file.flush_nowait()

    def submit_flush(self, done: Callable[[OSError | None], None]) -> bool:
        return self.file.submit_flush(done)

    def drain_begin(self) -> None:
        self._member.drain_begin()

    async def close(self) -> None:
        self._member.leave()

    def statistics(self) -> dict[str, object]:
        return self._member.statistics()._asdict()

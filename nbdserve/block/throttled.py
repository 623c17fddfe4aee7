"""A BlockBackend with a throttle before it. One without has none of this on its way.

The throttle comes after the bounds, which the front end has checked, and before everything else:
the write cache, FUA, the node. A request that waits for its turn is in no epoch, so it holds no
host cluster back (block/epoch.py). Write-zeroes and discards count as writes, by their length; a
flush, FUA's included, and a block status count as nothing and wait for nothing.

The synchronous way asks `admit_nowait`; refused, the request becomes late with Miss.THROTTLED and
waits in its task. A request that was admitted but misses for another reason is taken back: it asks
again on its other way, and must not pay twice. One that fails is not: it is answered and does not
come back, so it has paid once, like one that fails later or on the asynchronous way (and in QEMU).

After block/block-backend.c of QEMU (throttle_group_co_io_limits_intercept in blk_co_do_preadv_part
and blk_co_do_pwritev_part).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from nbdserve.block.backend import BlockBackend
from nbdserve.block.run import READ, WRITE, Miss

if TYPE_CHECKING:
    import trio

    from nbdserve.block.epoch import Epochs
    from nbdserve.block.node import Buffer, Done, Node
    from nbdserve.block.run import Op

__all__ = ["Throttle", "ThrottledBackend"]


class Throttle(Protocol):
    """What decides when requests may go; filters/throttle_group.py has the one there is."""

    def admit_nowait(self, op: Op, nb_bytes: int) -> bool:
        """Let a request go if it need not wait."""

    def take_back(self, op: Op, nb_bytes: int) -> None:
        """A request that `admit_nowait` let go did not go."""

    async def admit(self, op: Op, nb_bytes: int) -> None:
        """Return when a request may go."""

    def drain_begin(self) -> None:
        """Hold nothing up any more."""

    def statistics(self) -> object:
        """Counters."""


class ThrottledBackend(BlockBackend):
    """A drive whose requests wait for `throttle`."""

    throttled = True

    def __init__(
        self,
        root: Node,
        epochs: Epochs,
        nursery: trio.Nursery,
        throttle: Throttle,
        **options: Any,  # noqa: ANN401 - checked by BlockBackend
    ) -> None:
        """`options`: BlockBackend's."""
        super().__init__(root, epochs, nursery, **options)
        self._throttle = throttle

    # --- the synchronous way -------------------------------------------------------------------

    def _admit_nowait(self, op: Op, nb_bytes: int) -> bool:
        admitted = self._throttle.admit_nowait(op, nb_bytes)
        self.misses[Miss.THROTTLED] += not admitted
        return admitted

    def read_nowait(self, offset: int, buffer: memoryview) -> Miss | None:
        """As BlockBackend's; Miss.THROTTLED: not now."""
        if not self._admit_nowait(READ, len(buffer)):
            return Miss.THROTTLED
        miss = super().read_nowait(offset, buffer)
        if miss is not None:
            self._throttle.take_back(READ, len(buffer))
        return miss

    def submit_read(self, offset: int, buffer: memoryview, done: Done) -> bool:
        """As BlockBackend's; False also if it would have to wait for the throttle."""
        if not self._admit_nowait(READ, len(buffer)):
            return False
        submitted = super().submit_read(offset, buffer, done)
        if not submitted:
            self._throttle.take_back(READ, len(buffer))
        return submitted

    def submit_write(self, offset: int, data: Buffer, done: Done, *, fua: bool = False) -> bool:
        """As `submit_read`."""
        if not self._admit_nowait(WRITE, len(data)):
            return False
        submitted = super().submit_write(offset, data, done, fua=fua)
        if not submitted:
            self._throttle.take_back(WRITE, len(data))
        return submitted

    def write_nowait(self, offset: int, data: Buffer) -> Miss | None:
        """As BlockBackend's; Miss.THROTTLED: not now."""
        if not self._admit_nowait(WRITE, len(data)):
            return Miss.THROTTLED
        miss = super().write_nowait(offset, data)
        if miss is not None:
            self._throttle.take_back(WRITE, len(data))
        return miss

    # --- the asynchronous way ------------------------------------------------------------------

    async def _admit(self, op: Op, nb_bytes: int) -> None:
        if self._throttle.admit_nowait(op, nb_bytes):
            return
        self.on_wait(1)
        try:
            await self._throttle.admit(op, nb_bytes)
        finally:
            self.on_wait(-1)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._admit(READ, len(buffer))
        await super().read(offset, buffer)

    async def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        await self._admit(WRITE, len(data))
        await super().write(offset, data, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fast: bool = False, fua: bool = False
    ) -> None:
        await self._admit(WRITE, length)
        await super().write_zeroes(offset, length, may_unmap=may_unmap, fast=fast, fua=fua)

    async def discard(self, offset: int, length: int, *, fua: bool = False) -> None:
        await self._admit(WRITE, length)
        await super().discard(offset, length, fua=fua)

    def drain_begin(self) -> None:
        self._throttle.drain_begin()
        super().drain_begin()

    def statistics(self) -> dict[str, object]:
        return {**super().statistics(), "throttle": self._throttle.statistics()}

"""The `memory` driver: a leaf that holds its bytes itself, and is gone with the process.

It cannot be asked for by a name or by --image-opts: who has a content, such as the outcome of a
power cut, gives it as `MemoryOptions`. Nothing ever waits, nothing is ever left to flush.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from nbdserve.block.node import Buffer, Extent, Leaf
from nbdserve.block.units import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbdserve.block.node import Done
    from nbdserve.powercut.content import Content

__all__ = ["MemoryNode"]

SECTOR = 512

# Pieces in one block status answer, as many as the file driver gives.
MAX_PIECES = 1024


class MemoryNode(Leaf):
    """A leaf on a `Content`, which it changes. It grows, as a file does; `size` is in sectors."""

    driver = "memory"
    fua = True
    is_device = False

    def __init__(
        self, content: Content, filename: str, *, read_only: bool, no_flush: bool = False
    ) -> None:
        super().__init__(
            filename, align_up(content.size, SECTOR), read_only=read_only, no_flush=no_flush
        )
        self.content = content

    def _grown(self) -> None:
        self.size = align_up(self.content.size, SECTOR)

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        self.content.read_into(offset, buffer)
        return True

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self.content.write(offset, data)
        self._grown()
        return True

    def writev_nowait(self, offset: int, data: Sequence[Buffer]) -> bool:
        for piece in data:
            self.content.write(offset, piece)
            offset += len(piece)
        self._grown()
        return True

    def flush_nowait(self) -> bool:
        return True

    def submit_read(self, offset: int, buffer: memoryview, done: Done) -> None:
        self.read_nowait(offset, buffer)
        _later(done)

    def submit_write(
        self, offset: int, data: Buffer, done: Done, *, fua: bool = False
    ) -> None:
        self.write_nowait(offset, data)
        _later(done)

    def submit_sync(self, done: Done) -> None:
        _later(done)

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.read_nowait(offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        self.write_nowait(offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        return self.write_nowait(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        self.content.write_zeroes(offset, length)
        self._grown()

    async def discard(self, offset: int, length: int) -> None:
        self.content.discard(offset, length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        extents: list[Extent] = []
        end = offset + length
        while offset < end and len(extents) < MAX_PIECES:
            is_data, stop = self.content.extent(offset)
            piece = min(stop, end) - offset if stop is not None else end - offset
            extents.append(Extent(piece, data=is_data, zero=not is_data))
            offset += piece
        return extents


def _later(done: Done) -> None:
    """As an engine does: never from inside the submission."""
    trio.lowlevel.current_trio_token().run_sync_soon(done, None)

"""A buffer pool that trusts nobody: giving back twice, or using what was given back, shows.

What comes back is filled with POISON and not lent again before all others: bytes that the kernel or
the socket still takes from it are wrong then, on the disk or at the client.
"""

from __future__ import annotations

from nbdserve.block.buffers import BufferPool
from nbdserve.engines.memory import address_of

__all__ = ["POISON", "PoisonedPool"]

POISON = b"\xdb"


class PoisonedPool(BufferPool):
    """`out`: address -> size of what is lent now; `lent`: how often it lent at all."""

    def __init__(self) -> None:
        super().__init__()
        self.out: dict[int, int] = {}
        self.lent = 0

    def take(self, length: int) -> memoryview:
        buffer = super().take(length)
        assert address_of(buffer) not in self.out, "lent twice"
        self.out[address_of(buffer)] = len(buffer)
        self.lent += 1
        buffer[:] = POISON * len(buffer)
        return buffer

    def give(self, buffer: memoryview) -> None:
        assert self.out.pop(address_of(buffer), None) == len(buffer), "given back, but not lent"
        buffer[:] = POISON * len(buffer)
        super().give(buffer)
        self._free[len(buffer)].insert(0, self._free[len(buffer)].pop())

"""A buffer pool that trusts nobody: giving back twice, or using what was given back, shows.

What comes back is filled with POISON and not lent again before all others: bytes that the kernel or
the socket still takes from it are wrong then, on the disk or at the client; and bytes that are put
into it all the same are found when it is lent again, or by `assert_untouched`.
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
        self._back: dict[int, memoryview] = {}  # by address, as they were given back

    def take(self, length: int) -> memoryview:
        buffer = super().take(length)
        assert address_of(buffer) not in self.out, "lent twice"
        self.out[address_of(buffer)] = len(buffer)
        self.lent += 1
        if (back := self._back.pop(address_of(buffer), None)) is not None:
            _assert_poisoned(back)
        buffer[:] = POISON * len(buffer)
        return buffer

    def give(self, buffer: memoryview) -> None:
        assert self.out.pop(address_of(buffer), None) == len(buffer), "given back, but not lent"
        buffer[:] = POISON * len(buffer)
        self._back[address_of(buffer)] = buffer
        super().give(buffer)
        self._free[len(buffer)].insert(0, self._free[len(buffer)].pop())

    def assert_untouched(self) -> None:
        """Nobody has written into a buffer that was given back."""
        for buffer in self._back.values():
            _assert_poisoned(buffer)


def _assert_poisoned(buffer: memoryview) -> None:
    assert buffer == POISON * len(buffer), "written into after it was given back"

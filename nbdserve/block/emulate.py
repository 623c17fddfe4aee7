"""Finding out that a buffer is all zeroes, for the backend's zero detection.

Facts: `any(view)` takes 1.5 ms for 64 KiB, a comparison with a zero buffer through `bytes` 6 us,
most of it the copy. The first and last bytes settle almost every buffer that is not zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.node import Buffer

__all__ = ["is_zero"]

STEP = 1 << 16
_ZEROES = bytes(STEP)


def is_zero(data: Buffer) -> bool:
    """Whether all bytes of `data` are zero."""
    view = memoryview(data)
    if len(view) and (view[0] or view[-1]):
        return False
    for start in range(0, len(view), STEP):
        piece = bytes(view[start : start + STEP])
        if piece != _ZEROES[: len(piece)]:
            return False
    return True

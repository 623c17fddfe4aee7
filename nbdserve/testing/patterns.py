"""What is in a disk, so that a test knows what must be read back from anywhere in it.

A pattern says what each byte is by its offset in the disk, and so can be written in pieces and
checked in others. `offsets` is the one of nbdkit's pattern plugin.
"""

from __future__ import annotations

import random as random_numbers
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pattern", "fill", "offsets", "random", "zeroes"]

BLOCK = 4096


@dataclass(frozen=True)
class Pattern:
    """`length` bytes, wherever they are put; `block` makes the 4096 of them at an offset that is a
    multiple of that. `is_zero`: all are zero."""

    length: int
    block: Callable[[int], bytes]
    is_zero: bool = False

    def at(self, offset: int, length: int) -> bytes:
        """The bytes in [offset, offset + length) of a disk."""
        start = offset // BLOCK * BLOCK
        pieces = b"".join(map(self.block, range(start, offset + length, BLOCK)))
        return pieces[offset - start : offset - start + length]


def size_of(size: int | str) -> int:
    """Bytes, from a number or a size as on the command line. Raises ConfigError."""
    return size if isinstance(size, int) else parse_size(size)


def offsets(length: int | str) -> Pattern:
    """Each 8 bytes are their own offset in the disk, big-endian."""
    return Pattern(size_of(length), _offsets)


def _offsets(start: int) -> bytes:
    return struct.pack(">512Q", *range(start, start + BLOCK, 8))


def random(length: int | str, *, seed: int = 0) -> Pattern:
    """Bytes that do not compress, the same for the same seed and offset."""
    return Pattern(size_of(length), lambda start: _random(seed, start))


@lru_cache(maxsize=256)
def _random(seed: int, start: int) -> bytes:
    return random_numbers.Random(f"{seed}/{start}").randbytes(BLOCK)


def fill(length: int | str, byte: int) -> Pattern:
    """One byte again and again."""
    block = bytes([byte]) * BLOCK
    return Pattern(size_of(length), lambda start: block)


def zeroes(length: int | str) -> Pattern:
    """Zeroes that are written: in qcow2 they hide what a backing file has."""
    return Pattern(size_of(length), lambda start: bytes(BLOCK), is_zero=True)

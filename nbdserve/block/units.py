"""Units: what a number counts.

A plain `int` in a signature is an offset or a length in bytes unless its name says otherwise
(`nb_clusters`, `refcount_bits`). `HostOffset` marks, for the type checker, an offset that was read
from an image and has not been checked against the file.
"""

from __future__ import annotations

from typing import NewType

__all__ = ["KIB", "MIB", "HostOffset", "align_down", "align_up"]

HostOffset = NewType("HostOffset", int)

KIB = 1024
MIB = 1024 * KIB


def align_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit

"""Units as types: an offset says in its type what it counts from.

`int` subclasses that exist for the type checker only. Conversions between guest and host offsets
happen in `formats/qcow2/geometry.py` and nowhere else. A plain `int` in a signature is a length in
bytes unless its name says otherwise (`nb_clusters`, `refcount_bits`).
"""

from __future__ import annotations

from typing import NewType

__all__ = ["KIB", "MIB", "GuestOffset", "HostOffset", "align_down", "align_up"]

GuestOffset = NewType("GuestOffset", int)
HostOffset = NewType("HostOffset", int)

KIB = 1024
MIB = 1024 * KIB


def align_down(value: int, unit: int) -> int:
    """The largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit

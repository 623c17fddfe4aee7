"""The words of the hot path: what a guest range resolves to, and why it does not.

A range of a node *resolves*, synchronously and without I/O, to runs: pieces of leaves (host files),
in guest order, whose lengths add up to the range. Everything between the root node and the leaves
has been folded away when a run is seen, so a request costs no more than one system call per run.

What cannot be resolved is a `Miss`, a value and never an exception: missing is ordinary, and the
caller decides whether a task is worth it. A run is a plain tuple because one is made for each
request; a named tuple costs five times as much to build.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdserve.block.node import Leaf

__all__ = ["READ", "WRITE", "WRITE_FUA", "Miss", "Op", "Resolution", "Run"]


class Op(enum.Enum):
    """What the caller is going to do with the runs.

    WRITE_FUA: write them so that they are durable when done; with them the whole range must be,
    whatever maps it included.
    """

    READ = enum.auto()
    WRITE = enum.auto()
    WRITE_FUA = enum.auto()


READ = Op.READ
WRITE = Op.WRITE
WRITE_FUA = Op.WRITE_FUA


class Miss(enum.Enum):
    """Why a range does not resolve; each reason is counted in the backend's statistics."""

    NOT_CACHED = "a table that maps the range is not in memory"
    NEEDS_ALLOC = "a cluster must be allocated, and its old content is at most zeroes"
    NEEDS_COW = "a cluster must be allocated and old content copied into it"
    COMPRESSED = "the data is compressed"
    OPAQUE = "the node must see every byte"
    WOULD_BLOCK = "the data is not in the page cache"
    NEEDS_FLUSH = "what maps the range may not be durable, so FUA takes a flush"
    THROTTLED = "the limits of a throttle do not allow it yet"


Run = tuple["Leaf | None", int, int]
"""(leaf, host offset in bytes, length in bytes); without a leaf the piece reads as zeroes."""

Resolution = list[Run] | Miss

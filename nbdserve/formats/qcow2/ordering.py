"""The order in which metadata reaches the disk, and the write-back that keeps it.

`WRITE_ORDER` is the law: what must be durable before what, and what a crash leaves otherwise.
`STAGE` says how it is kept. A write-back takes the bytes of everything dirty at one moment and
writes them in stages, with a flush of the file between stages. Whatever a stage's tables point to
was made durable by an earlier stage, or before; what is in a data file by a flush of that before L2
entries are written.

The order has no cycle, because nothing that frees is in it: a refcount is only lowered once the
unlinking is durable (quarantine.py). So three stages suffice for everything, and the usual
write-back (no refcount block is new) needs one flush between its two.

What changes while a write-back is under way is not in its snapshot and waits for the next one: an
L2 entry linked meanwhile can never get to the disk before the data and refcounts it needs.

Should the process die before, the guardian writes the same in the same stages (redo.py).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

import trio

from nbdserve.block.node import Leaf
from nbdserve.formats.qcow2.header import incompatible_features_update, refcount_table_update
from nbdserve.formats.qcow2.spec import IncompatibleFeature
from nbdserve.formats.qcow2.tables import Table, TableWrite

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdserve.formats.qcow2.image import Image

__all__ = [
    "L1_TABLE",
    "L2_TABLE",
    "REFCOUNT_BLOCK",
    "REFCOUNT_TABLE",
    "STAGE",
    "TABLES",
    "WRITE_ORDER",
    "Rule",
    "TableKind",
    "What",
    "is_dirty",
    "mark_corrupt",
    "write_back",
]


class What(enum.Enum):
    """What a rule orders."""

    DATA = "new data, and old data copied into a new cluster"
    NEW_REFCOUNT_BLOCK = "a refcount block that the table does not point to yet"
    NEW_REFCOUNT_TABLE = "a refcount table that the header does not point to yet"
    REFCOUNT_TABLE_ENTRY = "a refcount table entry"
    HEADER = "the header's pointer to the refcount table"
    REFCOUNT = "a raised refcount"
    NEW_L2_TABLE = "an L2 table that L1 does not point to yet"
    L2_ENTRY = "an L2 entry that links or unlinks a cluster"
    L1_ENTRY = "an L1 entry"
    LOWERED_REFCOUNT = "a lowered refcount"


class Rule(NamedTuple):
    """`first` is durable before `then` is written; otherwise a crash leaves `otherwise`."""

    first: What
    then: What
    otherwise: str


WRITE_ORDER = (
    Rule(What.REFCOUNT, What.L2_ENTRY, "a mapped cluster that looks free: two owners later"),
    Rule(What.DATA, What.L2_ENTRY, "old bytes lost, or somebody else's exposed"),
    Rule(What.L2_ENTRY, What.LOWERED_REFCOUNT, "a mapped cluster handed to someone else"),
    Rule(What.NEW_L2_TABLE, What.L1_ENTRY, "an L1 entry that points at garbage"),
    Rule(What.REFCOUNT, What.L1_ENTRY, "an L2 table that looks free"),
    Rule(What.NEW_REFCOUNT_BLOCK, What.REFCOUNT_TABLE_ENTRY, "refcounts read from garbage"),
    Rule(What.REFCOUNT_TABLE_ENTRY, What.L2_ENTRY, "a mapped cluster that looks free"),
    Rule(What.NEW_REFCOUNT_TABLE, What.HEADER, "a header that points at nothing"),
    Rule(What.HEADER, What.L2_ENTRY, "a mapped cluster that looks free"),
)

# What is durable before the first stage is written by the request itself (DATA); what comes after
# the last one is only allowed into the caches when that one is durable (LOWERED_REFCOUNT).
STAGE = {
    What.NEW_REFCOUNT_BLOCK: 0,
    What.NEW_REFCOUNT_TABLE: 0,
    What.DATA: 1,
    What.REFCOUNT: 1,
    What.REFCOUNT_TABLE_ENTRY: 1,
    What.HEADER: 1,
    What.NEW_L2_TABLE: 1,
    What.L2_ENTRY: 2,
    What.L1_ENTRY: 2,
    What.LOWERED_REFCOUNT: 3,
}


class TableKind(NamedTuple):
    """What the entries of a table are while nothing on disk points to it, and after that."""

    if_fresh: What
    otherwise: What


REFCOUNT_BLOCK = TableKind(What.NEW_REFCOUNT_BLOCK, What.REFCOUNT)
REFCOUNT_TABLE = TableKind(What.NEW_REFCOUNT_TABLE, What.REFCOUNT_TABLE_ENTRY)
L2_TABLE = TableKind(What.NEW_L2_TABLE, What.L2_ENTRY)
L1_TABLE = TableKind(What.L1_ENTRY, What.L1_ENTRY)
TABLES = (REFCOUNT_BLOCK, REFCOUNT_TABLE, L2_TABLE, L1_TABLE)

# Slices written without letting anybody else run.
MAX_WRITES = 256


async def write_back(image: Image) -> None:
    """Write all dirty metadata, in order. One at a time: the caller holds the image's flush lock.

    Returns when the last stage was handed to the file, not yet flushed. On an error everything is
    dirty again and the next write-back starts over.
    """
    image.quarantine.seal()
    mark = image.redo.begin_write_back()
    pending = _dirty_tables(image)
    if not pending and not image.refcounts.moved_from:
        image.redo.written_back(mark)
        return
    moved_from, image.refcounts.moved_from = image.refcounts.moved_from, []
    stages: list[list[TableWrite]] = [[], [], []]
    for what, table in pending:
        stages[STAGE[what]] += table.snapshot()
    if moved_from:
        # The new refcount table is durable after stage 0 and in force after this.
        stages[STAGE[What.HEADER]].append(_header_update(image))
    try:
        for number, writes in enumerate(stages):
            if not writes:
                continue
            if number == STAGE[What.L2_ENTRY] or any(stages[:number]):
                # Makes durable what this stage points to: earlier stages and requests' data.
                if number == STAGE[What.L2_ENTRY] and image.data_file is not None:
                    await image.data_file.flush()
                await image.file.flush()
                pending = _settle(image, pending, number)
            await _write(image, writes)
            image.durability.file_written()
    except BaseException:
        for _, table in pending:
            table.not_written()
        image.refcounts.moved_from = moved_from + image.refcounts.moved_from
        raise
    _settle(image, pending, len(stages))
    image.redo.written_back(mark)
    for host_offset, nb_clusters in moved_from:
        first = host_offset >> image.geometry.cluster_bits
        for cluster in range(first, first + nb_clusters):
            image.quarantine.add(cluster)


def _settle(
    image: Image, pending: list[tuple[What, Table]], stage: int
) -> list[tuple[What, Table]]:
    """Tables of the stages before `stage` are written; return the others.

    Done as soon as it is true: if a later stage fails, what was written may be linked on disk
    already, and must not be taken for unreachable when the write-back starts over.
    """
    for what, table in pending:
        if STAGE[what] < stage:
            table.written()
            image.written_back[what.name] += 1
    return [(what, table) for what, table in pending if STAGE[what] >= stage]


def _header_update(image: Image) -> TableWrite:
    table = image.refcounts.table
    nb_clusters = image.geometry.clusters(table.nb_bytes)
    return TableWrite(*refcount_table_update(table.host_offset, nb_clusters))


def _dirty_tables(image: Image) -> list[tuple[What, Table]]:
    """Everything dirty, with what it is."""
    refcounts = image.refcounts
    candidates: list[tuple[TableKind, Iterable[Table]]] = [
        (REFCOUNT_BLOCK, refcounts.blocks.dirty()),
        (REFCOUNT_TABLE, [refcounts.table]),
        (L2_TABLE, image.l2.dirty()),
        (L1_TABLE, [image.mapping.l1]),
    ]
    return [
        (kind.if_fresh if table.fresh else kind.otherwise, table)
        for kind, tables in candidates
        for table in tables
        if table.dirty
    ]


def is_dirty(image: Image) -> bool:
    """Whether a write-back would write anything."""
    return bool(_dirty_tables(image) or image.refcounts.moved_from)


async def _write(image: Image, writes: list[TableWrite]) -> None:
    leaf = image.file if isinstance(image.file, Leaf) else None
    for number, (host_offset, data) in enumerate(writes):
        if number % MAX_WRITES == MAX_WRITES - 1:
            await trio.lowlevel.checkpoint()
        image.check_writable()
        image.durability.table_written(host_offset, len(data))
        # Slices are small and go into the page cache: a hop for each would cost ten times as much.
        if leaf is None or not leaf.write_nowait(host_offset, data):
            await image.file.write(host_offset, data)


async def mark_corrupt(image: Image) -> None:
    """Set the corrupt bit, so that nobody writes to the image before it is repaired.

    Version 2 has no such bit.
    """
    if image.header.version >= 3:
        features = image.header.incompatible_features | IncompatibleFeature.CORRUPT
        update = incompatible_features_update(image.header, features)
        await image.file.write(update.offset, update.data)
        await image.file.flush()

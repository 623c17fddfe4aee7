"""What is measured: one row per case, with the ratios that the project holds itself to.

A case is data.  How it is run is clients.py's, what it runs on is images.py's.
"""

import dataclasses
import enum
from collections.abc import Mapping

KIB = 1024
MIB = 1024 * KIB


class Disk(enum.Enum):
    """What the server has open when the case starts."""

    FULL = "full"  # every cluster allocated, in the page cache
    UNCACHED = "uncached"  # the same, in no page cache, where O_DIRECT works
    EMPTY = "empty"  # a new image, nothing allocated


class Unit(enum.Enum):
    """What is counted per second."""

    IOPS = "IOPS"
    MIB = "MiB/s"


@dataclasses.dataclass(frozen=True, slots=True)
class Fio:
    """A job of fio's nbd engine; `total_bytes` 0 means that it runs for the time asked for.

    `flush`: one after each write, which it waits for before the next write.  Only 1 deep: deeper,
    fio issues them without waiting for the write (and fio 3.33 does not even take turns: one
    write, fifteen flushes, sixteen writes ...).  So n writers that flush are n connections, and
    1 deep each.
    """

    pattern: str  # fio's --rw
    block_bytes: int
    depth: int
    connections: int = 1
    total_bytes: int = 0
    flush: bool = False

    def __post_init__(self) -> None:
        if self.flush and self.depth != 1:
            raise ValueError("with a flush after each write fio is 1 deep a connection")


@dataclasses.dataclass(frozen=True, slots=True)
class Nbdcopy:
    """The whole disk by nbdcopy: out to null:, or in from a raw file."""

    into_server: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """`targets`: opponent's family -> least ratio of ours to it; no entry, no promise.

    `cache`: the mode that every server is told.
    """

    name: str
    client: Fio | Nbdcopy
    disk: Disk
    unit: Unit
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cache: str = "writeback"


FULL, UNCACHED, EMPTY = Disk
IOPS, MIBS = Unit

CASES = {case.name: case for case in (
    Case("randread-1",    Fio("randread",    4 * KIB,  1), FULL, IOPS, {"qemu": 1.1}),
    Case("randread-32",   Fio("randread",    4 * KIB, 32), FULL, IOPS, {"qemu": 2, "nbdkit": 1.2}),
    Case("randread-4x16", Fio("randread",    4 * KIB, 16, connections=4), FULL, IOPS, {"qemu": 2}),
    Case("randwrite-32",  Fio("randwrite",   4 * KIB, 32), FULL, IOPS, {"qemu": 1.2}),
    Case("seqread",       Fio("read",      256 * KIB,  8), FULL, MIBS, {"qemu": 2}),
    Case("seqwrite",      Fio("write",     256 * KIB,  8), FULL, MIBS, {"qemu": 2}),
    Case("first-seq",     Fio("write",      64 * KIB,  8, total_bytes=1024 * MIB),
         EMPTY, MIBS, {"qemu": 1}),
    # As many writes as the disk has clusters, at random: they reach 63 % of the clusters, so most
    # requests allocate and copy on write, and some find the cluster just being made.
    Case("first-rand",    Fio("randwrite",   4 * KIB, 32, total_bytes=64 * MIB),
         EMPTY, IOPS, {"qemu": 1}),
    Case("none-read-32",  Fio("randread",    4 * KIB, 32), UNCACHED, IOPS, {"qemu": 2}, "none"),
    Case("none-write-32", Fio("randwrite",   4 * KIB, 32), UNCACHED, IOPS, {"qemu": 1.5}, "none"),
    Case("fsync-1",       Fio("randwrite",   4 * KIB,  1, flush=True), FULL, IOPS, {"qemu": 1}),
    Case("fsync-16",      Fio("randwrite",   4 * KIB,  1, connections=16, flush=True),
         FULL, IOPS, {"qemu": 1.5}),
    Case("copy-out",      Nbdcopy(into_server=False), FULL,  MIBS),
    Case("copy-in",       Nbdcopy(into_server=True),  EMPTY, MIBS),
)}

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
    EMPTY = "empty"  # a new image, nothing allocated


class Unit(enum.Enum):
    """What is counted per second."""

    IOPS = "IOPS"
    MIB = "MiB/s"


@dataclasses.dataclass(frozen=True, slots=True)
class Fio:
    """A job of fio's nbd engine; `total_bytes` 0 means that it runs for the time asked for."""

    pattern: str  # fio's --rw
    block_bytes: int
    depth: int
    connections: int = 1
    total_bytes: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Nbdcopy:
    """The whole disk by nbdcopy: out to null:, or in from a raw file."""

    into_server: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """`targets`: opponent's family -> least ratio of ours to it; no entry, no promise."""

    name: str
    client: Fio | Nbdcopy
    disk: Disk
    unit: Unit
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)


FULL, EMPTY = Disk
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
    Case("copy-out",      Nbdcopy(into_server=False), FULL,  MIBS),
    Case("copy-in",       Nbdcopy(into_server=True),  EMPTY, MIBS),
)}

"""What it costs to refuse each damaged image: reads, bytes read, memory, time. `make refusals`.

Each damage is a file of a few clusters with one thing wrong in it, among them the largest numbers
that a header can say; `size` is what the file is said to have, so that no limit is met just because
the file is short. What is done with it is to open it, and where that succeeds to read the cluster
that is damaged. The bounds that the table's rows keep are in test_damages.py, in bytes and reads;
the seconds are for people.
"""

from __future__ import annotations

import struct
import sys
import time
import tracemalloc
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zstandard

from fuzz import loop
from fuzz.image import ImageFile, open_node
from fuzz.qcow2 import BITMAPS, build
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.open import read_header
from qcow2_model import COMPRESSED, COPIED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdserve.formats.qcow2.node import Qcow2Node

__all__ = ["DAMAGES", "Cost", "Damage", "measure"]

KIB, MIB = 1 << 10, 1 << 20
HUGE = 1 << 60
ALL_ONES = (1 << 32) - 1


@dataclass(frozen=True)
class Damage:
    """`reads`: it opens, and only reading its first cluster fails. `says`: what the error has to
    name. `extra`: bytes of memory beyond the few that any refusal takes, where the file itself is
    so large."""

    name: str
    data: bytes
    says: str
    size: int = 0
    reads: bool = False
    extra: int = 0


@dataclass(frozen=True)
class Cost:
    """Of one refusal. `peak`: bytes allocated at a time, by Python's own count."""

    error: str
    reads: int
    nb_bytes: int
    largest: int
    peak: int
    seconds: float


def patched(data: bytes, *fields: tuple[int, int, int]) -> bytes:
    """With other numbers in it: (offset, bytes, value)."""
    changed = bytearray(data)
    for offset, width, value in fields:
        changed[offset : offset + width] = value.to_bytes(width, "big")
    return bytes(changed)


def extended(extensions: Iterable[tuple[int, bytes]], **options: object) -> bytes:
    """With header extensions."""
    return build(("data",), extensions=extensions, **options)  # type: ignore[arg-type]


def many_extensions() -> bytes:
    """As many empty ones as 2 MiB hold."""
    image = bytearray(build(("data",), cluster_bits=21))
    image[112 : 2 * MIB] = (struct.pack(">II", 0x11111111, 0) * (2 * MIB // 8))[: 2 * MIB - 112]
    return bytes(image)


def full_table(entry: int, *, l1: bool) -> bytes:
    """The largest L1 or refcount table that is allowed, each entry the same."""
    unit = 64 * KIB
    size = 32 * MIB if l1 else 8 * MIB
    base = build(("data",), cluster_bits=16)
    at = len(base)
    table = struct.pack(">Q", entry) * (size // 8)
    if l1:
        return (
            patched(
                base, (24, 8, (size // 8) * (unit // 8) * unit), (36, 4, size // 8), (40, 8, at)
            )
            + table
        )
    return patched(base, (48, 8, at), (56, 4, size // unit)) + table


def with_entry(entry: int, tail: bytes = b"", **options: object) -> bytes:
    """An image whose first guest cluster has this L2 entry."""
    image = build(("none",), **options)  # type: ignore[arg-type]
    unit = 1 << int.from_bytes(image[20:24], "big")
    return patched(image, (4 * unit, 8, entry)) + tail.ljust(unit, b"\0")


def packed(data: bytes) -> bytes:
    """A deflate stream."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


GOOD = build(("data", "data"))
AT_5 = 5 * 512
SECTORS_512 = 62 - 1  # where a compressed descriptor's sectors begin, with clusters of 512 bytes
SECTORS_64K = 62 - 8

DAMAGES = [
    Damage("an empty file", b"", "not a qcow2 image"),
    Damage("another format", b"\x7fELF" * 1000, "not a qcow2 image"),
    Damage("only the magic", b"QFI\xfb", "version 0"),
    Damage("cut within the header", GOOD[:100], "0 bytes long"),
    Damage("cut within the first cluster", GOOD[:400], "cut short"),
    Damage("cut behind the header", GOOD[:512], "cut short"),
    Damage("version 1", patched(GOOD, (4, 4, 1)), "version 1"),
    Damage("version 2**32-1", patched(GOOD, (4, 4, ALL_ONES)), "version"),
    Damage("clusters of 256 bytes", patched(GOOD, (20, 4, 8)), "cluster_bits"),
    Damage("clusters of 4 MiB", patched(GOOD, (20, 4, 22)), "cluster_bits", size=HUGE),
    Damage(
        "clusters of 2**(2**32-1) bytes",
        patched(GOOD, (20, 4, ALL_ONES)),
        "cluster_bits",
        size=HUGE,
    ),
    Damage("a header of 4 GiB", patched(GOOD, (100, 4, ALL_ONES - 7)), "header", size=HUGE),
    Damage("a header of 8 bytes", patched(GOOD, (100, 4, 8)), "header"),
    Damage("refcounts of 128 bits", patched(GOOD, (96, 4, 7)), "refcount_order"),
    Damage("refcounts of 2**(2**32-1) bits", patched(GOOD, (96, 4, ALL_ONES)), "refcount_order"),
    Damage("a disk of 16 EiB", patched(GOOD, (24, 8, (1 << 64) - 1)), "too large", size=HUGE),
    Damage("a disk larger than L1 maps", patched(GOOD, (24, 8, 1 << 30)), "L1 table is too small"),
    Damage(
        "an L1 table of 32 GiB",
        patched(GOOD, (36, 4, ALL_ONES)),
        "L1 table is too large",
        size=HUGE,
    ),
    Damage("an L1 table past the end", patched(GOOD, (40, 8, 1 << 40)), "L1 table"),
    Damage(
        "an L1 table at 2**64-512", patched(GOOD, (40, 8, (1 << 64) - 512)), "L1 table", size=HUGE
    ),
    Damage("an L1 table within a cluster", patched(GOOD, (40, 8, 520)), "L1 table"),
    Damage("an L1 table on the header", patched(GOOD, (40, 8, 0)), "overlaps"),
    Damage(
        "the largest L1 table, one L2 table in each entry",
        full_table(4 << 16 | COPIED, l1=True),
        "overlaps other metadata",
        extra=160 * MIB,
    ),
    Damage("no refcount table", patched(GOOD, (56, 4, 0)), "refcount table"),
    Damage(
        "a refcount table of 2 TiB",
        patched(GOOD, (56, 4, ALL_ONES)),
        "refcount table is too large",
        size=HUGE,
    ),
    Damage("a refcount table on L1", patched(GOOD, (48, 8, 512)), "overlaps"),
    Damage(
        "the largest refcount table, one block in each entry",
        full_table(3 << 16, l1=False),
        "overlaps other metadata",
        extra=48 * MIB,
    ),
    Damage(
        "a refcount block within a cluster",
        patched(build(("data",), cluster_bits=10), (2048, 8, 3 * 1024 + 512)),
        "not aligned",
    ),
    Damage("a refcount block past the end", patched(GOOD, (1024, 8, 1 << 40)), "beyond the end"),
    Damage("a refcount block on the header", patched(GOOD, (1024, 8, 1 << 63)), "beyond the end"),
    Damage(
        "an L2 table within a cluster",
        patched(build(("data",), cluster_bits=10), (1024, 8, 4608 | COPIED)),
        "not aligned",
    ),
    Damage("an L2 table past the end", patched(GOOD, (512, 8, 1 << 40 | COPIED)), "beyond the end"),
    Damage("an L2 table on the refcount block", patched(GOOD, (512, 8, 1536 | COPIED)), "overlaps"),
    Damage(
        "2**32-1 snapshots",
        patched(GOOD, (60, 4, ALL_ONES)),
        "snapshot table is too large",
        size=HUGE,
    ),
    Damage(
        "a snapshot table past the end",
        patched(GOOD, (60, 4, 1), (64, 8, 1 << 40)),
        "snapshot table",
    ),
    Damage(
        "a bitmap directory of 16 EiB",
        extended([(BITMAPS, struct.pack(">IIQQ", 1, 0, (1 << 64) - 1, 0))], features=(0, 1)),
        "bitmap directory is too large",
        size=HUGE,
    ),
    Damage(
        "2**32-1 bitmaps",
        extended([(BITMAPS, struct.pack(">IIQQ", ALL_ONES, 0, 24, 512))], features=(0, 1)),
        "bitmaps",
        size=HUGE,
    ),
    Damage("a bitmaps extension of 0 bytes", extended([(BITMAPS, b"")]), "bitmaps extension"),
    Damage(
        "an extension of 4 GiB",
        patched(GOOD, (112, 8, 0x11111111_FFFFFFFF)),
        "extension",
        size=HUGE,
    ),
    Damage(
        "an extension into the backing file name",
        patched(build(("data",), backing=b"base" * 20), (112, 8, 0x11111111_00000020)),
        "extension",
    ),
    Damage("262,130 header extensions", many_extensions(), "more than 256", extra=8 * MIB),
    Damage("an extension twice", extended([(0xE2792ACA, b"raw")] * 2), "appears 2 times"),
    Damage(
        "feature names of nothing",
        extended([(0x6803F857, b"\0\7" + b"\n" * 46)], features=(1 << 7, 0)),
        "??",
    ),
    Damage(
        "a backing file name of 4 GiB",
        patched(GOOD, (8, 8, 200), (16, 4, ALL_ONES)),
        "name",
        size=HUGE,
    ),
    Damage("a backing file name past the end", patched(GOOD, (8, 8, 1 << 40), (16, 4, 4)), "name"),
    Damage("a backing file name in the header", patched(GOOD, (8, 8, 8), (16, 4, 4)), "name"),
    Damage("a backing format of 200 bytes", extended([(0xE2792ACA, b"q" * 200)]), "backing format"),
    Damage("features that nobody knows", build(features=(1 << 63, 0)), "incompatible"),
    Damage("extended L2 entries in 512-byte clusters", build(features=(16, 0)), "extended L2"),
    Damage("encrypted", patched(GOOD, (32, 4, 1)), "encrypted"),
    Damage("an unknown compression", patched(GOOD, (104, 1, 7)), "compression type 7"),
    Damage("an L2 entry with reserved bits", with_entry(AT_5 | COPIED | 6), "damaged", reads=True),
    Damage(
        "an L2 entry within a cluster",
        with_entry(5 << 10 | 512 | COPIED, cluster_bits=10),
        "damaged",
        reads=True,
    ),
    Damage(
        "compressed data that is none",
        with_entry(COMPRESSED | AT_5, b"\xff" * 512),
        "decompress",
        reads=True,
    ),
    Damage(
        "compressed data past the end", with_entry(COMPRESSED | 1 << 40), "decompress", reads=True
    ),
    Damage(
        "compressed data too short",
        with_entry(COMPRESSED | AT_5, packed(b"x" * 99)),
        "hold only 99",
        reads=True,
    ),
    Damage(
        "a zstd frame with a window of 2 GiB",
        with_entry(COMPRESSED | AT_5, b"\x28\xb5\x2f\xfd\0\xa8" + b"\1\0\0" * 20, zstd=True),
        "decompress",
        reads=True,
    ),
    Damage(
        "zstd frames that are empty",
        with_entry(COMPRESSED | 1 << SECTORS_512 | AT_5, zstandard.compress(b"") * 100, zstd=True),
        "decompress",
        reads=True,
    ),
]

BOMB = with_entry(
    COMPRESSED | 127 << SECTORS_64K | 5 << 16, packed(bytes(60 * MIB)), cluster_bits=16
)
"""A compressed cluster that would inflate to 60 MiB. It is not refused: its first cluster
counts."""


async def refuse(damage: Damage, file: ImageFile) -> str:
    """What is said about it."""
    try:
        header = await read_header(file)
        node, _ = await open_node(file, header, read_only=False)
    except ImageError as refusal:
        error = refusal
    else:
        return await refuse_to_read(damage, node)
    assert not damage.reads, f"{damage.name}: it did not even open: {error}"
    assert not file.writes, damage.name
    return str(error)


async def refuse_to_read(damage: Damage, node: Qcow2Node) -> str:
    """The same of one that opens."""
    assert damage.reads, f"{damage.name}: it opened"
    try:
        await node.read(0, memoryview(bytearray(512)))
    except OSError as error:
        return str(error.strerror)
    raise AssertionError(f"{damage.name}: it was read")


def attempt(damage: Damage) -> tuple[str, ImageFile]:
    """Refuse it once."""
    file = ImageFile(damage.data)
    file.size = max(file.size, damage.size)
    return loop.run(lambda: refuse(damage, file)), file


def measure(damage: Damage, repetitions: int = 5) -> Cost:
    """Refuse it, for its time the best of some, and once more for its memory."""
    error, _ = attempt(damage)  # and what is imported late
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        attempt(damage)
        seconds.append(time.perf_counter() - began)
    file = ImageFile(damage.data)
    file.size = max(file.size, damage.size)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    loop.run(lambda: refuse(damage, file))
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return Cost(error, file.reads, file.nb_bytes, file.largest, peak, min(seconds, default=0))


def main() -> int:
    """The table, in Markdown."""
    print("| damage | refused when | reads | bytes read | memory | time |")
    print("|---|---|---|---|---|---|")
    for damage in DAMAGES:
        cost = measure(damage)
        when = "read" if damage.reads else "opened"
        print(
            f"| {damage.name} | {when} | {cost.reads} | {cost.nb_bytes:,} |"
            f" {cost.peak / KIB:,.0f} KiB | {cost.seconds * 1000:.2f} ms |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

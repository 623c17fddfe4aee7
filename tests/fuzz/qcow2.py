"""qcow2 images in memory, made and read without the package: what the image target starts from and
what it believes.

`build` makes an image of some kilobytes, by default one with each kind of cluster. `Naive` reads
any image whose header is sound, cluster by cluster, from the specification: what a guest cluster
reads as, or that it cannot be read. `trusted` says whether writing to the image can be expected to
leave everything else as it is: it cannot where refcounts lie or two clusters share their place.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import zstandard
from isal import isal_zlib

from qcow2_model import COMPRESSED, COPIED, OFFSET, ZERO, Layout

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BITMAPS", "KINDS", "Naive", "build", "content", "trusted"]

BACKING_FORMAT, BITMAPS, DATA_FILE, NAMES = 0xE2792ACA, 0x23852875, 0x44415441, 0x6803F857
KINDS = ("data", "none", "zero", "reserved", "compressed", "compressed", "data", "data", "shared")
MAX_ZSTD_WINDOW = 8 << 20

# isal's stub declares its exception as an instance of Exception.
ERRORS: Any = (zstandard.ZstdError, isal_zlib.IsalError)


# --- made ----------------------------------------------------------------------------------------


def content(guest: int, nb_bytes: int) -> bytes:
    """What is in a cluster: the same for each, and no two periods of it alike."""
    return bytes(
        (position * 7 + guest * 31 + position // 251) % 251 for position in range(nb_bytes)
    )


def build(
    kinds: Iterable[str] = KINDS,
    *,
    cluster_bits: int = 9,
    version: int = 3,
    refcount_order: int = 4,
    size: int | None = None,
    at: int = 0,
    zstd: bool = False,
    features: tuple[int, int] = (0, 0),
    extensions: Iterable[tuple[int, bytes]] = (),
    backing: bytes = b"",
    nb_snapshots: int = 0,
) -> bytes:
    """An image whose guest clusters from `at` on, in one L2 table, are of these kinds. The header,
    L1 table, refcount table, refcount block and L2 table are its first clusters. `features`:
    incompatible and autoclear ones."""
    unit = 1 << cluster_bits
    per_table = unit // 8
    kinds = list(kinds)
    if size is None:
        size = (at + max(len(kinds), 24)) * unit - 512
    covered = per_table * unit
    l1 = [0] * max(1, -(-size // covered))
    clusters = [bytes(unit)] * 5
    counts = dict.fromkeys(range(5), 1)
    l2 = [0] * per_table
    for number, kind in enumerate(kinds):
        guest = at + number
        l2[guest % per_table] = _add(clusters, counts, kind, guest, cluster_bits, zstd=zstd)
    l1[at // per_table] = 4 * unit | COPIED
    # A cluster of its own for a snapshot table that nobody reads.
    snapshots = len(clusters) if nb_snapshots else 0
    if nb_snapshots:
        counts[len(clusters)] = 1
        clusters.append(bytes(unit))
    clusters[0] = _header(
        unit,
        version,
        size,
        cluster_bits,
        len(l1),
        refcount_order,
        zstd,
        features,
        extensions,
        backing,
        nb_snapshots,
        snapshots,
    )
    clusters[1] = _table(l1, unit)
    clusters[2] = _table([3 * unit], unit)
    clusters[3] = _refcounts(counts, refcount_order, unit)
    clusters[4] = _table(l2, unit)
    return b"".join(clusters)


def _add(
    clusters: list[bytes], counts: dict[int, int], kind: str, guest: int, bits: int, *, zstd: bool
) -> int:
    """Append what a guest cluster needs; its L2 entry."""
    unit = 1 << bits
    host = len(clusters)
    if kind in ("none", "zero"):
        return ZERO if kind == "zero" else 0
    counts[host] = 1
    if kind == "compressed":
        data = content(guest, unit)
        if zstd:
            packed = zstandard.compress(data)
        else:
            packer = zlib.compressobj(6, zlib.DEFLATED, -12)
            packed = packer.compress(data) + packer.flush()
        assert len(packed) <= unit
        clusters.append(packed.ljust(unit, b"\0"))
        sectors = (len(packed) - 1) // 512
        return COMPRESSED | sectors << 62 - (bits - 8) | host << bits
    clusters.append(content(guest, unit))
    if kind == "shared":  # as if a snapshot had it, too
        counts[host] = 2
        return host << bits
    return host << bits | COPIED | (ZERO if kind == "reserved" else 0)


def _table(entries: list[int], unit: int) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries).ljust(unit, b"\0")


def _refcounts(counts: dict[int, int], order: int, unit: int) -> bytes:
    block = bytearray(unit)
    bits = 1 << order
    for number, count in counts.items():
        count = min(count, (1 << bits) - 1)
        if bits >= 8:
            block[number * bits // 8 : (number + 1) * bits // 8] = count.to_bytes(bits // 8, "big")
        else:
            block[number * bits // 8] |= count << number * bits % 8
    return bytes(block)


def _header(
    unit: int,
    version: int,
    size: int,
    cluster_bits: int,
    l1_size: int,
    order: int,
    zstd: bool,
    features: tuple[int, int],
    extensions: Iterable[tuple[int, bytes]],
    backing: bytes,
    nb_snapshots: int,
    snapshots: int,
) -> bytes:
    tail = b"".join(
        struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
        for kind, data in extensions
    ) + bytes(8)
    incompatible, autoclear = features
    extra = b""
    if version == 3:
        extra = struct.pack(
            ">QQQIIQ", incompatible | 8 * zstd, 0, autoclear, order, 112, zstd << 56
        )
    start = 72 + len(extra)
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        start + len(tail) if backing else 0,
        len(backing),
        cluster_bits,
        size,
        0,
        l1_size,
        unit,
        2 * unit,
        1,
        nb_snapshots,
        snapshots * unit,
    )
    cluster = (head + extra + tail + backing).ljust(unit, b"\0")
    assert len(cluster) == unit, "the header does not fit"
    return cluster


# --- read ----------------------------------------------------------------------------------------


class Naive:
    """The disk of an image whose header is sound. `backing` is what shows through.

    Of an image with a data file only the metadata is looked at.
    """

    def __init__(self, image: bytes, backing: bytes = b"") -> None:
        self.layout = layout = Layout(image)
        self.image = image
        self.unit = layout.cluster_size
        self.size = layout.size // 512 * 512
        self.nb_clusters = -(-self.size // self.unit)
        self._backing = backing
        self._zstd = (
            layout.version == 3 and struct.unpack_from(">I", image, 100)[0] > 104 and image[104]
        )
        self._tables: dict[int, list[int] | None] = {}
        known = COPIED | COMPRESSED | (OFFSET & -self.unit)
        self._reserved = ~(known | ZERO if layout.version == 3 else known)

    @property
    def nb_tables(self) -> int:
        """The L1 entries that the disk needs."""
        return int(-(-self.nb_clusters // (self.unit // 8)))

    def table(self, index: int) -> list[int] | None:
        """The L2 table of an L1 entry; None: it lies where none can be."""
        if index not in self._tables:
            offset = self.layout.l1[index] & OFFSET
            count = self.unit // 8
            self._tables[index] = (
                None
                if offset % self.unit
                else self.layout.words(offset, count)
                if offset
                else [0] * count
            )
        return self._tables[index]

    def entry(self, guest: int) -> int | None:
        """The L2 entry of a guest cluster; None: it has none, or one that means nothing."""
        table = self.table(guest * 8 // self.unit)
        if table is None:
            return None
        entry = table[guest % (self.unit // 8)]
        return None if entry & self._reserved and not entry & COMPRESSED else entry

    def used(self, most: int) -> list[int]:
        """The first guest clusters with an entry of any kind."""
        found: list[int] = []
        for index in range(self.nb_tables):
            if self.layout.l1[index] & OFFSET:
                first = index * (self.unit // 8)
                entries = self.table(index)
                count = min(self.unit // 8, self.nb_clusters - first)
                # Of a table in an impossible place the first cluster tells as much as all.
                found += (
                    [first]
                    if entries is None
                    else [first + number for number in range(count) if entries[number]]
                )
            if len(found) >= most:
                break
        return found[:most]

    def cluster(self, guest: int) -> bytes | None:
        """What it reads as, up to the end of the disk; None: it cannot be read."""
        entry = self.entry(guest)
        if entry is None:
            return None
        length = min(self.unit, self.size - guest * self.unit)
        if entry & COMPRESSED:
            data = self._decompress(entry)
            return None if data is None else data[:length]
        if entry & ZERO:
            return bytes(length)
        host = entry & OFFSET
        if host:
            return bytes(self.image[host : host + length]).ljust(length, b"\0")
        start = guest * self.unit
        return self._backing[start : start + length].ljust(length, b"\0")

    def _decompress(self, entry: int) -> bytes | None:
        offset, nb_bytes = self.layout.compressed(entry)
        # What lies past the end of a file reads as zeroes.
        packed = bytes(self.image[offset : offset + nb_bytes]).ljust(nb_bytes, b"\0")
        try:
            if self._zstd:
                context = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
                with context.stream_reader(packed, read_across_frames=True) as reader:
                    data = reader.read(self.unit)
            else:
                data = isal_zlib.decompressobj(-15).decompress(packed, self.unit)
        except ERRORS:
            return None
        return data if len(data) == self.unit else None

    def _blocks(self) -> list[tuple[int, int]]:
        """(number, host offset) of each refcount block."""
        layout = self.layout
        entries = layout.words(layout.table_offset, layout.table_clusters * self.unit // 8)
        return [(number, entry & -512) for number, entry in enumerate(entries) if entry & -512]

    def refcounts(self) -> Counter[int]:
        """Refcount by cluster, where it is not zero."""
        counts: Counter[int] = Counter()
        for number, offset in self._blocks():
            block = bytes(self.image[offset : offset + self.unit])
            values = self.layout._unpack(block)
            first = number * (self.unit * 8 // self.layout.refcount_bits)
            counts.update({first + n: value for n, value in enumerate(values) if value})
        return counts

    def metadata(self) -> dict[str, tuple[int, int]]:
        """Where the tables are that are in force: (offset, bytes) by what they are."""
        layout, unit = self.layout, self.unit
        found = {
            "header": (0, unit),
            "L1": (layout.l1_offset, self.nb_tables * 8),
            "refcount table": (layout.table_offset, layout.table_clusters * unit),
        }
        for number, offset in self._blocks():
            found[f"refcount block {number}"] = (offset, unit)
        for number in range(self.nb_tables):
            if layout.l1[number] & OFFSET:
                found[f"L2 {number}"] = (layout.l1[number] & OFFSET, unit)
        return found


def trusted(naive: Naive) -> tuple[bool, int]:
    """Whether each host cluster is counted at least as often as it is used, and used once unless
    for compressed data only; and how many are counted more often than used."""
    unit = naive.unit
    uses: Counter[int] = Counter()
    wholes: Counter[int] = Counter()
    for offset, nb_bytes in naive.metadata().values():
        if offset % unit:
            return False, 0
        wholes.update(range(offset // unit, (offset + nb_bytes - 1) // unit + 1))
    for number in range(naive.nb_tables):
        if not naive.layout.l1[number] & OFFSET:
            continue
        table = naive.table(number)
        assert table is not None
        for index, entry in enumerate(table):
            if not entry or naive.layout.has_data_file:
                continue
            checked = naive.entry(number * len(table) + index)
            if checked is None:
                return False, 0
            if entry & COMPRESSED:
                offset, nb_bytes = naive.layout.compressed(entry)
                uses.update(range(offset // unit, (offset + nb_bytes - 1) // unit + 1))
            elif entry & OFFSET:
                wholes[(entry & OFFSET) // unit] += 1
    if any(count > 1 or uses[cluster] for cluster, count in wholes.items()):
        return False, 0
    uses.update(wholes)
    counted = naive.refcounts()
    if any(counted[cluster] < count for cluster, count in uses.items()):
        return False, 0
    return True, sum(1 for cluster, count in counted.items() if count > uses[cluster])

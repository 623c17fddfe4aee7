"""The programs: an image, what has been done to it before, and the requests during which its files
fail. Small clusters and small files, so that each table, refcount block and boundary is met by few
requests; together they make every kind of operation that the node sends to its files.
"""

from __future__ import annotations

import functools
import pathlib
import struct
import tempfile
import zlib
from typing import NamedTuple

from nbdserve.formats.qcow2.node import CacheSizes
from qcow2_model import COMPRESSED, COPIED, OFFSET, Layout, Request, new_image, pattern

__all__ = ["PROGRAMS", "Program"]

CLUSTER = 512
TABLE = CLUSTER // 8 * CLUSTER  # guest bytes of an L2 table; host bytes of a block of 64 bit
K = 1024
NO_CACHE = CacheSizes(0, 0)


class Program(NamedTuple):
    """`raw`: no qcow2 image but the file itself. `before`: requests that succeed, and the image is
    closed and opened again. `backing`: bytes of a backing file. `features`: of an external data
    file (qcow2_model.new_image)."""

    name: str
    requests: tuple[Request, ...]
    before: tuple[Request, ...] = ()
    size: int = 4 * TABLE
    version: int = 3
    refcount_bits: int = 16
    backing: int = 0
    features: tuple[int, int] = (0, 0)
    caches: CacheSizes | None = None
    compressed: bool = False
    raw: bool = False

    @property
    def has_data_file(self) -> bool:
        return bool(self.features[0] & 4)

    @property
    def old(self) -> bytes:
        """What the backing file holds."""
        return pattern(7, self.backing)


def write(offset: int, length: int, tag: int, *, fua: bool = False) -> Request:
    return Request("write", offset, length, tag, flag=fua)


def read(offset: int, length: int) -> Request:
    return Request("read", offset, length)


def zero(offset: int, length: int, *, unmap: bool) -> Request:
    return Request("zero", offset, length, quick=False, flag=unmap)


def discard(offset: int, length: int) -> Request:
    return Request("discard", offset, length)


FLUSH = Request("flush")

FILLED = (write(0, 24 * CLUSTER, 1), write(TABLE, 5 * CLUSTER, 2))

PLAIN = (
    write(100, 300, 10),
    read(0, 2 * CLUSTER),
    write(4 * CLUSTER, 3 * CLUSTER, 11),
    FLUSH,
    write(TABLE + 7, 700, 12),
    Request("status", 0, 2 * TABLE),
    read(TABLE, 4 * CLUSTER),
    FLUSH,
)

ALLOCATING = (
    write(0, CLUSTER, 10),
    write(3 * CLUSTER + 100, 200, 11),
    write(TABLE - CLUSTER, 3 * CLUSTER, 12),
    FLUSH,
    read(TABLE - CLUSTER, 2 * CLUSTER),
    write(2 * TABLE + 50, 2 * CLUSTER, 13),
    write(3 * CLUSTER, CLUSTER, 14),
    FLUSH,
    write(3 * TABLE + 9, 10, 15),
)

OVER_OLD = (
    write(100, 300, 10),
    write(5 * CLUSTER + 1, 3 * CLUSTER, 11),
    read(4 * CLUSTER, 5 * CLUSTER),
    FLUSH,
    write(10 * CLUSTER, CLUSTER, 12),
    zero(12 * CLUSTER + 100, 2 * CLUSTER, unmap=True),
    write(13 * CLUSTER + 30, 40, 13),
    FLUSH,
    read(0, 20 * CLUSTER),
)

ZEROES = (
    zero(0, 3 * CLUSTER, unmap=True),
    zero(4 * CLUSTER + 10, 2 * CLUSTER, unmap=False),
    zero(8 * CLUSTER, 4 * CLUSTER, unmap=False),
    FLUSH,
    write(9 * CLUSTER + 5, 100, 10),
    write(CLUSTER, CLUSTER, 11),
    zero(TABLE - CLUSTER, 3 * CLUSTER, unmap=True),
    zero(3 * TABLE, CLUSTER, unmap=True),
    FLUSH,
    read(0, 16 * CLUSTER),
)

DISCARDS = (
    discard(0, 6 * CLUSTER),
    write(2 * CLUSTER, CLUSTER, 10),
    FLUSH,
    write(2 * TABLE, 4 * CLUSTER, 11),
    discard(8 * CLUSTER, 3 * CLUSTER + 9),
    read(0, 12 * CLUSTER),
    FLUSH,
    write(3 * TABLE + 100, 3 * CLUSTER, 12),
    discard(TABLE, 2 * CLUSTER),
    FLUSH,
)

FUA = (
    write(0, CLUSTER, 10, fua=True),
    write(100, 100, 11, fua=True),
    write(CLUSTER + 9, 2 * CLUSTER, 12),
    write(200, 20, 13, fua=True),
    write(2 * TABLE, 2 * CLUSTER, 14, fua=True),
    zero(2 * TABLE, CLUSTER, unmap=True),
    write(TABLE, 700, 15, fua=True),
    read(0, 3 * CLUSTER),
    FLUSH,
)

SCATTERED = tuple(
    request
    for number in range(6)
    for request in (
        write(number % 4 * TABLE + number * 3 * CLUSTER + 5, 600, 20 + number),
        read((number + 1) % 4 * TABLE, 2 * CLUSTER),
        *((FLUSH,) if number == 3 else ()),
    )
)

GROWTH = (
    write(0, 40 * CLUSTER, 10),
    write(TABLE, 40 * CLUSTER, 11),
    FLUSH,
    write(2 * TABLE, 40 * CLUSTER, 12),
    discard(TABLE, 20 * CLUSTER),
    write(3 * TABLE, TABLE, 13),
    FLUSH,
)

PROGRAMS = (
    Program("writes in place", PLAIN, FILLED),
    Program("allocating", ALLOCATING),
    Program("version 2", (*ALLOCATING, *ZEROES), FILLED, version=2),
    Program("over a backing file", OVER_OLD, backing=12 * CLUSTER + 100),
    Program("over compressed clusters", OVER_OLD, compressed=True, refcount_bits=64),
    Program("write-zeroes", ZEROES, FILLED),
    Program("discards", DISCARDS, FILLED),
    Program("FUA", FUA, FILLED),
    Program("refcount blocks", GROWTH, refcount_bits=64),
    Program(
        "refcount table",
        (write(55 * TABLE, TABLE, 10), write(58 * TABLE, 2 * TABLE, 11), FLUSH, *PLAIN),
        (*FILLED, write(2 * TABLE, 53 * TABLE, 3)),
        size=64 * TABLE,
        refcount_bits=64,
    ),
    Program("no cache", SCATTERED, FILLED, refcount_bits=64, caches=NO_CACHE),
    Program("no cache, over a backing file", OVER_OLD, backing=16 * CLUSTER, caches=NO_CACHE),
    Program("data file", (*ALLOCATING, *ZEROES), FILLED, features=(4, 0)),
    Program("raw data file", (*PLAIN, *DISCARDS), FILLED, features=(4, 2)),
    Program("raw", (*PLAIN, *ZEROES, *FUA), FILLED, raw=True),
)


@functools.cache
def empty(program: Program) -> bytes:
    """The image as it is made."""
    if program.raw:
        return bytes(program.size)
    with tempfile.TemporaryDirectory() as folder:
        image = new_image(
            pathlib.Path(folder),
            program.size,
            version=program.version,
            cluster_size=CLUSTER,
            refcount_bits=program.refcount_bits,
            features=program.features,
        )
    return image


def with_compressed(image: bytes, nb_clusters: int) -> bytes:
    """The image, whose first clusters are allocated and become compressed where they are."""
    content = bytearray(image)
    layout = Layout(image)
    l2 = layout.l1[0] & OFFSET
    for number, entry in enumerate(layout.words(l2, nb_clusters)):
        host = entry & OFFSET
        stream = zlib.compressobj(9, zlib.DEFLATED, -12)
        data = stream.compress(content_of(number)) + stream.flush()
        content[host : host + CLUSTER] = data.ljust(CLUSTER, b"\0")
        # One sector, the rest of this one: the count of further sectors is 0.
        struct.pack_into(">Q", content, l2 + 8 * number, host | COMPRESSED)
    assert not layout.words(l2, 1)[0] & OFFSET & (CLUSTER - 1)
    assert layout.words(l2, 1)[0] & COPIED
    return bytes(content)


def content_of(number: int) -> bytes:
    """What a compressed guest cluster holds."""
    return pattern(500 + number, 100).ljust(CLUSTER, b"\x11")

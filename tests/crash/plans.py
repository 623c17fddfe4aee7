"""Programs of requests, and the images that they run on.

A plan is drawn from a seed and nothing else, so a number names it. Few clusters and few lengths are
used, a few in each L2 table, so that requests meet each other and small caches must evict.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import random
import struct
from typing import TYPE_CHECKING, Literal

import trio

import peers
from crash.scratch import scratch
from nbdserve.config import CACHE_MODES
from nbdserve.formats.qcow2.node import CacheSizes
from qcow2_model import MemoryFile, Request, new_image, open_memory, pattern, perform

if TYPE_CHECKING:
    from nbdserve.config import CacheMode

__all__ = [
    "Image",
    "Plan",
    "draw_plan",
    "fua_plan",
    "growth_plan",
    "memory_files",
    "race_plan",
    "reuse_plan",
    "zero_overwrite_plan",
]

Start = Literal["empty", "mixed", "compressed", "full"]


@dataclasses.dataclass(frozen=True)
class Image:
    """An image to start with.

    `start`: empty; mixed, with clusters of every kind but compressed ones; compressed; full: empty
    but with all host clusters in use that the refcount table reaches, save a few, so that it must
    move soon (64-bit refcounts and clusters of 512 bytes only). `backing`: bytes of the backing
    file, 0: none. `tables`: how many each cache holds, None: all.
    """

    size: int
    version: int = 3
    cluster_size: int = 512
    refcount_bits: int = 16
    backing: int = 0
    tables: int | None = None
    start: Start = "empty"
    data_file: Literal["", "external", "raw"] = ""

    @property
    def cache_sizes(self) -> CacheSizes | None:
        if self.tables is None:
            return None
        return CacheSizes(*(2 * [self.tables * (self.cluster_size + 512)]))

    @property
    def old(self) -> bytes:
        """What the backing file holds."""
        return pattern(7, self.backing)

    @property
    def discards(self) -> bool:
        """Whether a discarded cluster reads as zeroes."""
        return self.version == 3 or not self.backing

    @property
    def leaks(self) -> bool:
        """Whether there are leaks to begin with."""
        return self.start == "full"

    def files(self) -> list[bytes]:
        """The image, and its data file if it has one. A data file has stale bytes to start with,
        but for a raw one, which holds the disk, which is empty."""
        return _files(self)


@functools.lru_cache(64)
def _files(image: Image) -> list[bytes]:
    content = _compressed(image) if image.start == "compressed" else _empty(image)
    if image.start == "full":
        content = _full(content)
    files = [content]
    if image.data_file:
        files.append((b"\0" if image.data_file == "raw" else b"\x5a") * image.size)
    if image.start == "mixed":
        files = trio.run(_mixed, image, files)
    return files


def _empty(image: Image) -> bytes:
    features = {"": (0, 0), "external": (4, 0), "raw": (4, 2)}[image.data_file]
    with scratch() as folder:
        return new_image(
            folder,
            image.size,
            version=image.version,
            cluster_size=image.cluster_size,
            refcount_bits=image.refcount_bits,
            features=features,
        )


def _compressed(image: Image) -> bytes:
    size = image.cluster_size
    clusters = range(0, image.size, size)
    with scratch() as folder:
        raw, path = pathlib.Path(folder, "raw"), pathlib.Path(folder, "image")
        content = b"".join(pattern(at, size // 5).ljust(size, b"\x11") for at in clusters)
        raw.write_bytes(content[: image.size])
        options = f"cluster_size={size},refcount_bits={image.refcount_bits}"
        peers.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
        return path.read_bytes()


def _full(content: bytes) -> bytes:
    """The refcount table of one cluster reaches 64 blocks of 64 clusters; all of these but the last
    ten get a refcount, owner or not, each block lying in its own first cluster."""
    full = bytearray(content).ljust((64 * 64 - 10) * 512, b"\0")
    (table,) = struct.unpack_from(">Q", content, 48)
    first = struct.unpack_from(">Q", content, table)[0]
    for number in range(64):
        block = number * 64 * 512 if number else first
        struct.pack_into(">Q", full, table + 8 * number, block)
        nb_used = 64 if number < 63 else 54
        struct.pack_into(f">{nb_used}Q", full, block, *[1] * nb_used)
    return bytes(full)


async def _mixed(image: Image, files: list[bytes]) -> list[bytes]:
    """By turns, in each L2 table: data, zero but allocated, zero, nothing, data."""
    file, *beside = memory_files(files)
    size = image.cluster_size
    async with open_memory(
        file, data_file=beside[0] if beside else None, backing=None
    ) as (backend, _):
        for number in range(image.size // size):
            at = number * size
            kind = number % 5
            if kind in (0, 1, 4):
                await perform(backend, Request("write", at, size, number + 500))
            if kind in (1, 2):
                await perform(backend, Request("zero", at, size, flag=kind == 2))
    return [bytes(each.content) for each in (file, *beside)]


def memory_files(files: list[bytes], **options: object) -> list[MemoryFile]:
    """Files in memory that share one log."""
    first = MemoryFile(files[0], seed=1, **options)
    return [first, *(MemoryFile(each, seed=2, beside=first, **options) for each in files[1:])]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Batches of requests that are in flight together. `patience`, `stragglers`: of the files in
    memory."""

    name: str
    image: Image
    batches: tuple[tuple[Request, ...], ...]
    mode: CacheMode = CACHE_MODES["writeback"]
    patience: int = 0
    stragglers: float = 0.0


def draw_plan(name: str, *, mode: str | None = None) -> Plan:
    """The plan of that name, which is its seed. `mode`: the cache mode, else drawn too."""
    chooser = random.Random(name)
    special = (fua_plan, race_plan, reuse_plan, growth_plan, zero_overwrite_plan)
    draw = chooser.choice((_mixed_plan,) * 8 + special)
    plan = draw(name, chooser)
    return dataclasses.replace(plan, mode=CACHE_MODES[mode or chooser.choice(list(CACHE_MODES))])


def _mixed_plan(name: str, chooser: random.Random) -> Plan:
    image = _draw_image(chooser)
    batches = tuple(_draw_batch(chooser, image) for _ in range(chooser.randint(3, 14)))
    return Plan(
        name, image, batches, patience=chooser.choice((0, 1, 3)),
        stragglers=chooser.choice((0.0, 0.1)),
    )


def fua_plan(name: str, chooser: random.Random | None = None) -> Plan:
    """One request at a time; some are durable writes, where others wrote not long before. There are
    few flushes, and few clusters of many L2 tables, so that tables are written back before one."""
    chooser = chooser or random.Random(name)
    tables = chooser.choice((1, 2, None))
    nb_tables = 5 if tables else 2
    image = Image(
        nb_tables * 64 * 512, tables=tables, data_file=chooser.choice(("", "", "external", "raw"))
    )
    batches = []
    recent = [0]
    for number in range(50):
        kind = chooser.choice(("write",) * 12 + ("discard", "discard", "flush"))
        offset = (chooser.randrange(nb_tables) * 64 + chooser.randrange(6)) * 512
        durable = chooser.random() < 0.3
        if kind == "write" and durable:
            offset = chooser.choice(recent[-6:])
        recent.append(offset)
        request = Request(
            kind, offset, chooser.choice((60, 512)), number,
            quick=chooser.random() < 0.7, flag=durable,
        )
        batches.append((Request("flush") if kind == "flush" else request,))
    return Plan(name, image, tuple(batches), patience=chooser.choice((0, 3)))


def race_plan(name: str, chooser: random.Random | None = None) -> Plan:
    """Slow writes in place whose cluster is discarded, freed and handed out again meanwhile."""
    chooser = chooser or random.Random(name)
    image = Image(24 * 512, tables=chooser.choice((1, None)))
    batches: list[tuple[Request, ...]] = []
    for number in range(10):
        first, other = chooser.sample(range(24), 2)
        batches += [
            (Request("write", first * 512, 512, number),),
            (
                Request("write", first * 512, 512, number + 100, quick=False),
                Request("discard", first * 512, 512, delay=2),
                Request("flush", delay=8),
                Request("discard", other * 512, 512, delay=10),
                Request("write", other * 512, 512, number + 200, delay=chooser.randint(25, 50)),
            ),
            (Request("flush"),),
        ]
    return Plan(name, image, tuple(batches), patience=3, stragglers=0.3)


def reuse_plan(name: str, chooser: random.Random | None = None) -> Plan:
    """Clusters are given up and others taken, with few flushes: what is taken may not be what was
    given up since the last one."""
    chooser = chooser or random.Random(name)
    image = Image(40 * 512, start="mixed", tables=chooser.choice((1, None)))
    batches: list[tuple[Request, ...]] = []
    for number in range(20):
        given, taken = chooser.sample(range(40), 2)
        batches += [
            (Request(chooser.choice(("discard", "zero")), given * 512, 512, flag=True),),
            (Request("write", taken * 512, 512, number, quick=chooser.random() < 0.5),),
        ]
        if chooser.random() < 0.2:
            batches.append((Request("flush"),))
    return Plan(name, image, tuple(batches), patience=chooser.choice((0, 3)))


def zero_overwrite_plan(name: str, chooser: random.Random | None = None) -> Plan:
    """Writes over data, zero clusters with a host cluster and without, and clusters that are not
    there, all of which had been flushed: the case in which qemu-nbd 7.2 loses data."""
    chooser = chooser or random.Random(name)
    image = Image(30 * 512, start="mixed", data_file=chooser.choice(("", "", "external")))
    batches: list[tuple[Request, ...]] = []
    for number in range(6):
        offset = chooser.randrange(20) * 512 + chooser.choice((0, 0, 100, 256))
        length = chooser.choice((2 * 512, 5 * 512, 8 * 512 + 60))
        batches += [
            (Request("write", offset, length, number, quick=chooser.random() < 0.5,
                     flag=chooser.random() < 0.5),),
            (Request("zero", chooser.randrange(28) * 512, 512, flag=False),),
            (Request("flush"),),
        ]
    return Plan(name, image, tuple(batches), patience=chooser.choice((0, 3)))


def growth_plan(name: str, chooser: random.Random | None = None) -> Plan:
    """Long first writes where a refcount block describes 64 clusters: new blocks, and a refcount
    table that moves."""
    chooser = chooser or random.Random(name)
    image = Image(
        200 * 512, refcount_bits=64, start=chooser.choice(("full", "empty")),
        tables=chooser.choice((1, None)),
    )
    batches: list[tuple[Request, ...]] = []
    for number in range(6):
        writes = [
            Request("write", chooser.randrange(180) * 512, 20 * 512, 10 * number + each,
                    quick=chooser.random() < 0.5)
            for each in range(chooser.randint(1, 3))
        ]
        batches += [tuple(writes), (Request("flush"),)]
    return Plan(name, image, tuple(batches), patience=chooser.choice((0, 3)))


def _draw_image(chooser: random.Random) -> Image:
    cluster_size = chooser.choice((512,) * 8 + (4096, 4096, 65536))
    unit = min(cluster_size, 4096)
    size = chooser.randint(1, 200 if cluster_size == 512 else 24) * unit
    if cluster_size == 65536:
        size *= 8
    backing = chooser.choice((0, 0, 20 * 1024, size))
    tables = chooser.choice((1, 2, None))
    common = {"cluster_size": cluster_size, "tables": tables}
    match chooser.choice(("plain",) * 4 + ("old", "compressed", "full", "external", "raw")):
        case "old":
            return Image(size, version=2, backing=backing, **common)
        case "compressed":
            return Image(min(size, 40 * cluster_size), start="compressed",
                         refcount_bits=chooser.choice((8, 64)), **common)
        case "full":
            return Image(min(size, 64 * 1024), refcount_bits=64, start="full", tables=tables)
        case "external":
            return Image(size, data_file="external", backing=backing, **common,
                         start="empty" if backing else chooser.choice(("empty", "mixed")))
        case "raw":
            return Image(size, data_file="raw", **common)
    return Image(size, refcount_bits=chooser.choice((16, 64, 64, 1)), backing=backing, **common,
                 start="empty" if backing else chooser.choice(("empty", "mixed")))


def _draw_batch(chooser: random.Random, image: Image) -> tuple[Request, ...]:
    requests = [_draw_request(chooser, image) for _ in range(chooser.choice((1, 1, 1, 2, 4)))]
    if chooser.random() < 0.2:  # a write whose cluster may be somebody else's when it is done
        first = requests[0]
        if first.kind == "write":
            size = image.cluster_size
            start = first.offset // size * size
            length = min(-(-first.length // size) * size + size, image.size - start)
            requests += [
                Request("discard", start, length, delay=1),
                Request("flush", delay=3),
                Request("flush", delay=8),
                dataclasses.replace(_draw_request(chooser, image), delay=20),
            ]
    return tuple(requests)


KINDS = ("write",) * 6 + ("discard",) * 2 + ("zero",) * 2 + ("flush",) * 2


def _draw_request(chooser: random.Random, image: Image) -> Request:
    kind = chooser.choice(KINDS)
    if kind == "flush":
        return Request("flush", delay=chooser.choice((0, 0, 2)))
    size = image.cluster_size
    per_table = size // 8
    table = chooser.choice((0, 0, 1, 2, 3)) * per_table
    number = min(table + chooser.randrange(8), (image.size - 1) // size)
    offset = number * size + min(chooser.choice((0, 0, 0, 100)), (image.size - 1) % size)
    long = (40 if size == 512 else 6) * size
    lengths = (size, 60, size // 2, 3 * size, 2 * size + 80, 5 * size, long)
    return Request(
        kind,
        offset,
        min(chooser.choice(lengths), image.size - offset),
        chooser.randrange(100),
        quick=chooser.random() < 0.5,
        flag=chooser.random() < 0.4,
        delay=chooser.choice((0, 0, 1, 4)),
    )

"""The power is cut at any moment: the image leaks at most, and what was flushed is there.

Random programs run on a file in memory that logs every write and flush. The power is then cut after
any of the log's entries. What was logged before the last completed flush began is on the disk; of
everything later each sector is or is not, independently, so writes are torn and reordered as a
page cache may do it. Of each such image is asked:

* no cluster has fewer references counted than it has (qcow2_model.audit; `qemu-img check` is asked
  about some of them, so that our own eyes are checked too);
* each byte of the disk is the flushed one, or one that a request wrote after that flush began;
* each byte of a write with FUA that was acknowledged is there, or one that a later request wrote;
* the image can be opened and written to again, and is then sound.

With an external data file there are two files; each loses by itself what it was not flushed of. Of
a raw one the same is asked: that the flushed bytes are there without the image.
"""

from __future__ import annotations

import os
import pathlib
import random
import tempfile
from typing import TYPE_CHECKING, NamedTuple

import pytest
import trio
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

import peers
from nbdserve.block.backend import BlockBackend
from nbdserve.formats.qcow2.durability import Durability
from nbdserve.formats.qcow2.node import CacheSizes
from nbdserve.formats.qcow2.tables import Table
from nbdserve.formats.raw import RawNode
from qcow2_model import (
    COPIED,
    OFFSET,
    BesideEntry,
    Disk,
    Effect,
    Entry,
    Layout,
    MemoryFile,
    Request,
    assert_sound,
    audit,
    differences,
    guest_bytes,
    new_image,
    open_memory,
    pattern,
    run_batch,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

SOAK = os.environ.get("NBDSERVE_SOAK") == "1"
FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
CLUSTER = 512
PER_TABLE = CLUSTER // 8 * CLUSTER  # guest bytes of an L2 table
CUTS = 60  # of each program
TABLE_FIELD = 48  # where the header says where the refcount table is


class Kind(NamedTuple):
    """An image of clusters of 512 bytes."""

    version: int
    refcount_bits: int
    size: int
    backing: int  # bytes of the backing file; 0: none
    tables: int | None  # in each cache
    compressed: bool = False
    data_file: str = ""  # "", "external", "raw"

    @property
    def features(self) -> tuple[int, int]:
        """Incompatible, autoclear."""
        return {"": (0, 0), "external": (4, 0), "raw": (4, 2)}[self.data_file]

    @property
    def cache_sizes(self) -> CacheSizes | None:
        return CacheSizes(*(2 * [self.tables * 1024])) if self.tables else None

    @property
    def old(self) -> bytes:
        """What the backing file holds."""
        return pattern(7, self.backing)

    def make(self) -> bytes:
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
            if not self.compressed:
                return new_image(
                    folder,
                    self.size,
                    version=self.version,
                    cluster_size=CLUSTER,
                    refcount_bits=self.refcount_bits,
                    features=self.features,
                )
            raw, path = pathlib.Path(folder, "raw"), pathlib.Path(folder, "image")
            raw.write_bytes(self.content)
            options = f"cluster_size={CLUSTER},refcount_bits={self.refcount_bits}"
            peers.qemu_img(
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path
            )
            return path.read_bytes()

    @property
    def stale(self) -> bytes:
        """What the data file holds at first: a raw one has the disk, which is empty."""
        return bytes(self.size) if self.data_file == "raw" else b"\x5a" * self.size

    @property
    def content(self) -> bytes:
        """What the new image reads as."""
        if self.compressed:
            clusters = range(0, self.size, CLUSTER)
            return b"".join(pattern(at, 100).ljust(CLUSTER, b"\x11") for at in clusters)
        return self.old[: self.size].ljust(self.size, b"\0")


kinds = st.builds(
    Kind,
    st.sampled_from((3, 3, 2)),
    st.sampled_from((16, 64, 1)),
    st.integers(1, 150).map(lambda n: n * 512),
    st.sampled_from((0, 0, 20 * 1024)),
    st.sampled_from((1, 3, None)),
    st.just(False),
    st.just(""),
) | st.builds(
    Kind, st.just(3), st.sampled_from((8, 64)), st.just(30 * 1024), st.just(0), st.just(2),
    st.just(True), st.just(""),
) | st.builds(
    Kind, st.just(3), st.sampled_from((16, 64)), st.integers(1, 150).map(lambda n: n * 512),
    st.sampled_from((0, 20 * 1024)), st.sampled_from((1, 3, None)), st.just(False),
    st.sampled_from(("external", "raw")),
).map(lambda kind: kind._replace(backing=0) if kind.data_file == "raw" else kind)
kinds = kinds.map(lambda kind: kind._replace(refcount_bits=16) if kind.version == 2 else kind)


@st.composite
def requests(draw, size: int):
    """Few clusters and few lengths, so that they meet."""
    kind = draw(st.sampled_from(("write", "write", "write", "discard", "zero", "flush")))
    if kind == "flush":
        return Request("flush")
    number = draw(st.integers(0, min(size // CLUSTER - 1, 12)))
    offset = number * CLUSTER + draw(st.sampled_from((0, 0, 0, 100)))
    lengths = (CLUSTER, 60, 3 * CLUSTER, 2 * CLUSTER + 80, 40 * CLUSTER)
    length = min(draw(st.sampled_from(lengths)), size - offset)
    return Request(
        kind,
        offset,
        length,
        draw(st.integers(0, 99)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from((0, 0, 1, 4))),
    )


@st.composite
def programs(draw, size: int):
    batch = st.sampled_from((1, 1, 2, 4)).flatmap(
        lambda n: st.lists(requests(size), min_size=n, max_size=n)
    )
    return draw(st.lists(batch, min_size=3, max_size=16))


class History(NamedTuple):
    """What happened. milestones: (length of the log, what a flush that had returned then made
    durable, from which batch on requests were not covered); effects: (length of the log before
    the batch, what its requests write). durable: as MemoryFile's. fua: (length of the log when a
    write with FUA had been acknowledged, its batch, what it wrote). beside: what a data file held
    at first."""

    initial: bytes
    log: list[Entry]
    milestones: list[tuple[int, bytes, int]]
    effects: list[tuple[int, list[Effect]]]
    durable: list[tuple[int, int]]
    fua: list[tuple[int, int, Effect]]
    beside: bytes = b""


async def record(
    kind: Kind, initial: bytes, program, patience: int, disk: Disk | None = None
) -> History:
    file = MemoryFile(initial, patience=patience, seed=1)
    backing = RawNode(MemoryFile(kind.old)) if kind.backing else None
    stale = kind.stale
    data_file = None
    if kind.data_file:
        data_file = MemoryFile(stale, patience=patience, seed=2, beside=file)
    sizes = kind.cache_sizes
    if disk is None:
        disk = Disk(kind.content, CLUSTER, discards=kind.version == 3 or not kind.backing)
    milestones = [(0, bytes(disk.content), 0)]
    effects = []
    fua = []
    async with open_memory(
        file, backing=backing, data_file=data_file, cache_sizes=sizes
    ) as (backend, _):
        for number, batch in enumerate(program):
            before = bytes(disk.content)
            found = [effect for request in batch if (effect := disk.effect(request)) is not None]
            effects.append((len(file.log), found))
            await run_batch(backend, disk, batch)
            if any(request.kind == "flush" for request in batch):
                milestones.append((len(file.log), before, number))
            elif len(batch) == 1 and batch[0].kind == "write" and batch[0].flag:
                fua.append((len(file.log), number, found[0]))
    assert_sound(file.content)
    if kind.data_file == "raw":
        assert data_file.content == disk.content
    return History(initial, file.log, milestones, effects, file.durable, fua, stale)


def cut(history: History, length: int, chooser: random.Random, chance: float) -> bytearray:
    """The file after the power was cut `length` entries into the log."""
    return cut_file(history, length, chooser, chance, Entry)


def cut_both(
    history: History, length: int, chooser: random.Random, chance: float
) -> tuple[bytearray, bytearray]:
    """The file and the data file."""
    image, beside = (
        cut_file(history, length, chooser, chance, which) for which in (Entry, BesideEntry)
    )
    return image, beside


def cut_file(
    history: History, length: int, chooser: random.Random, chance: float, which: type[Entry]
) -> bytearray:
    log = history.log[:length]
    flushes = (entry for entry in log if entry.data is None and type(entry) is which)
    durable = max((entry.offset for entry in flushes), default=0)
    durable_writes = {number for end, number in history.durable if end <= length}
    image = bytearray(history.initial if which is Entry else history.beside)
    for number, entry in enumerate(log):
        offset, data = entry
        if data is None or type(entry) is not which:
            continue
        at = 0
        while at < len(data):
            end = min(len(data), at + 512 - (offset + at) % 512)
            if number < durable or number in durable_writes or chooser.random() < chance:
                if offset + end > len(image):
                    image.extend(bytes(offset + end - len(image)))
                image[offset + at : offset + end] = data[at:end]
            at = end
    return image


def assert_flushed_is_there(history: History, length: int, disk: bytes) -> None:
    _, flushed, first = [entry for entry in history.milestones if entry[0] <= length][-1]
    later = [
        effect
        for start, effects in history.effects[first:]
        if start < length
        for effect in effects
    ]
    assert len(disk) == len(flushed)
    for end, number, effect in history.fua:
        if end <= length:
            assert_written_is_there(history, length, disk, number, effect)
    for start in range(0, len(disk), 64):
        piece = slice(start, start + 64)
        if disk[piece] == flushed[piece]:
            continue
        for at in range(start, min(start + 64, len(disk))):
            allowed = {flushed[at]} | {
                effect.data[at - effect.offset]
                for effect in later
                if effect.offset <= at < effect.offset + len(effect.data)
            }
            assert disk[at] in allowed, (
                f"cut after {length}: byte {at:#x} is {disk[at]:#x}, not one of {sorted(allowed)}"
            )


def assert_written_is_there(
    history: History, length: int, disk: bytes, number: int, written: Effect
) -> None:
    """A write with FUA was acknowledged before the cut: its bytes are there, or later ones."""
    later = [
        effect
        for start, effects in history.effects[number + 1 :]
        if start < length
        for effect in effects
    ]
    there = disk[written.offset : written.offset + len(written.data)]
    for at in differences(there, written.data):
        position = written.offset + at
        allowed = {
            effect.data[position - effect.offset]
            for effect in later
            if effect.offset <= position < effect.offset + len(effect.data)
        }
        assert there[at] in allowed, (
            f"cut after {length}: byte {position:#x}, written with FUA, is {there[at]:#x}"
        )


def qemu_says_sound(image: bytes, data_file: bytes | None = None) -> bool:
    """qemu-img check: nothing wrong but leaks."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        path = pathlib.Path(folder, "image")
        path.write_bytes(image)
        options = f"driver=qcow2,file.filename={path}"
        if data_file is not None:
            beside = pathlib.Path(folder, "data")
            beside.write_bytes(data_file)
            options += f",data-file.filename={beside}"
        done = peers.run("qemu-img", "check", "--image-opts", options, check=False)
        assert done.returncode in (0, 2, 3), done.stderr
        return done.returncode != 2


async def write_again(kind: Kind, image: bytes, beside: bytes | None = None) -> None:
    """What the crash left can be worked with, and then nothing is wrong but the old leaks."""
    file = MemoryFile(image)
    backing = RawNode(MemoryFile(kind.old)) if kind.backing else None
    data_file = None if beside is None else MemoryFile(beside)
    disk = Disk(guest_bytes(image, kind.old, beside), CLUSTER, discards=False)
    writes = [
        Request("write", at, min(700, kind.size - at), at) for at in range(0, kind.size, 2000)
    ]
    async with open_memory(
        file, backing=backing, data_file=data_file, cache_sizes=kind.cache_sizes
    ) as (backend, _):
        await run_batch(backend, disk, writes)
    assert_sound(file.content, leaks_allowed=True)
    beside = None if data_file is None else data_file.content
    assert guest_bytes(file.content, kind.old, beside) == disk.content


@pytest.mark.peer("qemu-img")
@settings(
    max_examples=3000 if SOAK else 35,
    deadline=None,
    derandomize=not SOAK,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    print_blob=True,
)
@given(kinds, st.data(), st.integers(0, 4))
def test_a_cut_leaks_at_most_and_loses_nothing_flushed(kind, data, patience):
    program = data.draw(programs(kind.size), label="program")
    history = trio.run(record, kind, kind.make(), program, patience)
    assert_cuts_are_harmless(kind, history, CUTS)
    event(f"{min(len(history.log) // 50 * 50, 300)} or more entries in the log")


def assert_cuts_are_harmless(
    kind: Kind, history: History, cuts: int, moments: Iterable[int] = ()
) -> None:
    """`moments`: lengths of the log at which to cut in any case."""
    chooser = random.Random(len(history.log))
    # Right before and right after a flush ended is where the order shows.
    ends = [number for number, entry in enumerate(history.log) if entry.data is None]
    some = sorted({*ends, *(end + 1 for end in ends), len(history.log)})
    some += [chooser.randint(0, len(history.log)) for _ in range(cuts)]
    for number, length in enumerate([*moments, *chooser.sample(some, min(cuts, len(some)))]):
        image, beside = cut_both(history, length, chooser, chooser.choice((0.1, 0.5, 0.9)))
        data_file = beside if kind.data_file else None
        assert_sound(image, leaks_allowed=True)
        assert_flushed_is_there(history, length, guest_bytes(image, kind.old, data_file))
        if kind.data_file == "raw":
            assert_flushed_is_there(history, length, bytes(beside))
        if number == 0:
            assert qemu_says_sound(image, data_file)
            trio.run(write_again, kind, image, data_file)


async def fill(content: bytes, length: int) -> bytes:
    file = MemoryFile(content)
    async with open_memory(file) as (backend, _):
        await backend.write(0, pattern(3, length))
    return bytes(file.content)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("tables", [2, None])
def test_cuts_while_the_refcount_table_moves(patience, tables):
    """With 64-bit refcounts and clusters of 512 bytes the first table reaches to 2 MiB."""
    size = 2100 * 1024
    kind = Kind(3, 64, size, 0, tables)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        content = new_image(folder, 2 * size, cluster_size=CLUSTER, refcount_bits=64)
    kept = 1900 * 1024
    initial = trio.run(fill, content, kept)
    table_offset = Layout(initial).table_offset
    more = [Request("write", kept + at, 9 * 1024, at) for at in range(0, 90 * 1024, 9 * 1024)]
    program = [
        more[:4],
        [Request("flush")],
        [*more[4:7], Request("flush"), Request("discard", 4096, 8192)],
        more[7:],
        [Request("flush"), Request("write", 4096, 8192, 5)],
    ]
    disk = Disk(guest_bytes(initial), CLUSTER, discards=True)
    history = trio.run(record, kind, initial, program, patience, disk)
    final = cut(history, len(history.log), random.Random(0), 1.0)
    assert Layout(final).table_offset != table_offset
    moved = [number for number, entry in enumerate(history.log) if entry.offset == TABLE_FIELD]
    assert moved
    assert_cuts_are_harmless(
        kind, history, 20, [at + after for at in moved for after in (1, 1, 1, 2, 4, 8)]
    )


def damages():
    """(name, an image that was damaged by hand in one way)."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        content = new_image(folder, 64 * 1024, cluster_size=CLUSTER)
    file = MemoryFile(content)

    async def fill() -> None:
        async with open_memory(file) as (backend, _):
            await backend.write(0, pattern(1, 4096))

    trio.run(fill)
    layout = Layout(file.content)
    l2 = layout.l1[0] & OFFSET
    first = layout.words(l2, 1)[0] & OFFSET
    block = layout.words(layout.table_offset, 1)[0]

    def put(offset: int, value: int, width: int = 8) -> bytes:
        image = bytearray(file.content)
        image[offset : offset + width] = value.to_bytes(width, "big")
        return bytes(image)

    yield "sound", bytes(file.content)
    yield "refcount of data is zero", put(block + first // CLUSTER * 2, 0, 2)
    yield "refcount of an L2 table is zero", put(block + l2 // CLUSTER * 2, 0, 2)
    yield "two owners", put(l2 + 8, first | COPIED)
    yield "data on a table", put(l2 + 8, l2 | COPIED)
    yield "unaligned data", put(l2, (first + 0x200 * 3 + 0x10) | COPIED)
    yield "not copied", put(l2, first)
    yield "data past the end", put(l2, (len(file.content) + 4096) | COPIED)
    yield "no refcount block", put(layout.table_offset, 0)
    yield "L2 table past the end", put(layout.l1_offset, (1 << 30) | COPIED)


@pytest.mark.peer("qemu-img")
def test_our_eyes_see_what_qemu_sees():
    for name, image in damages():
        assert (not audit(image).wrong) is qemu_says_sound(image), name


@pytest.mark.parametrize("torn", ["L1 entry first", "refcount last"])
def test_our_eyes_see_a_wrong_order(torn):
    """The audit and the byte check do find what they are there to find."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        content = new_image(folder, 64 * 1024, cluster_size=CLUSTER)
    kind = Kind(3, 16, 64 * 1024, 0, None)
    program = [[Request("write", 0, 4096, 1)], [Request("flush")]]
    history = trio.run(record, kind, content, program, 0)
    layout = Layout(content)
    block = layout.words(layout.table_offset, 1)[0]
    where = layout.l1_offset if torn == "L1 entry first" else block
    wanted = [entry for entry in history.log if entry.data is not None and entry.offset == where]
    others = [entry for entry in history.log if entry.data is not None and entry.offset != where]
    chosen = wanted if torn == "L1 entry first" else others
    image = cut(history._replace(log=chosen), len(chosen), random.Random(0), 1.0)
    with pytest.raises(AssertionError):
        assert_sound(image, leaks_allowed=True)


# --- FUA passed down, and bugs in that ------------------------------------------------------------


def fua_program(seed: int, nb_tables: int) -> list[list[Request]]:
    """Half of the writes are durable ones; few flushes, and few clusters of each L2 table, so that
    writes meet each other."""
    chooser = random.Random(seed)
    program = []
    for number in range(30):
        kind = chooser.choice(("write", "write", "write", "write", "write", "discard", "flush"))
        offset = chooser.randrange(nb_tables) * PER_TABLE + chooser.randrange(3) * CLUSTER
        request = Request(
            kind,
            offset,
            chooser.choice((60, CLUSTER)),
            number,
            quick=chooser.random() < 0.7,
            flag=chooser.random() < 0.5,
        )
        program.append([Request("flush") if kind == "flush" else request])
    return program


def assert_fua_is_durable(
    seed: int, tables: int | None, patience: int, data_file: str = ""
) -> int:
    """Cut after each acknowledged FUA write; how many were passed down."""
    size = 5 * PER_TABLE
    kind = Kind(3, 16, size, 0, tables, data_file=data_file)
    program = fua_program(seed, 5 if tables else 2)
    history = trio.run(record, kind, kind.make(), program, patience)
    chooser = random.Random(seed)
    for end, _, _ in history.fua:
        for chance in (0.0, 0.5):
            image, beside = cut_both(history, end, chooser, chance)
            assert_sound(image, leaks_allowed=True)
            disk = guest_bytes(image, data_file=beside if data_file else None)
            assert_flushed_is_there(history, end, disk)
    return len(history.durable)


@pytest.mark.parametrize("tables", [1, None])
@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("data_file", ["", "external", "raw"])
def test_an_acknowledged_fua_write_survives(tables, patience, data_file):
    passed_down = sum(
        assert_fua_is_durable(seed, tables, patience, data_file) for seed in range(30)
    )
    assert passed_down > 20


def ignore_fua(monkeypatch):
    write, submit = BlockBackend.write, BlockBackend.submit_write
    monkeypatch.setattr(
        BlockBackend, "write", lambda self, offset, data, fua=False: write(self, offset, data)
    )
    monkeypatch.setattr(
        BlockBackend,
        "submit_write",
        lambda self, offset, data, done, fua=False: submit(self, offset, data, done),
    )


def never_flush_for_fua(monkeypatch):
    async def nothing(self, fua):
        pass

    monkeypatch.setattr(BlockBackend, "_make_durable", nothing)


def pass_down_on_dirty_tables(monkeypatch):
    monkeypatch.setattr(Table, "is_written", lambda self, number: True)


def pass_down_on_tables_that_were_only_written(monkeypatch):
    monkeypatch.setattr(Durability, "table_written", lambda self, offset, nb_bytes: None)


PLANTED = [
    ignore_fua,
    never_flush_for_fua,
    pass_down_on_dirty_tables,
    pass_down_on_tables_that_were_only_written,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_our_eyes_see_a_fua_write_that_is_not_durable(monkeypatch, plant):
    plant(monkeypatch)

    def look() -> None:
        for seed in range(60):
            for tables in (1, None):
                assert_fua_is_durable(seed, tables, 3)

    with pytest.raises(AssertionError, match="written with FUA"):
        look()

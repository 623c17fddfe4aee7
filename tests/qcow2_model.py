"""What the tests of the qcow2 node hold it against: a model of the disk, files that can fail or
lose power, and a reader of the format that shares no line with the package.

* `MemoryFile` is a leaf in memory that takes its time (so tasks interleave, the same way for the
  same seed), logs what is written and flushed in order, and can be told to fail.
* `Disk` is a plain bytearray with what NBD promises: of requests in flight together, each byte is
  that of one of them; everything else is exact.
* `audit` counts every reference to every host cluster and compares with the refcounts;
  `guest_bytes` reads the virtual disk. Both from bytes alone, so that thousands of crash images
  can be looked at in a second; the tests hold them against qemu-img.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import struct
import zlib
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import trio

from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.node import Extent, Leaf, Node
from nbdserve.engines.threads import ThreadsEngine
from nbdserve.formats.qcow2.create import create_image
from nbdserve.formats.qcow2.node import CacheSizes, Qcow2Node
from nbdserve.formats.qcow2.open import open_qcow2, read_header
from nbdserve.powercut.writelog import CHANGES, Kind, WriteLog, change

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from nbdserve.block.redo import RedoLog

Buffer = bytes | bytearray | memoryview

OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

HOLD_SECONDS = 5

TINY = CacheSizes(l2=2048, refcount=2048)


# --- a file in memory ----------------------------------------------------------------------------


class Entry(NamedTuple):
    """What a MemoryFile's log says in short: a write, or zeroes, when it took effect, or a flush
    (no data) when it had returned. file: 1 for a data file beside. fua: a durable write."""

    offset: int
    data: bytes | None
    file: int = 0
    fua: bool = False


class MemoryFile(Leaf):
    """A regular file in memory.

    `patience`: requests wait up to that many times before and after they take effect, and the
    synchronous ways refuse now and then; 0: everything happens at once. `direct`: they always
    refuse. `stragglers`: of the other writes this part takes long. `fail`, if set, is called with
    the kind and offset of each request and may raise what the request then fails with; nothing of
    it has happened then. `writes` is the log of what was done; a file `beside` another shares its.
    `holds` keeps requests of a kind until its event is set. `zeroes_fast`: zeroes need not be
    written as data.
    """

    is_device = False
    fua = True

    def __init__(
        self,
        content: bytes,
        *,
        patience: int = 0,
        seed: int = 0,
        beside: MemoryFile | None = None,
        no_flush: bool = False,
        direct: bool = False,
        stragglers: float = 0.0,
    ) -> None:
        super().__init__(
            "memory", -(-len(content) // 512) * 512, read_only=False, no_flush=no_flush
        )
        self.content = bytearray(content)
        self.writes: WriteLog = WriteLog() if beside is None else beside.writes
        self._number = self.writes.add_file(bytes(content))
        self.zeroes_fast = True
        self.fail: Callable[[str, int], None] | None = None
        self.holds: dict[str, trio.Event] = {}
        self._patience = patience
        self._direct = direct
        self._stragglers = stragglers
        self._random = random.Random(seed)

    @property
    def log(self) -> list[Entry]:
        """What was done to the file, and to those beside it, since `forget`."""
        records = self.writes.records
        durable = {record.number for record in records if record.kind is Kind.DURABLE}
        return [
            Entry(record.offset, record.data or bytes(record.length), record.file,
                  record.number in durable)
            if record.kind in CHANGES else Entry(0, None, record.file)
            for record in records
            if record.kind in CHANGES
            or record.kind is Kind.FLUSHED
        ]

    def forget(self) -> None:
        """Empty the log."""
        self.writes.records.clear()

    async def _wait(self) -> None:
        for _ in range(self._random.randint(0, self._patience)):
            await trio.lowlevel.checkpoint()

    def _refuses(self) -> bool:
        return self._direct or (bool(self._patience) and self._random.random() < 0.2)

    async def _begin(self, kind: str, offset: int, data: Buffer = b"") -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        # As the engine does: once handed over, a request ends whatever happens to its task.
        with trio.CancelScope(shield=True):
            await self._wait()
            if kind == "write" and self._random.random() < self._stragglers:
                for _ in range(30):
                    await self._wait()
            hold = self.holds.get(kind)
            if hold is not None:
                with trio.move_on_after(HOLD_SECONDS):  # of a test that failed meanwhile
                    await hold.wait()
        self._may_fail(kind, offset, data)

    def _may_fail(self, kind: str, offset: int, data: Buffer = b"") -> None:
        """`data`: what is to be written, or read into; for who fails after a part of it."""
        if self.fail is not None:
            self.fail(kind, offset)

    async def _return(self) -> None:
        with trio.CancelScope(shield=True):
            await self._wait()

    async def _end(self, number: int, *, durable: bool = False) -> None:
        await self._return()
        self.writes.end(number, durable=durable)
        self.generation.written += not durable

    def _do(self, kind: Kind, offset: int, data: bytes | int) -> int:
        """A request takes effect; its number in the log."""
        number = self.writes.begin(kind, self._number, offset, data)
        change(self.content, self.writes.records[-1])
        self.size = -(-len(self.content) // 512) * 512
        return number

    def _get(self, offset: int, buffer: memoryview) -> None:
        piece = self.content[offset : offset + len(buffer)]
        buffer[:] = piece + bytes(len(buffer) - len(piece))

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        if self._refuses() or "read" in self.holds:
            return False
        self._may_fail("read", offset, buffer)
        self._get(offset, buffer)
        return True

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return self.writev_nowait(offset, (data,))

    def writev_nowait(self, offset: int, data: Sequence[Buffer]) -> bool:
        if self._refuses() or "write" in self.holds:
            return False
        joined = b"".join(data)
        self._may_fail("write", offset, joined)
        self.writes.end(self._do(Kind.WRITE, offset, joined))
        self.generation.written += 1
        return True

    def submit_read(
        self, offset: int, buffer: memoryview, done: Callable[[OSError | None], None]
    ) -> None:
        trio.lowlevel.spawn_system_task(reap, done, self.read, offset, buffer)

    def submit_write(
        self,
        offset: int,
        data: Buffer,
        done: Callable[[OSError | None], None],
        *,
        fua: bool = False,
    ) -> None:
        write = self.write_fua if fua and not self.no_flush else self.write
        trio.lowlevel.spawn_system_task(reap, done, write, offset, data)

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._begin("read", offset, buffer)
        self._get(offset, buffer)
        await self._return()

    async def write(self, offset: int, data: Buffer) -> None:
        await self.writev(offset, (data,))

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        joined = b"".join(data)
        await self._begin("write", offset, joined)
        await self._end(self._do(Kind.WRITE, offset, joined))

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        if self.no_flush:
            await self.write(offset, data)
            return True
        self.generation.check()
        await self._begin("write", offset, data)
        await self._end(self._do(Kind.WRITE, offset, bytes(data)), durable=True)
        return True

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        if not (fallback or self.zeroes_fast):
            raise OSError(95, "no fast zeroes")
        await self._begin("zeroes", offset, bytes(length))
        await self._end(self._do(Kind.WRITE_ZEROES, offset, length))

    async def discard(self, offset: int, length: int) -> None:
        await self._begin("discard", offset, bytes(min(length, max(0, len(self.content) - offset))))
        await self._end(self._do(Kind.DISCARD, offset, length))

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        await self._begin("status", offset)
        piece = self.content[offset : offset + length]
        return [Extent(length, data=True, zero=not any(piece))]

    def submit_sync(self, done: Callable[[OSError | None], None]) -> None:
        trio.lowlevel.spawn_system_task(reap, done, self._sync)

    async def _sync(self) -> None:
        number = self.writes.begin(Kind.FLUSH, self._number)
        await self._begin("flush", 0)
        await self._return()
        self.writes.end(number)


async def reap(
    done: Callable[[OSError | None], None],
    function: Callable[..., Awaitable[object]],
    *args: object,
) -> None:
    """Call `done` when the coroutine has ended."""
    try:
        await function(*args)
    except OSError as error:
        done(error)
    else:
        done(None)


class InlineEngine:
    """Runs what blocks at once, where an engine would take a thread, whose pace is its own."""

    async def run(self, function: Callable[..., object], *args: object) -> object:
        await trio.lowlevel.checkpoint()
        return function(*args)

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def open_memory(
    file: Node,
    *,
    backing: Node | None = None,
    data_file: Node | None = None,
    read_only: bool = False,
    cache_sizes: CacheSizes | None = None,
    settle: bool = False,
    close: bool = True,
    engine: ThreadsEngine | InlineEngine | None = None,
    log: RedoLog | None = None,
) -> AsyncIterator[tuple[BlockBackend, Qcow2Node]]:
    """The qcow2 image in `file`, for the body; then closed, unless told otherwise.

    A single exception comes as itself, not in a group.
    """
    engine = engine or ThreadsEngine()
    epochs = Epochs()
    try:
        async with trio.open_nursery() as nursery:
            header = await read_header(file)
            node = await open_qcow2(
                file,
                backing,
                header,
                engine,
                epochs,
                data_file=data_file,
                read_only=read_only,
                cache_sizes=cache_sizes,
                log=log,
            )
            if settle:
                nursery.start_soon(node.settle)
            async with trio.open_nursery() as requests:
                yield BlockBackend(node, epochs, requests, write_cache=True), node
                requests.cancel_scope.cancel()
            if close:
                with trio.CancelScope(shield=True):
                    await node.close()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None
    finally:
        engine.close()


# --- the model -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of a program. `quick`: the synchronous way is tried first. `flag`: FUA, may be
    unmapped, or by submit_read."""

    kind: str
    offset: int = 0
    length: int = 0
    tag: int = 0
    quick: bool = True
    flag: bool = False
    delay: int = 0  # how many times it lets others go first

    @property
    def data(self) -> bytes:
        """What a write writes: different for each tag, never zero, and no two periods alike."""
        return pattern(self.tag, self.length)


def pattern(tag: int, length: int) -> bytes:
    """`length` bytes that are none of them zero."""
    return random.Random(tag).randbytes(length).replace(b"\0", b"\x7f")


class Effect(NamedTuple):
    """Bytes that a request puts on the disk."""

    offset: int
    data: bytes


class Disk:
    """The virtual disk as it must read."""

    def __init__(self, content: bytes, cluster_size: int, *, discards: bool) -> None:
        """`discards`: whether a discarded cluster reads as zeroes (not in version 2 over a
        backing file, where nothing is done)."""
        self.content = bytearray(content)
        self._cluster_size = cluster_size
        self._discards = discards

    def effect(self, request: Request) -> Effect | None:
        """What a request does to the disk, if anything."""
        match request.kind:
            case "write":
                return Effect(request.offset, request.data)
            case "zero":
                return Effect(request.offset, bytes(request.length))
            case "discard" if self._discards:
                size = self._cluster_size
                start = -(-request.offset // size) * size
                end = request.offset + request.length
                if end < len(self.content):
                    end -= end % size
                return Effect(start, bytes(end - start)) if start < end else None
        return None

    def apply(self, effects: list[Effect], actual: bytes) -> None:
        """Requests were in flight together and left `actual`, which becomes the content.

        Raises AssertionError where `actual` is not what one of them, or nobody, put there.
        """
        wanted = bytearray(self.content)
        for effect in effects:
            wanted[effect.offset : effect.offset + len(effect.data)] = effect.data
        if actual != wanted:
            self._explain(effects, wanted, actual)
        self.content = bytearray(actual)

    def _explain(self, effects: list[Effect], wanted: bytearray, actual: bytes) -> None:
        for at in differences(wanted, actual):
            allowed = {
                effect.data[at - effect.offset]
                for effect in effects
                if effect.offset <= at < effect.offset + len(effect.data)
            } or {self.content[at]}
            assert actual[at] in allowed, (
                f"byte {at:#x} is {actual[at]:#x}, not one of {sorted(allowed)}"
            )

    def check_read(self, effects: list[Effect], offset: int, data: bytes) -> None:
        """A read in flight together with `effects` found `data`."""
        for position in differences(self.content[offset : offset + len(data)], data):
            at = offset + position
            allowed = {self.content[at]} | {
                effect.data[at - effect.offset]
                for effect in effects
                if effect.offset <= at < effect.offset + len(effect.data)
            }
            assert data[position] in allowed, (
                f"read {data[position]:#x} at {at:#x}, not one of {sorted(allowed)}"
            )


def differences(one: Buffer, other: Buffer, step: int = 4096) -> list[int]:
    """The positions at which two buffers of one length differ."""
    assert len(one) == len(other)
    found = []
    for start in range(0, len(one), step):
        left, right = one[start : start + step], other[start : start + step]
        if left != right:
            found += [start + at for at in range(len(left)) if left[at] != right[at]]
    return found


async def submit(
    submit: Callable[..., bool], offset: int, buffer: Buffer, **options: bool
) -> bool:
    """Read or write by `submit_read` or `submit_write`; whether it took it."""
    done = trio.Event()
    errors: list[OSError | None] = []

    def completed(error: OSError | None) -> None:
        errors.append(error)
        done.set()

    if not submit(offset, buffer, completed, **options):
        return False
    with trio.CancelScope(shield=True):
        await done.wait()
    if errors[0] is not None:
        raise errors[0]
    return True


async def perform(backend: BlockBackend, request: Request) -> bytearray | list[Extent] | None:
    """Do one request as a front end does it. Returns what a read or block status answers."""
    offset, length = request.offset, request.length
    match request.kind:
        case "write":
            if request.flag:
                write = backend.submit_write
                if not (request.quick and await submit(write, offset, request.data, fua=True)):
                    await backend.write(offset, request.data, fua=True)
            elif not request.quick or backend.write_nowait(offset, request.data) is not None:
                await backend.write(offset, request.data)
        case "read":
            data = bytearray(length)
            view = memoryview(data)
            if request.quick and backend.read_nowait(offset, view) is None:
                return data
            if not (request.flag and await submit(backend.submit_read, offset, view)):
                await backend.read(offset, view)
            return data
        case "zero":
            try:
                await backend.write_zeroes(
                    offset, length, may_unmap=request.flag, fast=request.quick
                )
            except OSError as error:
                if error.errno != 95 or not request.quick:
                    raise
                await backend.write_zeroes(offset, length, may_unmap=request.flag)
        case "discard":
            await backend.discard(offset, length)
        case "flush":
            await backend.flush()
        case "status":
            return await backend.block_status(offset, length)
        case _:
            raise AssertionError(request.kind)
    return None


async def read_all(backend: BlockBackend) -> bytes:
    """The whole disk, a piece at a time, by either way."""
    content = bytearray(backend.size)
    view = memoryview(content)
    for start in range(0, backend.size, 1 << 18):
        piece = view[start : start + (1 << 18)]
        if backend.read_nowait(start, piece) is not None:
            await backend.read(start, piece)
    return bytes(content)


async def run_batch(backend: BlockBackend, disk: Disk, batch: Sequence[Request]) -> None:
    """Have all requests of a batch in flight together, and hold the disk against the model."""
    effects = [effect for request in batch if (effect := disk.effect(request)) is not None]
    reads: list[tuple[Request, bytearray]] = []
    statuses: list[tuple[Request, list[Extent]]] = []

    async def one(request: Request) -> None:
        for _ in range(request.delay):
            await trio.lowlevel.checkpoint()
        answer = await perform(backend, request)
        if isinstance(answer, bytearray):
            reads.append((request, answer))
        elif answer is not None:
            statuses.append((request, answer))

    if len(batch) == 1:
        await one(batch[0])
    else:
        async with trio.open_nursery() as nursery:
            for request in batch:
                nursery.start_soon(one, request)
    for request, data in reads:
        disk.check_read(effects, request.offset, bytes(data))
    actual = await read_all(backend)
    disk.apply(effects, actual)
    if effects:
        return
    for request, extents in statuses:
        check_status(disk, request, extents)


def check_status(disk: Disk, request: Request, extents: list[Extent]) -> None:
    """What is said to be zero is; the lengths add up, as far as they go."""
    at = request.offset
    for extent in extents:
        assert extent.length > 0
        if extent.zero:
            assert not any(disk.content[at : at + extent.length]), f"{extent} at {at:#x}"
        at += extent.length
    assert request.offset < at <= request.offset + request.length


# --- a reader of the format ----------------------------------------------------------------------


class Layout:
    """The tables of an image, from its bytes; nothing is believed, everything is bounded."""

    def __init__(self, image: Buffer) -> None:
        self.image = image
        (self.version,) = struct.unpack_from(">I", image, 4)
        self.cluster_bits, self.size = struct.unpack_from(">IQ", image, 20)
        self.l1_size, self.l1_offset, self.table_offset, self.table_clusters = struct.unpack_from(
            ">IQQI", image, 36
        )
        order = struct.unpack_from(">I", image, 96)[0] if self.version == 3 else 4
        self.refcount_bits = 1 << order
        self.cluster_size = 1 << self.cluster_bits
        features = struct.unpack_from(">Q", image, 72)[0] if self.version == 3 else 0
        self.has_data_file = bool(features & 4)
        self.l1 = self.words(self.l1_offset, self.l1_size)

    def words(self, offset: int, count: int) -> list[int]:
        """Big-endian 64-bit numbers; past the end of the image they are zero."""
        data = bytes(self.image[offset : offset + 8 * count]).ljust(8 * count, b"\0")
        return list(struct.unpack(f">{count}Q", data))

    def refcounts(self) -> Counter[int]:
        """Refcount by cluster, where it is not zero."""
        counts: Counter[int] = Counter()
        per_block = self.cluster_size * 8 // self.refcount_bits
        entries = self.words(self.table_offset, self.table_clusters * self.cluster_size // 8)
        for number, entry in enumerate(entries):
            if not entry:
                continue
            block = bytes(self.image[entry : entry + self.cluster_size])
            if not any(block):
                continue
            for index, value in enumerate(self._unpack(block)):
                if value:
                    counts[number * per_block + index] = value
        return counts

    def _unpack(self, block: bytes) -> list[int]:
        bits = self.refcount_bits
        if bits >= 8:
            code = {8: "B", 16: "H", 32: "I", 64: "Q"}[bits]
            block += bytes(-len(block) % (bits // 8))  # an image may end within an entry
            return list(struct.unpack(f">{len(block) * 8 // bits}{code}", block))
        return [byte >> shift & ((1 << bits) - 1) for byte in block for shift in range(0, 8, bits)]

    def l2_entries(self) -> list[tuple[int, int]]:
        """(guest cluster, entry) of all entries that are not zero."""
        found = []
        per_table = self.cluster_size // 8
        for number, entry in enumerate(self.l1):
            if entry & OFFSET:
                for index, value in enumerate(self.words(entry & OFFSET, per_table)):
                    if value:
                        found.append((number * per_table + index, value))
        return found

    def compressed(self, entry: int) -> tuple[int, int]:
        """(offset, bytes) of the data of a compressed cluster."""
        shift = 62 - (self.cluster_bits - 8)
        offset = entry & ((1 << shift) - 1)
        sectors = (entry & (COMPRESSED - 1)) >> shift
        return offset, 512 - offset % 512 + sectors * 512


class Audit(NamedTuple):
    """wrong: sentences; leaks: clusters whose refcount is higher than their references."""

    wrong: list[str]
    leaks: list[int]


def audit(image: Buffer) -> Audit:
    """What qemu-img check would find."""
    layout = Layout(image)
    size = layout.cluster_size
    references: Counter[int] = Counter()
    owners: dict[int, str] = {}
    wrong = []

    def refer(name: str, offset: int, nb_bytes: int, *, whole: bool = True) -> None:
        if whole and offset % size:
            wrong.append(f"{name} at {offset:#x} is not aligned")
        for cluster in range(offset // size, (offset + nb_bytes - 1) // size + 1):
            references[cluster] += 1
            if whole and cluster in owners:
                wrong.append(f"{name} and {owners[cluster]} share cluster {cluster}")
            owners[cluster] = name
        if offset >= len(image):
            wrong.append(f"{name} at {offset:#x} is past the end of the file")

    refer("header", 0, size)
    refer("L1 table", layout.l1_offset, layout.l1_size * 8)
    refer("refcount table", layout.table_offset, layout.table_clusters * size)
    for number, entry in enumerate(
        layout.words(layout.table_offset, layout.table_clusters * size // 8)
    ):
        if entry:
            refer(f"refcount block {number}", entry, size)
    refcounts = layout.refcounts()
    for number, entry in enumerate(layout.l1):
        if entry & OFFSET:
            refer(f"L2 table {number}", entry & OFFSET, size)
            if not entry & COPIED:
                wrong.append(f"L2 table {number} is not marked as copied")
    for guest, entry in layout.l2_entries():
        if layout.has_data_file:
            if entry & (COMPRESSED | OFFSET) and entry & ~ZERO != guest * size | COPIED:
                wrong.append(f"guest cluster {guest} has the entry {entry:#x}")
        elif entry & COMPRESSED:
            refer(f"compressed guest cluster {guest}", *layout.compressed(entry), whole=False)
        elif entry & OFFSET:
            refer(f"guest cluster {guest}", entry & OFFSET, size)
            if not entry & COPIED:
                wrong.append(f"guest cluster {guest} is not marked as copied")
    leaks = []
    for cluster in sorted(references | refcounts):
        if refcounts[cluster] < references[cluster]:
            wrong.append(
                f"cluster {cluster} ({owners[cluster]}) has refcount {refcounts[cluster]},"
                f" not {references[cluster]}"
            )
        elif refcounts[cluster] > references[cluster]:
            leaks.append(cluster)
    return Audit(wrong, leaks)


def guest_bytes(image: Buffer, backing: bytes = b"", data_file: Buffer | None = None) -> bytes:
    """The virtual disk."""
    layout = Layout(image)
    size = layout.cluster_size
    disk = bytearray(backing[: layout.size].ljust(layout.size, b"\0"))
    for guest, entry in layout.l2_entries():
        if entry & COMPRESSED:
            offset, nb_bytes = layout.compressed(entry)
            data = zlib.decompressobj(-15).decompress(
                bytes(image[offset : offset + nb_bytes]), size
            )
        elif entry & ZERO:
            data = bytes(size)
        elif entry & OFFSET or (layout.has_data_file and entry & COPIED):
            host = entry & OFFSET
            holder = image if data_file is None else data_file
            data = bytes(holder[host : host + size]).ljust(size, b"\0")
        else:
            continue
        start = guest * size
        disk[start : start + size] = data[: max(0, layout.size - start)]
    return bytes(disk)


def assert_sound(image: Buffer, *, leaks_allowed: bool = False) -> None:
    """Raises AssertionError with what is wrong."""
    found = audit(image)
    assert not found.wrong, "; ".join(found.wrong[:5])
    assert leaks_allowed or not found.leaks, f"leaked clusters {found.leaks[:20]}"


def new_image(
    folder: str | pathlib.Path,
    size: int,
    *,
    version: int = 3,
    cluster_size: int = 65536,
    refcount_bits: int = 16,
    features: tuple[int, int] = (0, 0),
) -> bytes:
    """The bytes of an empty image, as `create_image` makes it. `features`: incompatible and
    autoclear ones, to be set; with a data file (4, 0), a raw one (4, 2)."""
    path = pathlib.Path(folder) / "new.qcow2"
    create_image(
        str(path), size, version=version, cluster_size=cluster_size, refcount_bits=refcount_bits
    )
    content = bytearray(path.read_bytes())
    path.unlink()
    for offset, bits in zip((72, 88), features, strict=True):
        if bits:
            struct.pack_into(">Q", content, offset, bits)
    return bytes(content)

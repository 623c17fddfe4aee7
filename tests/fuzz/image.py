"""A qcow2 file: it is refused in one line that names it, with not a byte written; or it opens,
reads cluster by cluster as the specification says or with an error, and can be written and closed.

Nothing else is ever raised, no read is larger than the file or two clusters, and their number is
bounded. Whatever the file, guest data is never written onto tables that are in force. And if
nothing was wrong with its refcounts (`trusted`), then writing changes no other cluster, and leaves
nothing wrong with them and, if nothing failed, nothing more leaked.

An input is the file. Its backing file, if it names one, is always the same; its data file is empty.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

from fuzz import loop
from fuzz.image_mutation import mutate
from fuzz.qcow2 import BITMAPS, Naive, build, content, trusted
from nbdserve.block.backend import BlockBackend
from nbdserve.block.epoch import Epochs
from nbdserve.block.node import Buffer, Extent, Leaf
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.open import open_qcow2, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nbdserve.formats.qcow2.header import Header
    from nbdserve.formats.qcow2.node import Qcow2Node

__all__ = ["DICTIONARY", "ImageFile", "image", "mutate", "seeds"]

NAME = "fuzzed.qcow2"
BACKING = content(77, 2500)
MOST_LOOKED_AT = 40
"""Guest clusters that are read; those with an entry go first."""

MOST_READS = 2000
"""Of the file, by all that is done to it. The kept corpus makes 200 at most."""

LARGEST_FILE = 4 << 20
"""Bytes: there the disk is full."""

PATTERN = b"\xa5guest data\x5a---"


class ImageFile(Leaf):
    """A file in memory that answers at once, counts what is asked of it, and has an end."""

    is_device = False
    fua = True

    def __init__(self, data: bytes, name: str = NAME) -> None:
        super().__init__(name, -(-len(data) // 512) * 512, read_only=False)
        self.content = bytearray(data)
        self.reads = 0
        self.writes = 0
        self.nb_bytes = 0
        self.largest = 0

    def read_nowait(self, offset: int, buffer: memoryview) -> bool:
        self.reads += 1
        assert self.reads <= MOST_READS, "it reads on and on"
        self.nb_bytes += len(buffer)
        self.largest = max(self.largest, len(buffer))
        piece = self.content[offset : offset + len(buffer)]
        buffer[:] = piece.ljust(len(buffer), b"\0")
        return True

    def writev_nowait(self, offset: int, data: Sequence[Buffer]) -> bool:
        for piece in data:
            self.write_nowait(offset, piece)
            offset += len(piece)
        return True

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        end = offset + len(data)
        if end > LARGEST_FILE:
            raise OSError(errno.EFBIG, "the fuzzed file cannot grow so large")
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))
            self.size = -(-end // 512) * 512
        self.content[offset:end] = data
        self.writes += 1
        self.generation.written += 1
        return True

    async def read(self, offset: int, buffer: memoryview) -> None:
        self.read_nowait(offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        self.write_nowait(offset, data)

    async def writev(self, offset: int, data: Sequence[Buffer]) -> None:
        self.writev_nowait(offset, data)

    async def write_fua(self, offset: int, data: Buffer) -> bool:
        return self.write_nowait(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True
    ) -> None:
        self.write_nowait(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        length = min(length, max(0, len(self.content) - offset))
        self.content[offset : offset + length] = bytes(length)

    async def block_status(self, offset: int, length: int) -> list[Extent]:
        return [Extent(length, data=True, zero=not any(self.content[offset : offset + length]))]

    async def flush_to_disk(self) -> None:
        self.generation.flushed = self.generation.written


class InlineEngine:
    """Decompresses where it stands."""

    async def run(self, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401
        return function(*args)


def image(data: bytes) -> None:
    """The target."""
    loop.run(lambda: _image(data))


async def _image(data: bytes) -> None:
    file = ImageFile(data)
    try:
        header = await read_header(file)
    except ImageError as error:
        check_refusal(error, file)
        return
    # The cluster that the header is in, and each table whole.
    bound = max(len(data), 2 * header.cluster_size) + 512
    for read_only in (False, True):
        try:
            node, epochs = await open_node(file, header, read_only=read_only)
        except ImageError as error:
            check_refusal(error, file)
            continue
        visit = Visit(file, node, epochs, header)
        await visit.look()
        if not read_only:
            await visit.change()
        break
    assert file.largest <= bound, f"a read of {file.largest} bytes from a file of {len(data)}"


def check_refusal(error: ImageError, file: ImageFile) -> None:
    """One line with the file's name, and the file as it was."""
    line = str(error)
    assert line.startswith(f"{NAME}: "), line
    assert line.isprintable(), repr(line)
    assert len(line) < 1000, line
    assert not file.writes, f"{line}, but it was written to"


async def open_node(
    file: ImageFile, header: Header, *, read_only: bool
) -> tuple[Qcow2Node, Epochs]:
    """The image with what it names below it."""
    epochs = Epochs()
    backing = ImageFile(BACKING, "backing") if header.backing_file is not None else None
    data_file = ImageFile(b"", "data") if header.has_data_file else None
    engine: Any = InlineEngine()
    node = await open_qcow2(
        file, backing, header, engine, epochs, data_file=data_file, read_only=read_only
    )
    return node, epochs


class Visit:
    """All that a client could do to an open image, a little of each."""

    def __init__(self, file: ImageFile, node: Qcow2Node, epochs: Epochs, header: Header) -> None:
        self.file = file
        self.node = node
        nursery: Any = None  # for requests that outlive their client; here nobody leaves
        self.backend = BlockBackend(node, epochs, nursery, write_cache=True)
        self.unit = header.cluster_size
        self.size = header.size
        self.has_data_file = header.has_data_file
        self.before = Naive(
            bytes(file.content), BACKING if header.backing_file is not None else b""
        )
        self.trusted, self.leaks = trusted(self.before)
        self.used = self.before.used(MOST_LOOKED_AT)
        last = -(-self.size // self.unit) - 1
        self.guests = sorted({*self.used, *range(min(4, last + 1)), last} - {-1})
        self.disk: dict[int, bytes | None] = {}  # as it must read; None: with an error
        self.failed = False

    # --- looking ---------------------------------------------------------------------------------

    async def look(self) -> None:
        """Read everything and ask what it is."""
        for guest in self.guests:
            found = await self.read(guest)
            if not self.has_data_file:
                wanted = self.before.cluster(guest)
                assert found == wanted, f"guest cluster {guest} {differs(found, wanted)}"
            self.disk[guest] = found
        for start in (0, max(0, self.size - 16 * self.unit)):
            await self.check_status(start, min(self.size - start, 256 * self.unit))

    async def read(self, guest: int) -> bytes | None:
        start = guest * self.unit
        data = bytearray(min(self.unit, self.size - start))
        view = memoryview(data)
        try:
            if self.backend.read_nowait(start, view) is not None:
                await self.backend.read(start, view)
        except OSError:
            return None
        return bytes(data)

    async def check_status(self, start: int, length: int) -> None:
        if not length:
            return
        try:
            extents = await self.backend.block_status(start, length)
        except OSError:
            return
        at = start
        for extent in extents:
            assert extent.length > 0
            if extent.zero:
                for guest in range(-(-at // self.unit), (at + extent.length) // self.unit):
                    known = self.disk.get(guest)
                    assert not known or not any(known), f"guest cluster {guest} is not zero"
            at += extent.length
        assert start < at <= start + length, "block status of another range"

    # --- changing --------------------------------------------------------------------------------

    async def change(self) -> None:
        """Write, zero, discard and flush; close; see what has become of everything."""
        if self.size:
            await self.write_some()
            for guest in self.guests:
                await self.expect(guest, await self.read(guest))
        try:
            await self.node.close()
        except OSError:
            self.failed = True
        self.check_metadata()
        if self.trusted and not self.node.image.broken and not self.has_data_file:
            self.check_image()

    async def write_some(self) -> None:
        """Each way of changing a cluster, on clusters of every kind that there is."""
        some = self.used or [0]
        unit = self.unit
        unallocated = next((g for g in self.guests if g not in self.used), some[0])
        plan: list[tuple[str, int, int]] = [
            ("write", some[0] * unit + 10, 100),
            ("write", unallocated * unit, unit),
            ("write", some[len(some) // 2] * unit + unit // 2, unit),
            ("zeroes", some[len(some) // 3] * unit, unit),
            ("discard", some[len(some) // 4] * unit, unit),
            ("flush", 0, 0),
            ("unmap", some[2 * len(some) // 3] * unit - unit // 4, 2 * unit),
            ("fua", some[-1] * unit + 1, unit - 1),
            ("write", some[0] * unit + 50, 100),
        ]
        for kind, start, length in plan:
            start = max(0, min(start, self.size - 1))
            await self.do(kind, start, min(length, self.size - start))

    async def do(self, kind: str, start: int, length: int) -> None:
        backend = self.backend
        data = (PATTERN * (length // len(PATTERN) + 1))[:length]
        touched = range(start // self.unit, -(-(start + length) // self.unit))
        try:
            if kind == "write":
                if backend.write_nowait(start, data) is not None:
                    await backend.write(start, data)
            elif kind == "fua":
                await backend.write(start, data, fua=True)
            elif kind == "flush":
                await backend.flush()
            elif kind == "discard":
                await backend.discard(start, length)
            else:
                await backend.write_zeroes(start, length, may_unmap=kind == "unmap")
        except OSError:
            self.failed = True
            for guest in touched:
                self.disk.pop(guest, None)
            return
        for guest in touched:
            old = self.disk.get(guest)
            if kind == "discard" or old is None:
                self.disk.pop(guest, None)
                continue
            new = bytearray(old)
            first, end = max(start, guest * self.unit), min(start + length, (guest + 1) * self.unit)
            written = data if kind in ("write", "fua") else bytes(length)
            new[first % self.unit : first % self.unit + end - first] = written[
                first - start : end - start
            ]
            self.disk[guest] = bytes(new)

    async def expect(self, guest: int, found: bytes | None) -> None:
        if self.trusted and not self.has_data_file and guest in self.disk:
            wanted = self.disk[guest]
            assert found == wanted, f"guest cluster {guest} {differs(found, wanted)} afterwards"

    def check_metadata(self) -> None:
        """No guest data in it, wherever it is now."""
        after = Naive(bytes(self.file.content))
        for name, (offset, nb_bytes) in after.metadata().items():
            table = after.image[offset : offset + nb_bytes]
            assert PATTERN not in table or PATTERN in self.before.image, f"guest data in the {name}"

    def check_image(self) -> None:
        """Nothing was done to what nobody wrote to, and all is counted."""
        after = Naive(bytes(self.file.content), self.before._backing)
        sound, leaks = trusted(after)
        assert sound, "the refcounts, or who uses which cluster, are wrong now"
        assert self.failed or leaks <= self.leaks, f"{leaks} clusters leak, {self.leaks} before"
        for guest, wanted in self.disk.items():
            found = after.cluster(guest)
            assert found == wanted, f"guest cluster {guest} {differs(found, wanted)} in the file"


def differs(found: bytes | None, wanted: bytes | None) -> str:
    """For messages."""
    if found is None or wanted is None:
        return f"reads as {_shown(found)}, not {_shown(wanted)}"
    at = next(
        (n for n, pair in enumerate(zip(found, wanted, strict=False)) if len({*pair}) > 1), -1
    )
    return f"differs at byte {at}: {_shown(found[at:])}, not {_shown(wanted[at:])}"


def _shown(data: bytes | None) -> str:
    return "an error" if data is None else f"{data[:16].hex()}..."


# --- what fuzzing starts from --------------------------------------------------------------------


def into_the_name() -> bytes:
    """An extension that ends within the backing file's name: of the first 8 bytes of it."""
    image = build(("data",), backing=b"base.raw", extensions=[(0x11111111, b"")])
    return image[:116] + struct.pack(">I", 16) + image[120:]


def seeds() -> list[bytes]:
    """Every feature that the code looks at, in images of some kilobytes."""
    bitmaps = (BITMAPS, struct.pack(">IIQQ", 1, 0, 24, 512))
    small = ("data", "none", "compressed", "zero")
    return [
        build(),
        build(small, version=2),
        build(zstd=True),
        build(small, backing=b"base.raw", extensions=[(0xE2792ACA, b"raw")]),
        build(small, version=2, backing=b"base.raw"),
        *[build(("data", "zero"), refcount_order=order) for order in range(7)],
        build(at=130, cluster_bits=10),
        build(("none",), size=0),
        build(("data",), size=1 << 20),
        build(("none", "data"), at=60),
        build(features=(1, 0)),
        build(features=(2, 0)),
        build(("zero",), features=(4, 0), extensions=[(0x44415441, b"data.raw")]),
        build(("zero",), features=(4, 2), extensions=[(0x44415441, b"data.raw")]),
        build(small, features=(0, 1), extensions=[bitmaps]),
        build(small, features=(0, 1 << 40), extensions=[bitmaps]),
        build(small, extensions=[(0x6803F857, bytes(48)), (0x12345678, b"unknown")]),
        build(small, extensions=[(0x6803F857, b"\7\0no such bitmap".ljust(48, b"\0"))]),
        build(small, nb_snapshots=1),
        into_the_name(),
        build(small)[:-100],
        build(small)[:2000],
        build(small)[:100],
        b"QFI\xfb",
    ]


DICTIONARY = [b"QFI\xfb"]  # the mutation knows the fields

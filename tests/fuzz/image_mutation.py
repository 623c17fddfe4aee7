"""Mutations of a qcow2 file that know its fields, so that what comes out still has a header and
tables.

A mutation changes one to three things: a field of the header, an entry of a table or a refcount, a
header extension, the file's end, a cluster as a whole; or it is libFuzzer's own within one cluster.
New values are those that mean something: other offsets in the file, flags, neighbours of limits.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from fuzz.mutate import Primitive

__all__ = ["HEADER_ACTIONS", "SMALLEST", "mutate"]

FIELDS = {
    4: 4,
    8: 8,
    16: 4,
    20: 4,
    24: 8,
    32: 4,
    36: 4,
    40: 8,
    48: 8,
    56: 4,
    60: 4,
    64: 8,
    72: 8,
    80: 8,
    88: 8,
    96: 4,
    100: 4,
    104: 1,
}
"""Of the header: offset and bytes."""

SMALLEST = 512
"""Bytes of a file that has a cluster, so that its fields can be looked for."""

FLAGS = (1 << 63, 1 << 62, 1 << 63 | 1 << 62, 1)
EXTENSIONS = (0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x11111111)
WORDS = (b"raw", b"qcow2", b"data.raw", bytes(24), bytes(16), b"\1" * 48, b"base", b"x" * 16)


def mutate(data: bytes, longest: int, chance: random.Random, primitive: Primitive) -> bytes:
    """Another file."""
    if len(data) < SMALLEST or chance.random() < 0.02:
        return primitive(data, longest)
    image = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        chance.choice(ACTIONS if len(image) >= SMALLEST else (_field, _end))(
            image, chance, primitive
        )
    if chance.random() < 0.98:
        image[:4] = b"QFI\xfb"
    return bytes(image[:longest])


def _unit(image: bytearray) -> int:
    """A cluster, as far as the header makes sense."""
    (bits,) = struct.unpack_from(">I", image, 20)
    return 1 << bits if 9 <= bits <= 12 else 512


def _value(image: bytearray, chance: random.Random, old: int) -> int:
    """Another number for one that is there."""
    unit = _unit(image)
    kind = chance.randrange(9)
    if kind < 2:  # another place in the file
        return chance.randrange(len(image) // unit + 3) * unit
    if kind == 2:
        return chance.randrange(len(image) // unit + 1) * unit | 1 << 63
    if kind == 3:
        return old ^ chance.choice(FLAGS)
    if kind == 4:
        return old ^ 1 << chance.randrange(64)
    if kind == 5:
        return old + chance.choice((-unit, -1, 1, unit, 2, 8, 512))
    if kind == 6:
        return chance.choice(
            (0, 1, 2, 3, 4, 9, 21, 72, 104, 112, 255, 511, 1023, 1024, 65535, 65536)
        )
    if kind == 7:
        return 1 << chance.randrange(64)
    return (1 << chance.choice((16, 20, 22, 25, 32, 56, 63, 64))) - chance.choice((0, 1, 8))


def _put(image: bytearray, at: int, width: int, value: int) -> None:
    image[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")


def _field(image: bytearray, chance: random.Random, _primitive: Primitive) -> None:
    at, width = chance.choice([*FIELDS.items()])
    old = int.from_bytes(image[at : at + width], "big")
    _put(image, at, width, _value(image, chance, old))


def _place(image: bytearray, chance: random.Random, *, first: int) -> int | None:
    """Where some table begins: `first` is where the header has the offset, then one level below if
    chance wants that and there is one."""
    (offset,) = struct.unpack_from(">Q", image, first)
    if offset + 8 > len(image):
        return None
    if chance.random() < 0.25:
        return int(offset)
    unit = _unit(image)
    count = min(unit, len(image) - offset) // 8
    entries = [
        entry & 0x00FFFFFFFFFFFE00 for entry in struct.unpack_from(f">{count}Q", image, offset)
    ]
    below = [entry for entry in entries if entry and entry + unit <= len(image)]
    return chance.choice(below) if below else int(offset)


def _entry(image: bytearray, chance: random.Random, _primitive: Primitive) -> None:
    table = _place(image, chance, first=40)
    if table is None or table + 8 > len(image):
        return
    count = min(_unit(image), len(image) - table) // 8
    used = [n for n in range(count) if any(image[table + 8 * n : table + 8 * n + 8])]
    at = table + 8 * (
        chance.choice(used) if used and chance.random() < 0.7 else chance.randrange(count)
    )
    (old,) = struct.unpack_from(">Q", image, at)
    if used and chance.random() < 0.3:  # what another one has
        other = table + 8 * chance.choice(used)
        (value,) = struct.unpack_from(">Q", image, other)
    else:
        value = _value(image, chance, old)
    _put(image, at, 8, value)


def _refcount(image: bytearray, chance: random.Random, _primitive: Primitive) -> None:
    table = _place(image, chance, first=48)
    if table is None or table >= len(image):
        return
    at = table + chance.randrange(min(64, len(image) - table))
    image[at] = chance.choice((0, 1, 2, 3, 128, 255, image[at] ^ 1 << chance.randrange(8)))


def _extension(image: bytearray, chance: random.Random, _primitive: Primitive) -> None:
    """Insert one behind the header, over what is there or before it; or change a length."""
    (version,) = struct.unpack_from(">I", image, 4)
    start = 112 if version == 3 else 72
    if chance.random() < 0.5:
        at = start + 8 * chance.randrange(8)
        _put(image, at + 4, 4, _value(image, chance, image[at + 7]))
        return
    data = chance.choice(WORDS)
    length = len(data) + chance.choice((0, 0, 0, 1, 8, 400, 1 << 31))
    extension = struct.pack(">II", chance.choice(EXTENSIONS), length)
    extension += data + bytes(-len(data) % 8)
    unit = _unit(image)
    if chance.random() < 0.5:
        rest = image[start:unit]
        image[start:unit] = (extension + rest)[: unit - start]
    else:
        image[start : start + len(extension)] = extension


def _end(image: bytearray, chance: random.Random, _primitive: Primitive) -> None:
    unit = _unit(image)
    if chance.random() < 0.5:
        del image[max(112, len(image) - chance.choice((1, 100, 512, unit, 2 * unit))) :]
    else:
        image.extend(bytes(chance.choice((1, 512, unit, 2 * unit))))


def _cluster(image: bytearray, chance: random.Random, _primitive: Primitive) -> None:
    """One cluster becomes a copy of another, or empty."""
    unit = _unit(image)
    count = len(image) // unit
    if count < 2:
        return
    target, source = chance.randrange(1, count) * unit, chance.randrange(count) * unit
    copy = image[source : source + unit]
    image[target : target + unit] = copy if chance.random() < 0.6 else bytes(len(copy))


def _bytes(image: bytearray, chance: random.Random, primitive: Primitive) -> None:
    unit = _unit(image)
    at = chance.randrange(max(1, len(image) // unit)) * unit
    piece = bytes(image[at : at + unit])
    image[at : at + unit] = primitive(piece, len(piece)).ljust(len(piece), b"\0")


ACTIONS: tuple[Callable[[bytearray, random.Random, Primitive], None], ...] = (
    _field,
    _field,
    _entry,
    _entry,
    _entry,
    _entry,
    _refcount,
    _refcount,
    _extension,
    _end,
    _cluster,
    _bytes,
)

HEADER_ACTIONS = (_field, _field, _field, _extension, _extension, _bytes)

"""The first cluster of a qcow2 file: a header whose every promise holds, or a refusal of one line
that names the file.

What `parse_header` lets through needs no second look, so it gets one here, by a reader of its own:
tables aligned, apart, within the file and the limits, extensions within their area, names within
theirs. Nothing else is raised, whatever size the file is said to have: the first byte of an input
says that (0: as large as the rest, else a power of two), so that limits are met which a file of
some kilobytes never reaches.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from fuzz import image
from fuzz import image_mutation as mutation
from nbdserve.errors import ImageError
from nbdserve.formats.qcow2.header import autoclear_update, header_bytes_wanted, parse_header
from nbdserve.formats.qcow2.supported import check_supported

if TYPE_CHECKING:
    import random

    from fuzz.mutate import Primitive
    from nbdserve.formats.qcow2.header import Header

__all__ = ["DICTIONARY", "header", "mutate", "seeds"]

NAME = "fuzzed.qcow2"
MAX_L1, MAX_REFCOUNT_TABLE, MAX_BITMAP_DIRECTORY = 32 << 20, 8 << 20, 1024 * 65535
KNOWN = (0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441)
V2, V3_INCOMPATIBLE = 72, 0b11111


def header(data: bytes) -> None:
    """The target."""
    if not data:
        return
    first, file = data[0], data[1:]
    file_size = 1 << 9 + first % 50 if first else len(file)
    wanted = header_bytes_wanted(file[:112])
    assert 104 <= wanted <= 2 << 20, f"{wanted} bytes are to be read"
    try:
        parsed = parse_header(file, NAME, file_size)
    except ImageError as error:
        line = str(error)
        assert line.startswith(f"{NAME}: "), line
        assert line.isprintable(), repr(line)
        assert len(line) < 1000 + 64 * 46, line  # with a name for each unknown feature
        return
    check_fields(parsed, file)
    check_tables(parsed, file_size)
    check_extensions(parsed, file)
    for read_only in (False, True):
        try:
            check_supported(parsed, NAME, read_only=read_only)
        except ImageError:
            continue
        assert read_only or not parsed.nb_snapshots
        assert not parsed.crypt_method
        update = autoclear_update(parsed)
        assert update is None or (update.offset, len(update.data)) == (88, 8)


def check_fields(parsed: Header, file: bytes) -> None:
    """As they stand in the file, and as they must be."""
    assert file[:4] == b"QFI\xfb"
    version, _, _, bits, size = struct.unpack_from(">IQIIQ", file, 4)
    assert (parsed.version, parsed.cluster_bits) == (version, bits)
    assert version in (2, 3)
    assert 9 <= bits <= 21
    assert parsed.size == size // 512 * 512
    assert parsed.refcount_order <= 6
    assert parsed.header_length == (struct.unpack_from(">I", file, 100)[0] if version == 3 else V2)
    assert parsed.header_length <= parsed.cluster_size <= len(file)
    assert not parsed.incompatible_features & ~V3_INCOMPATIBLE
    zstd = parsed.incompatible_features & 8
    assert parsed.compression_type == ("zstd" if zstd else "zlib")
    if parsed.backing_file is not None:
        assert len(parsed.backing_file) <= 1023
        assert "\0" not in parsed.backing_file
    assert len(parsed.backing_format or "") <= 15


def check_tables(parsed: Header, file_size: int) -> None:
    """Aligned, within the file and their limits, apart from each other; L1 covers the disk."""
    unit = parsed.cluster_size
    tables = [
        (0, unit, unit),
        (parsed.l1_table_offset, parsed.l1_size * 8, MAX_L1),
        (parsed.refcount_table_offset, parsed.refcount_table_clusters * unit, MAX_REFCOUNT_TABLE),
        (parsed.snapshots_offset, parsed.nb_snapshots * 40, 65536 * 40),
    ]
    if parsed.bitmaps is not None:
        directory = parsed.bitmaps
        tables.append((directory.directory_offset, directory.directory_size, MAX_BITMAP_DIRECTORY))
        assert 1 <= directory.nb_bitmaps <= 65535
    for offset, nb_bytes, limit in tables:
        assert nb_bytes <= limit, f"a table of {nb_bytes} bytes, {limit} are allowed"
        assert offset % unit == 0, f"a table at {offset:#x}, within a cluster"
        assert not nb_bytes or offset + nb_bytes <= file_size, (
            f"a table at {offset:#x}, past the end"
        )
    ends = 0
    for offset, nb_bytes, _ in sorted(table for table in tables if table[1]):
        assert offset >= ends, f"the table at {offset:#x} overlaps another"
        ends = offset + nb_bytes
    per_table = unit // (16 if parsed.incompatible_features & 16 else 8)
    assert parsed.l1_size * per_table * unit >= parsed.size, "L1 does not cover the disk"


def check_extensions(parsed: Header, file: bytes) -> None:
    """Each within the area, one after the other, and no known one twice."""
    end = struct.unpack_from(">Q", file, 8)[0] or parsed.cluster_size
    assert parsed.header_length <= end <= parsed.cluster_size
    at = parsed.header_length
    for kind, data in parsed.extensions:
        assert (kind, len(data)) == struct.unpack_from(">II", file, at), (
            f"not the extension at {at}"
        )
        assert at + 8 + len(data) <= end, f"the extension at {at} runs beyond {end}"
        assert data == file[at + 8 : at + 8 + len(data)]
        at += 8 + -(-len(data) // 8) * 8
    kinds = [kind for kind, _ in parsed.extensions if kind in KNOWN]
    assert len(kinds) == len(set(kinds)), "a known extension twice"
    for name in parsed.feature_names.values():
        assert name.isprintable() or not name


# --- what fuzzing starts from --------------------------------------------------------------------


def seeds() -> list[bytes]:
    """The header clusters of whole images, in files of their size and of a terabyte."""
    found = []
    for file in image.seeds():
        unit = 1 << int.from_bytes(file[20:24].rjust(4, b"\0"), "big") % 22
        found += [b"\0" + file[:4096], bytes([31]) + file[:unit]]
    return found


DICTIONARY = [b"QFI\xfb"]  # the mutation knows the fields


def mutate(data: bytes, longest: int, chance: random.Random, primitive: Primitive) -> bytes:
    """As of an image, mostly of its header."""
    if len(data) < 1 + mutation.SMALLEST or chance.random() < 0.1:
        return primitive(data, longest)
    first = data[:1] if chance.random() < 0.8 else bytes([chance.randrange(51)])
    file = bytearray(data[1:])
    for _ in range(chance.choice((1, 1, 2))):
        chance.choice(mutation.HEADER_ACTIONS)(file, chance, primitive)
    return (first + bytes(file))[:longest]

"""The header extension area: what follows the header in the first cluster.

Bytes to an `Extensions` value, or `Malformed`. Extensions depend on the header only for where the
area lies; whether the two agree is header.py's question. Every extension is kept as it is, known
or not, because whoever rewrites a header must not lose one. Follows ``qcow2_read_extensions``,
but refuses a known type that appears twice, where QEMU believes the last.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass

from construct import StreamError

from nbdserve.formats.qcow2 import spec
from nbdserve.formats.qcow2.spec import ExtensionType, FeatureType

__all__ = ["BitmapsExtension", "Extensions", "Malformed", "parse_extensions", "text"]


class Malformed(Exception):
    """What is wrong with a header. Without the file's name, which `parse_header` adds."""


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the directory of the persistent bitmaps is. Numbers as found, not yet checked."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True)
class Extensions:
    """The area as a whole, and what the known types in it say."""

    entries: tuple[tuple[int, bytes], ...]
    """(type, data) of each, in order, without the end marker."""
    backing_format: str | None
    data_file: str | None
    feature_names: dict[tuple[FeatureType, int], str]
    bitmaps: BitmapsExtension | None
    crypto_offset: int | None
    """Of the LUKS header in the file."""


def parse_extensions(cluster: bytes, start: int, end: int) -> Extensions:
    """The extensions in [start, end) of the first cluster.

    :raises Malformed: one runs beyond the end or has an impossible length; a known one twice; more
        than MAX_HEADER_EXTENSIONS of them.
    """
    entries = _entries(cluster, start, end)
    counts = Counter(type_ for type_, _ in entries)
    for type_ in ExtensionType:
        if counts[type_] > 1:
            raise Malformed(f"header extension {type_.name} appears {counts[type_]} times")
    known = dict(entries)
    return Extensions(
        entries=tuple(entries),
        backing_format=_backing_format(known.get(ExtensionType.BACKING_FORMAT, b"")),
        data_file=text(known.get(ExtensionType.DATA_FILE, b"")) or None,
        feature_names=_feature_names(known.get(ExtensionType.FEATURE_NAMES, b"")),
        bitmaps=_bitmaps(known.get(ExtensionType.BITMAPS)),
        crypto_offset=_crypto_offset(known.get(ExtensionType.CRYPTO_HEADER)),
    )


def text(raw: bytes) -> str:
    """A string of the header. The spec has no terminator, but QEMU stops at a NUL.

    Bytes that are no UTF-8 become surrogate escapes, as in any path: names of files are bytes.
    """
    return raw.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _entries(cluster: bytes, start: int, end: int) -> list[tuple[int, bytes]]:
    """All extensions up to the end marker, which may be missing."""
    entries: list[tuple[int, bytes]] = []
    stream = io.BytesIO(cluster)
    stream.seek(start)
    while (position := stream.tell()) < end:
        try:
            extension = spec.HEADER_EXTENSION.parse_stream(stream)
        except StreamError:
            extension = None
        if extension is None or position + 8 + extension.length > end:
            raise Malformed(f"the header extension at offset {position} runs beyond {end}")
        if extension.type == ExtensionType.END:
            break
        if len(entries) == spec.MAX_HEADER_EXTENSIONS:
            raise Malformed(f"more than {spec.MAX_HEADER_EXTENSIONS} header extensions")
        entries.append((extension.type, extension.data))
    return entries


def _backing_format(raw: bytes) -> str | None:
    if len(raw) > spec.MAX_BACKING_FORMAT_NAME:
        raise Malformed(
            f"the backing format's name is {len(raw)} bytes long,"
            f" more than {spec.MAX_BACKING_FORMAT_NAME}"
        )
    return text(raw) or None


def _feature_names(table: bytes) -> dict[tuple[FeatureType, int], str]:
    """Names for error messages only, so what is wrong with an entry is not worth refusing."""
    names: dict[tuple[FeatureType, int], str] = {}
    entry_size = spec.FEATURE_NAME.sizeof()
    for index in range(min(len(table) // entry_size, spec.MAX_FEATURE_NAMES)):
        entry = spec.FEATURE_NAME.parse(table[index * entry_size :][:entry_size])
        if entry.type in FeatureType.__members__.values() and entry.bit < 64:
            name = entry.name.partition(b"\0")[0].decode("utf-8", "replace")
            # It will be printed: no line breaks and no terminal escapes.
            printable = "".join(char if char.isprintable() else "?" for char in name)
            names[FeatureType(entry.type), entry.bit] = printable
    return names


def _bitmaps(raw: bytes | None) -> BitmapsExtension | None:
    if raw is None:
        return None
    if len(raw) != spec.BITMAPS_EXTENSION.sizeof():
        raise Malformed(f"the bitmaps extension is {len(raw)} bytes long, not 24")
    parsed = spec.BITMAPS_EXTENSION.parse(raw)
    if parsed.reserved:
        raise Malformed("the bitmaps extension has bits set in its reserved field")
    return BitmapsExtension(
        parsed.nb_bitmaps, parsed.bitmap_directory_size, parsed.bitmap_directory_offset
    )


def _crypto_offset(raw: bytes | None) -> int | None:
    if raw is None:
        return None
    if len(raw) != spec.CRYPTO_EXTENSION.sizeof():
        raise Malformed(f"the encryption header extension is {len(raw)} bytes long, not 16")
    return int(spec.CRYPTO_EXTENSION.parse(raw).offset)

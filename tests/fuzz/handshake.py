"""Handshake bytes: exactly the replies and the outcome that a naive reading of the document
foresees.

No other exception, however the bytes are split, and never more than one message held. The first
byte of an input says how the rest is split: into pieces of so many bytes, 0 for not at all.

`foresee` shares nothing with the package but two exports: it is written from the document, as a
loop over the bytes at hand, so that an off-by-one there cannot be one here too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from nbdserve.nbd.export import Export
from nbdserve.nbd.handshake import Closed, Handshake, Transmission
from transmission import option

__all__ = ["DICTIONARY", "MESSAGE_MAGIC", "fix_length", "handshake", "seeds", "split"]

MAX_STRING, MAX_QUERIES, MAX_DATA = 4096, 256, 32 << 20
LONGEST_INFO, LONGEST_META = 4 + 4096 + 2 + 256, 64 << 10
HELD = LONGEST_META  # bytes: the longest option that is looked into

NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = range(1, 11)
ACK, SERVER, INFORMATION, META = 1, 2, 3, 4
UNSUP, INVALID, UNKNOWN, TOO_BIG = (1 << 31 | number for number in (1, 3, 6, 9))
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)
BASE = b"base:allocation"


@dataclass
class Disk:
    """As much of a backend as is told to clients."""

    size: int
    read_only: bool


EXPORTS = [
    Export("", Disk(1 << 20, read_only=False), description="a disk"),  # type: ignore[arg-type]
    Export("vol", Disk(512, read_only=True)),  # type: ignore[arg-type]
]
DESCRIPTIONS = {b"": b"a disk", b"vol": b""}


@dataclass
class Foreseen:
    """`replies`: (option, type) in order; `raw`: bytes that follow them, the answer to EXPORT_NAME;
    `outcome`: None while more is awaited; `left`: bytes that belong to the transmission phase."""

    replies: list[tuple[int, int]] = field(default_factory=list)
    raw: int = 0
    outcome: type | None = None
    left: bytes = b""
    structured: bool = False
    contexts: bytes | None = None  # the name of the export that they were selected for


def handshake(data: bytes) -> None:
    """The target."""
    piece, stream = (data[0] or len(data)) if data else 1, data[1:]
    server = Handshake(EXPORTS)
    replies = bytearray()
    fed = 0
    while fed < len(stream) and server.outcome is None:
        part = stream[fed : fed + piece]
        replies += server.receive(part)
        fed += len(part)
        held = len(server._message)
        assert held <= HELD, f"{held} bytes are held"
    foreseen = foresee(stream)
    got = list(split_replies(bytes(replies), foreseen.raw))
    assert got == foreseen.replies, f"replied {got}, not {foreseen.replies}"
    outcome = server.outcome
    if foreseen.outcome is None:
        assert outcome is None, f"ended with {outcome}"
        return
    assert type(outcome) is foreseen.outcome, f"ended with {outcome}, not {foreseen.outcome}"
    if isinstance(outcome, Closed):
        assert outcome.reason, "no reason is given"
        assert "\n" not in outcome.reason, repr(outcome.reason)
    if isinstance(outcome, Transmission):
        assert outcome.structured_replies is foreseen.structured
        selected = foreseen.contexts == outcome.export.name.encode()
        assert bool(outcome.contexts) is selected, outcome.contexts
        assert server.trailing + stream[fed:] == foreseen.left, "bytes were lost"


def split_replies(replies: bytes, raw: int) -> list[tuple[int, int]]:
    """(option, type) of each option reply. Raises AssertionError for one that is not
    well-formed."""
    found = []
    end = len(replies) - raw
    assert end >= 0
    at = 0
    while at < end:
        assert end - at >= 20, "a reply is cut short"
        magic, number, kind, length = struct.unpack_from(">QIII", replies, at)
        assert magic == 0x3E889045565A9, f"{magic:#x} where a reply should begin"
        at += 20 + length
        assert at <= end, "a reply is longer than what was sent"
        if kind >> 31:
            text = replies[at - length : at].decode()
            assert text, "an error without a text"
            assert "\n" not in text, repr(text)
            assert length <= MAX_STRING
        found.append((number, kind))
    return found


def foresee(stream: bytes) -> Foreseen:
    """What the document wants, and our limits."""
    found = Foreseen()
    if len(stream) < 4:
        return found
    (flags,) = struct.unpack_from(">I", stream)
    if flags & ~3:
        found.outcome = Closed
        return found
    at, count = 4, 0
    while found.outcome is None and len(stream) - at >= 16:
        magic, number, length = struct.unpack_from(">8sII", stream, at)
        count += 1
        if (
            magic != b"IHAVEOPT"
            or count > 128
            or (not flags & 1 and number != NAME)
            or length > MAX_DATA
        ):
            found.outcome = Closed
            break
        if len(stream) - at - 16 < length:
            break
        at += 16
        _option(found, flags, number, stream[at : at + length])
        at += length
    if found.outcome is Transmission:
        found.left = stream[at:]
    return found


def _option(found: Foreseen, flags: int, number: int, data: bytes) -> None:
    if number == NAME:
        found.outcome = Transmission if data in DESCRIPTIONS else Closed
        if found.outcome is Transmission:
            found.raw = 10 if flags & 2 else 134
        return
    kinds = _kinds(found, number, data)
    found.replies += [(number, kind) for kind in kinds]
    if number == ABORT:
        found.outcome = Closed
    if number == GO and kinds[-1] == ACK:
        found.outcome = Transmission


def _kinds(found: Foreseen, number: int, data: bytes) -> list[int]:
    if number == ABORT:
        return [ACK]
    if number == LIST:
        return [INVALID] if data else [SERVER, SERVER, ACK]
    if number == STRUCTURED:
        if data or found.structured:
            return [INVALID]
        found.structured = True
        return [ACK]
    if number in (INFO, GO):
        return _information(data)
    if number in (LIST_META, SET_META):
        return _meta_contexts(found, number, data)
    return [UNSUP]


def _information(data: bytes) -> list[int]:
    if len(data) > LONGEST_INFO:
        return [TOO_BIG]
    name, at = _string(data, 0)
    if name is None or len(data) < at + 2:
        return [INVALID]
    (count,) = struct.unpack_from(">H", data, at)
    if len(data) != at + 2 + 2 * count or len(name) > MAX_STRING or b"\0" in name:
        return [INVALID]
    if name not in DESCRIPTIONS:
        return [UNKNOWN]
    wanted = struct.unpack_from(f">{count}H", data, at + 2)
    blocks = 2 + (INFO_NAME in wanted) + bool(DESCRIPTIONS[name])
    return [INFORMATION] * blocks + [ACK]


def _meta_contexts(found: Foreseen, number: int, data: bytes) -> list[int]:
    if number == SET_META:
        found.contexts = None
    if len(data) > LONGEST_META:
        return [TOO_BIG]
    if number == SET_META and not found.structured:
        return [INVALID]
    name, at = _string(data, 0)
    if name is None or len(data) < at + 4:
        return [INVALID]
    (count,) = struct.unpack_from(">I", data, at)
    if count > MAX_QUERIES:
        return [TOO_BIG]
    at += 4
    queries = []
    for _ in range(count):
        query, at = _string(data, at)
        if query is None:
            return [INVALID]
        queries.append(query)
    if at != len(data) or any(len(s) > MAX_STRING or b"\0" in s for s in (name, *queries)):
        return [INVALID]
    if name not in DESCRIPTIONS:
        return [UNKNOWN]
    hit = BASE in queries
    if number == LIST_META:
        hit = hit or b"base:" in queries or not queries
    elif hit:
        found.contexts = name
    return [META, ACK] if hit else [ACK]


def _string(data: bytes, at: int) -> tuple[bytes | None, int]:
    if len(data) < at + 4:
        return None, at
    (length,) = struct.unpack_from(">I", data, at)
    end = at + 4 + length
    return (data[at + 4 : end], end) if end <= len(data) else (None, at)


# --- what fuzzing starts from --------------------------------------------------------------------


def sized(text: bytes) -> bytes:
    """A string as the protocol sends it."""
    return struct.pack(">I", len(text)) + text


def meta(name: bytes, *queries: bytes) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return sized(name) + struct.pack(">I", len(queries)) + b"".join(map(sized, queries))


FIXED = struct.pack(">I", 3)
GO_DEFAULT = option(GO, sized(b"") + b"\0\0")


def seeds() -> list[bytes]:
    """A client of each kind, and each option with the mistakes that its lengths allow."""
    streams = [
        FIXED,
        struct.pack(">I", 0) + option(NAME),
        struct.pack(">I", 2) + option(NAME, b"vol") + b"requests",
        struct.pack(">I", 1) + option(LIST) + option(ABORT),
        struct.pack(">I", 4) + option(LIST),
        FIXED + option(STRUCTURED) + option(SET_META, meta(b"", BASE)) + GO_DEFAULT,
        FIXED + option(STRUCTURED) * 2 + option(SET_META, meta(b"vol", BASE)) + GO_DEFAULT,
        FIXED
        + option(INFO, sized(b"vol") + b"\0\3\0\1\0\2\0\3")
        + option(GO, sized(b"vol") + b"\0\0"),
        FIXED + option(STARTTLS) + option(STARTTLS, b"x") + option(PEEK) + option(77, b"data"),
        FIXED + option(LIST, b"\0") + option(STRUCTURED, b"\0") + option(ABORT, b"\0"),
        FIXED + option(SET_META, meta(b"", BASE)) + option(LIST_META, meta(b"")),
        FIXED + option(LIST_META, meta(b"vol", b"base:", b"qemu:", b"", b"x:y")),
        FIXED + option(INFO, sized(b"no") + b"\0\0") + option(LIST_META, meta(b"no")),
        FIXED + option(GO, sized(b"") + b"\0\1") + option(GO, sized(b"") + b"\0\0\0"),
        FIXED + option(GO, b"\xff\xff\xff\xff\0\0") + option(GO, b"\0\0") + option(GO),
        FIXED
        + option(LIST_META, sized(b"") + b"\0\0\1\1")
        + option(LIST_META, sized(b"") + b"\0\0\0\1"),
        FIXED
        + option(LIST_META, meta(b"", *[b""] * 257))
        + option(LIST_META, meta(b"", *[b""] * 256)),
        FIXED + option(LIST) * 129,
        FIXED + b"IHAVEOPT" + struct.pack(">II", LIST, (32 << 20) + 1) + b"x",
        FIXED + b"IHAVEOPT" + struct.pack(">II", 99, 32 << 20) + b"x",
        FIXED + option(NAME, b"x" * 4096),
        FIXED + option(NAME, b"x" * 4097),
        FIXED
        + option(INFO, sized(b"x" * 4096) + b"\0\0")
        + option(INFO, sized(b"x" * 4097) + b"\0\0"),
        FIXED + option(INFO, bytes(LONGEST_INFO)) + option(INFO, bytes(LONGEST_INFO + 1)),
        FIXED + option(INFO, sized(b"a\0b") + b"\0\0"),
        FIXED
        + option(STRUCTURED)
        + option(SET_META, meta(b"", BASE))
        + option(SET_META, meta(b"no"))
        + GO_DEFAULT,
    ]
    return [bytes([pieces]) + stream for stream in streams for pieces in (0, 7)]


DICTIONARY = [
    b"IHAVEOPT",
    BASE,
    b"base:",
    b"vol",
    FIXED,
    *[option(number) for number in range(1, 11)],
    GO_DEFAULT,
    option(SET_META, meta(b"", BASE)),
    option(GO, sized(b"vol") + b"\0\1\0\3"),
    b"\0\0\0\0",
    b"\0\0\0\1",
    b"\xff\xff\xff\xff",
    b"\0\0\x10\0",
    b"\0\0\x10\1",
    b"\0\1\0\0",
]

MESSAGE_MAGIC = b"IHAVEOPT"
HEAD = 5  # bytes: the size of the pieces, client flags


def split(data: bytes) -> list[bytes]:
    """What stands before the first option, and the options."""
    head, *rest = data[HEAD:].split(MESSAGE_MAGIC)
    return [data[:HEAD] + head, *[MESSAGE_MAGIC + part for part in rest]]


def fix_length(message: bytes) -> bytes:
    """An option with its length made right."""
    if len(message) < 16:
        return message
    return message[:12] + struct.pack(">I", len(message) - 16) + message[16:]

"""Transmission bytes, parsed only: the requests that a naive parser sees, payloads unharmed, and
the error for each that the document wants; or the stream ends where it breaks.

Nothing but ProtocolError is raised and no byte is lost, however the bytes are split, however few
requests are taken at a time, and whichever batches are pinned. The first four bytes of an input
decide that and what the session is: see `Session`. Buffers and payloads are smaller here than in a
server (`SMALL`), so that inputs of some kilobytes meet their ends.
"""

from __future__ import annotations

import random
import struct
from functools import cache
from typing import NamedTuple

from fuzz.scale import scaled
from nbdserve.nbd import intake
from nbdserve.nbd import requests as parser
from nbdserve.nbd import validate as validation
from nbdserve.nbd.proto import TransmissionFlag
from nbdserve.nbd.requests import (
    ProtocolError,
    Request,
    RequestBuffer,
    command_of,
    flags_of,
)
from nbdserve.nbd.scratch import Scratch
from nbdserve.nbd.validate import Validator
from transmission import BLOCK_STATUS, CACHE, DISC, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, request

__all__ = [
    "DICTIONARY",
    "MESSAGE_MAGIC",
    "SIZE",
    "SMALL",
    "SMALL_PAYLOADS",
    "Foreseen",
    "error_of",
    "fix_length",
    "foresee",
    "requests",
    "seeds",
    "split",
]

MAGIC = 0x25609513
HEADER = 28
CAPACITY = 4 << 10
COPIED = 64
LONGEST = 64 << 10
SIZE = 256 << 10
EPERM, EINVAL, ENOSPC, EOVERFLOW = 1, 22, 28, 75
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))
HEAD = 4


class Session(NamedTuple):
    """What the head of an input decides. Pieces of 0 bytes: all at once."""

    piece: int
    limit: int
    read_only: bool
    structured: bool
    contexts: bool
    seed: int

    @classmethod
    def of(cls, head: bytes) -> Session:
        piece, limit, bits, seed = head.ljust(HEAD, b"\0")
        # Pieces of 1 to 127 bytes, or so many times 97: some end within a header, some within data.
        size = piece if piece < 128 else (piece - 127) * 97
        return cls(size, limit % 128 + 1, bool(bits & 1), bool(bits & 2), bool(bits & 4), seed)


@cache
def validator(read_only: bool, structured: bool, contexts: bool) -> Validator:
    """Of a session with the flags that export.py gives to such a client."""
    known = TransmissionFlag
    flags = known.HAS_FLAGS | known.SEND_FLUSH | known.SEND_FUA | known.SEND_CACHE
    if read_only:
        flags |= known.READ_ONLY
    else:
        flags |= known.SEND_TRIM | known.SEND_WRITE_ZEROES | known.SEND_FAST_ZERO
    if structured:
        flags |= known.SEND_DF
    return Validator(SIZE, flags, block_status=contexts)


class Foreseen(NamedTuple):
    """A request as the naive parser sees it."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: bytes | None


def foresee(stream: bytes) -> tuple[list[Foreseen], bool]:
    """The complete requests, and whether what follows them cannot be one."""
    found: list[Foreseen] = []
    while len(stream) >= HEADER:
        magic, flags, command, cookie, offset, length = struct.unpack_from(">IHHQQI", stream)
        payload = None
        size = HEADER
        if magic != MAGIC or (command == WRITE and length > LONGEST):
            return found, True
        if command == WRITE:
            size += length
            if len(stream) < size:
                break
            payload = stream[HEADER:size]
        found.append(Foreseen(flags, command, cookie, offset, length, payload))
        stream = stream[size:]
    return found, False


def error_of(asked: Foreseen, session: Session) -> int:
    """What the document, and nbdkit's order where it leaves one, has a request answered with."""
    flags, command, _, offset, length, _ = asked
    writes = command in (WRITE, TRIM, WRITE_ZEROES)
    if command not in (READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
        return EINVAL
    if writes and session.read_only:
        return EPERM
    if command == BLOCK_STATUS and not session.contexts:
        return EINVAL
    if command == FLUSH:
        if offset or length:
            return EINVAL
    elif offset + length > SIZE:
        return ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL
    allowed = FUA
    if command == READ and session.structured:
        allowed |= DF
    if command == WRITE_ZEROES:
        allowed |= NO_HOLE | FAST_ZERO
    if command == BLOCK_STATUS:
        allowed |= REQ_ONE
    if flags & ~allowed:
        return EINVAL
    if command in (READ, WRITE) and length > LONGEST:
        return EOVERFLOW if command == READ and session.structured else EINVAL
    return EINVAL if command == BLOCK_STATUS and not length else 0


SMALL_PAYLOADS = [
    (parser, "MAXIMUM_PAYLOAD", LONGEST),
    (intake, "MAXIMUM_PAYLOAD", LONGEST),
    (validation, "MAXIMUM_PAYLOAD", LONGEST),
]
SMALL = [*SMALL_PAYLOADS, (parser, "CAPACITY", CAPACITY), (parser, "COPIED", COPIED)]
"""In place of 64 and 1 MiB, and 4 KiB."""


def requests(data: bytes) -> None:
    """The target."""
    with scaled(SMALL):
        _requests(data)


def _requests(data: bytes) -> None:
    session, stream = Session.of(data[:HEAD]), data[HEAD:]
    expected, breaks = foresee(stream)
    validate = validator(session.read_only, session.structured, session.contexts).validate
    chance = random.Random(session.seed)
    buffer = RequestBuffer(Scratch(CAPACITY))
    pinned: list[tuple[memoryview, bytes]] = []
    number = 0
    broken = False
    fed = 0
    while fed < len(stream) and not broken:
        room = buffer.room()
        assert len(room), "no room to receive into"
        part = stream[fed : fed + min(session.piece or len(stream), len(room))]
        room[: len(part)] = part
        buffer.received(len(part))
        fed += len(part)
        while True:
            try:
                batch = buffer.parse(session.limit)
            except ProtocolError:
                broken = True
                break
            if not batch:
                break
            assert len(batch) <= session.limit, "more requests than asked for"
            for found in batch:
                assert number < len(expected), f"one request too many: {found}"
                check(found, expected[number])
                flags, command, _, offset, length, _ = asked = expected[number]
                verdict = validate(flags, command, offset, length)
                assert verdict == error_of(asked, session), f"{asked} in {session}: {verdict}"
                number += 1
            if session.seed and chance.random() < 0.3:
                buffer.pin()
                pinned += [(view, bytes(view)) for *_, view in batch if view is not None]
        buffer.settle(sparing=bool(session.seed & 1))
    assert number == len(expected), f"{number} requests of {len(expected)}"
    assert broken is breaks, "it does not end where the stream breaks"
    for view, content in pinned:
        assert view == content, "the payload of a pinned batch was overwritten"


def check(found: Request, asked: Foreseen) -> None:
    """It is the request that was sent."""
    head, cookie, offset, length, payload = found
    assert head >> 32 == MAGIC
    assert (flags_of(head), command_of(head)) == asked[:2], f"{head:#x} for {asked}"
    assert (cookie, offset, length) == asked[2:5], f"{found} for {asked}"
    assert (payload is None) is (asked.payload is None)
    assert payload is None or bytes(payload) == asked.payload, "another payload"


# --- what fuzzing starts from --------------------------------------------------------------------


def streams() -> list[bytes]:
    """Clients of each kind."""
    read, write = request(READ, 1, 0, 512), request(WRITE, 2, 4096, 100, 0, b"w" * 100)
    return [
        read,
        write + read,
        read * 20 + request(DISC, 3, 0, 0) + read,
        write[:60],
        request(WRITE, 4, 0, LONGEST + 1) + b"x",
        request(WRITE, 4, 0, LONGEST) + b"x" * 300,
        request(WRITE, 5, SIZE - 10, 100, 0, b"e" * 100) + read,
        request(WRITE, 5, 0, 0) + request(READ, 6, SIZE, 0),
        request(READ, 6, SIZE - 1, 2)
        + request(READ, 6, (1 << 64) - 1, 1)
        + request(READ, 7, 0, SIZE),
        request(READ, 8, 0, 40_000, DF) + request(READ, 9, 0, 0xFFFFFFFF, DF),
        request(FLUSH, 1, 0, 0) + request(FLUSH, 2, 0, 1) + request(FLUSH, 3, 0, 0, FUA),
        request(TRIM, 1, 0, SIZE)
        + request(TRIM, 2, 1, 0xFFFFFFFF)
        + request(TRIM, 3, 5, 9000, FUA),
        request(CACHE, 1, 0, SIZE) + request(CACHE, 2, SIZE, 1),
        *[
            request(WRITE_ZEROES, 1, 100, 70_000, flags) + read
            for flags in (0, FUA, NO_HOLE, FAST_ZERO)
        ],
        request(BLOCK_STATUS, 1, 0, SIZE) + request(BLOCK_STATUS, 2, 0, SIZE, REQ_ONE),
        request(BLOCK_STATUS, 3, 0, 0) + request(BLOCK_STATUS, 4, SIZE - 512, 512, FUA),
        request(8, 1, 0, 0) + request(0xFFFF, 2, 0, 0, 0xFFFF) + read,
        request(WRITE, 1, 0, 300, FUA, b"f" * 300) + request(WRITE, 2, 0, 300, 0x8000, b"g" * 300),
        read + b"\0" * 30 + read,
        read[:20] + read,
        b"".join(request(WRITE, i, i * 512, 64, 0, bytes([i]) * 64) for i in range(24)),
    ]


def seeds() -> list[bytes]:
    """Each in several sessions."""
    return [
        bytes([piece, limit, bits, seed]) + stream
        for number, stream in enumerate(streams())
        for piece, limit, bits, seed in [
            (0, 127, number % 8, 0),
            (11, number % 5, (number + 2) % 8, number),
            (128, 3, 6, 1),
            (1, 3, 6, 0),
        ]
    ]


DICTIONARY = [
    *[request(command, 7, 0, 512)[:8] for command in range(9)],
    request(WRITE, 7, 0, 4, 0, b"data"),
    request(WRITE, 8, 0, 0),
    request(BLOCK_STATUS, 9, 0, 4096, 8),
    struct.pack(">I", SIZE),
    struct.pack(">Q", SIZE),
    struct.pack(">I", SIZE + 1),
    struct.pack(">I", LONGEST),
    struct.pack(">I", LONGEST + 1),
    b"\xff" * 8,
    b"\xff" * 4,
    b"\0" * 8,
]

MESSAGE_MAGIC = struct.pack(">I", MAGIC)


def split(data: bytes) -> list[bytes]:
    """What stands before the first request, and the requests."""
    head, *rest = data[HEAD:].split(MESSAGE_MAGIC)
    return [data[:HEAD] + head, *[MESSAGE_MAGIC + part for part in rest]]


def fix_length(message: bytes) -> bytes:
    """A request with its length that of what follows it, made a WRITE if anything does."""
    if len(message) < HEADER or message[6:8] != b"\0\1":
        return message[:HEADER]
    return message[:24] + struct.pack(">I", len(message) - HEADER) + message[HEADER:]

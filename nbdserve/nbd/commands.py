"""What the requests do that cannot be answered at once: one coroutine for each command.

They run as tasks in the backend's nursery, get a request that was validated, and return the
buffers of its reply. Flags become keyword arguments here and go no deeper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.nbd import replies
from nbdserve.nbd.proto import (
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlag,
    ReplyType,
)
from nbdserve.nbd.wire import OFFSET_DATA_CHUNK, OFFSET_HOLE_CHUNK, SIMPLE_REPLY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nbdserve.block.backend import BlockBackend
    from nbdserve.nbd.options import Transmission

    Reply = list[bytes | bytearray]
    Payload = memoryview | bytes | None
    Handler = Callable[[Transmission, int, int, int, int, Payload], Awaitable[Reply]]

__all__ = ["HANDLERS", "HOLES_FROM", "hole_chunk", "read_reply_head"]

# Reads from this length on are answered with hole chunks where they meet zeroes: below, asking
# where they are costs more than sending them.
HOLES_FROM = 32 << 10

# NBD_CMD_CACHE reads that many bytes at a time.
CACHE_STEP = 256 << 10

DF = int(CommandFlag.DF)
FUA = int(CommandFlag.FUA)
NO_HOLE = int(CommandFlag.NO_HOLE)
FAST_ZERO = int(CommandFlag.FAST_ZERO)
REQ_ONE = int(CommandFlag.REQ_ONE)


def read_reply_head(
    cookie: int, offset: int, length: int, *, structured: bool, last: bool = True
) -> bytes:
    """What stands before `length` bytes of data in the answer to a READ."""
    if not structured:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
    flags = replies.DONE if last else 0
    return OFFSET_DATA_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, flags, ReplyType.OFFSET_DATA, cookie, length + 8, offset
    )


def hole_chunk(cookie: int, offset: int, length: int, *, last: bool) -> bytes:
    """A piece of a READ that is zeroes."""
    flags = replies.DONE if last else 0
    return OFFSET_HOLE_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC, flags, ReplyType.OFFSET_HOLE, cookie, 12, offset, length
    )


def _backend(session: Transmission) -> BlockBackend:
    return session.export.backend


async def _read(
    session: Transmission, flags: int, cookie: int, offset: int, length: int, _payload: object
) -> Reply:
    backend = _backend(session)
    structured = session.structured_replies
    if not length:
        if structured:  # no chunk of data may be empty
            return [replies.done(cookie, structured=True)]
        return [read_reply_head(cookie, offset, 0, structured=False)]
    pieces = None
    if structured and not flags & DF and length >= HOLES_FROM:
        pieces = backend.map_nowait(offset, length)
    pieces = pieces or [(False, length)]
    reply: Reply = []
    for number, (is_hole, nb_bytes) in enumerate(pieces):
        last = number == len(pieces) - 1
        if is_hole:
            reply.append(hole_chunk(cookie, offset, nb_bytes, last=last))
        else:
            data = bytearray(nb_bytes)
            await backend.read(offset, memoryview(data))
            reply.append(
                read_reply_head(cookie, offset, nb_bytes, structured=structured, last=last)
            )
            reply.append(data)
        offset += nb_bytes
    return reply


async def _write(
    session: Transmission,
    flags: int,
    cookie: int,
    offset: int,
    _length: int,
    payload: Payload,
) -> Reply:
    assert payload is not None
    await _backend(session).write(offset, payload, fua=bool(flags & FUA))
    return [replies.done(cookie, structured=False)]


async def _flush(
    session: Transmission, _flags: int, cookie: int, _offset: int, _length: int, _payload: object
) -> Reply:
    await _backend(session).flush()
    return [replies.done(cookie, structured=False)]


async def _trim(
    session: Transmission, flags: int, cookie: int, offset: int, length: int, _payload: object
) -> Reply:
    await _backend(session).discard(offset, length, fua=bool(flags & FUA))
    return [replies.done(cookie, structured=False)]


async def _cache(
    session: Transmission, _flags: int, cookie: int, offset: int, length: int, _payload: object
) -> Reply:
    """Bring the range into the page cache by reading it (as QEMU's NBD server prefetches)."""
    buffer = memoryview(bytearray(min(length, CACHE_STEP)))
    while length:
        piece = buffer[:length]
        await _backend(session).read(offset, piece)
        offset += len(piece)
        length -= len(piece)
    return [replies.done(cookie, structured=False)]


async def _write_zeroes(
    session: Transmission, flags: int, cookie: int, offset: int, length: int, _payload: object
) -> Reply:
    await _backend(session).write_zeroes(
        offset,
        length,
        may_unmap=not flags & NO_HOLE,
        fast=bool(flags & FAST_ZERO),
        fua=bool(flags & FUA),
    )
    return [replies.done(cookie, structured=False)]


async def _block_status(
    session: Transmission, flags: int, cookie: int, offset: int, length: int, _payload: object
) -> Reply:
    one = bool(flags & REQ_ONE)
    extents = await _backend(session).block_status(offset, length, one=one)
    return [
        replies.block_status(
            cookie, context_id, extents, last=number == len(session.contexts) - 1
        )
        for number, (context_id, _name) in enumerate(session.contexts)
    ]


HANDLERS: dict[int, Handler] = {
    Command.READ: _read,
    Command.WRITE: _write,
    Command.FLUSH: _flush,
    Command.TRIM: _trim,
    Command.CACHE: _cache,
    Command.WRITE_ZEROES: _write_zeroes,
    Command.BLOCK_STATUS: _block_status,
}

"""From results to bytes: replies, and the one table from errno to NBD error values.

Errors keep their errno up to here. `ERRNO_TO_NBD` narrows it to what the protocol document knows
("Error values"); what it does not know is EINVAL there and EIO here, because an error that is not
the client's fault must not be called a bad request.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from nbdserve.nbd.proto import (
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    NbdError,
    ReplyFlag,
    ReplyType,
    StateFlag,
)
from nbdserve.nbd.wire import BLOCK_STATUS_HEAD, CHUNK, ERROR_HEAD, EXTENT, SIMPLE_REPLY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdserve.block.node import Extent

__all__ = ["ERRNO_TO_NBD", "block_status", "done", "error_reply", "nbd_error"]

ERRNO_TO_NBD: dict[int, NbdError] = {
    errno.EPERM: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EIO: NbdError.EIO,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOVERFLOW: NbdError.EOVERFLOW,
    errno.EOPNOTSUPP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}

# Longest text in an error chunk; the length field has 16 bits, a person reads one line.
MAX_MESSAGE = 512

DONE = int(ReplyFlag.DONE)
HOLE = int(StateFlag.HOLE)
ZERO = int(StateFlag.ZERO)


def nbd_error(number: int | None) -> int:
    """The error value for an errno."""
    return int(ERRNO_TO_NBD.get(number or errno.EIO, NbdError.EIO))


def done(cookie: int, *, structured: bool) -> bytes:
    """Success without data. A simple reply is always allowed but for READ and BLOCK_STATUS."""
    if structured:
        return CHUNK.pack(STRUCTURED_REPLY_MAGIC, DONE, ReplyType.NONE, cookie, 0)
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)


def error_reply(cookie: int, error: int, message: str, *, structured: bool) -> bytes:
    """Failure; with structured replies the client gets the reason in words as well."""
    if not structured:
        return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
    text = message.encode(errors="replace")[:MAX_MESSAGE]
    text = text.decode(errors="ignore").encode()  # a character that was cut in two goes
    length = ERROR_HEAD.size + len(text)
    return (
        CHUNK.pack(STRUCTURED_REPLY_MAGIC, DONE, ReplyType.ERROR, cookie, length)
        + ERROR_HEAD.pack(error, len(text))
        + text
    )


def block_status(cookie: int, context_id: int, extents: Iterable[Extent], *, last: bool) -> bytes:
    """One context's chunk: pairs of length and base:allocation flags."""
    body = b"".join(
        [
            EXTENT.pack(extent.length, (0 if extent.data else HOLE) | (ZERO if extent.zero else 0))
            for extent in extents
        ]
    )
    return (
        CHUNK.pack(
            STRUCTURED_REPLY_MAGIC,
            DONE if last else 0,
            ReplyType.BLOCK_STATUS,
            cookie,
            BLOCK_STATUS_HEAD.size + len(body),
        )
        + BLOCK_STATUS_HEAD.pack(context_id)
        + body
    )

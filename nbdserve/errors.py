"""The exception tree: what goes wrong for a reason the user can be told.

Every error here carries one sentence, fit to be printed as one line on stderr,
that names the file or the option and says what is wrong with it; and an errno,
so that the same error met while serving can be answered to an NBD client.

What does *not* live here: a failing read or write of a healthy image is a plain
OSError with its errno all the way up the block stack (`DisconnectError` is one that
front ends know), and a client that breaks
the NBD protocol is the front end's business. Nothing raised here is a bug of
ours; bugs are ordinary Python exceptions and are never caught as one of these.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class NbdserveError(Exception):
    """Something the user can be told in one line.

    :param message: one sentence without a trailing full stop; names its subject.
    :param errno: what an NBD client is answered if this happens while serving.
    """

    default_errno = errno.EIO

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = self.default_errno if errno is None else errno


class ConfigError(NbdserveError):
    """An option, or a combination of options, that cannot be honoured."""

    default_errno = errno.EINVAL


class ImageError(NbdserveError):
    """An image that cannot be opened or created: not in its format, or a feature we refuse."""

    default_errno = errno.EINVAL


class CorruptImage(ImageError):
    """Metadata that contradicts itself; the image must be repaired before it is written."""

    default_errno = errno.EIO


class NoDirectIOError(ImageError):
    """A file, or what it is on, that cannot be opened with O_DIRECT."""


class LockedError(ImageError):
    """Another process holds a lock on the image that excludes what we want to do with it."""

    default_errno = errno.EAGAIN


class DisconnectError(ConnectionAbortedError):
    """A request that shall have no reply: whoever asked loses his connection."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNABORTED, "the client is disconnected, as a fault says")


@contextmanager
def naming(subject: str) -> Iterator[None]:
    """Put the name of an option or a file before what is wrong with it."""
    try:
        yield
    except NbdserveError as error:
        raise type(error)(f"{subject}: {error}", error.errno) from None

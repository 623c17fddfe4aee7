"""The file that tells others our process id.

Law: while it is there and ours it is locked, so a second server that names it is refused; and it
goes with us. Follows QEMU's ``qemu_write_pidfile`` but for that: qemu-nbd leaves the file behind,
and a stale one invites killing a stranger.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import TYPE_CHECKING

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["pid_file"]


@contextlib.contextmanager
def pid_file(path: str) -> Generator[None]:
    """Hold a file with our process id, mode 0600, one line, for the body.

    :raises ConfigError: the file cannot be written, or another process holds it.
    """
    try:
        fd = _open_locked(path)
        try:
            os.ftruncate(fd, 0)
            os.write(fd, b"%d\n" % os.getpid())
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        reason = "another process holds it" if error.errno == errno.EAGAIN else error.strerror
        raise ConfigError(f"--pid-file: {path}: {reason}", error.errno) from None
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(fd)


def _open_locked(path: str) -> int:
    while True:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder may have removed the file between our open and our lock.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except OSError:
            os.close(fd)
            raise
        os.close(fd)

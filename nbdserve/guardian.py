"""The guardian: a second process that finishes the write-back of a server that was killed.

The server forks it before anything else exists. For each qcow2 image that is opened for writing it
is given the redo log (block/redo.py), in shared memory, and a descriptor of the file. Then it does
nothing, until the socket to the server says that there is no server any more. What the server has
not taken back by then it replays, in the stages of the write order, and ends. So whoever opens
the image next, QEMU included, finds all that was acknowledged.

Laws:

* The image stays locked until that is done. The guardian's descriptor is an open file description
  of its own with the same image locks as the server's; both are released by `Ward.close`. An image
  without locks has no guardian: it would write to what the next server has changed.
* Nothing is written while I/O of the dead server may be in flight. Requests of io_uring outlive
  their process for some time, and hold its file description; on that the server holds the lock of
  one more byte (`drivers/locks.py`), and the guardian waits until that is free.
* The guardian cannot be hit by what is aimed at the server's process or terminal: it has a session
  of its own and ignores the signals that end a server. Who kills both (a container, a cgroup)
  loses what was not flushed, as with any other server; the image is as sound as after a power cut.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.block.redo import RedoLog, replay
from nbdserve.drivers.locks import server_is_alive
from nbdserve.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdserve.drivers.file import FileNode
    from nbdserve.drivers.locks import ImageLock

__all__ = ["Guardian", "Ward", "guardian"]

log = logging.getLogger("nbdserve.guardian")

# What ps and pkill show; not what they show of the server, so that "pkill nbdserve" spares it.
COMM = "qcow2-guardian"

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE,
           signal.SIGUSR1, signal.SIGUSR2)  # fmt: skip

MAX_MESSAGE = 65536
MAX_FDS = 3

# Seconds between two looks at whether I/O of the server is still in flight.
POLL = 0.005


class Ward:
    """An image in the guardian's care: its log, and the descriptor that keeps it locked."""

    def __init__(
        self, guardian: Guardian, number: int, log: RedoLog, fd: int, lock: ImageLock
    ) -> None:
        self.log = log
        self._guardian = guardian
        self._number = number
        self._fd = fd
        self._lock = lock

    def close(self) -> None:
        """The image was closed, well or not: nothing is to be replayed."""
        self._guardian.forget(self._number)
        self.log.close()
        self._lock.release()  # the guardian has not closed it yet
        os.close(self._fd)


class Guardian:
    """The server's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.nb_wards = 0
        self._sock = sock
        self._numbers = itertools.count(1)

    def watch(
        self, file: FileNode, data_file: FileNode | None, *, offset: int, no_flush: bool
    ) -> Ward | None:
        """Take care of an image whose metadata is in `file`, its own offset 0 being at `offset`
        there. The locks of the file have been taken. None if that cannot be, which is logged."""
        try:
            fd, lock = file.guarded()
        except (OSError, ImageError) as error:
            log_lost(error)
            return None
        try:
            redo = RedoLog()
        except OSError as error:
            lock.release()
            os.close(fd)
            log_lost(error)
            return None
        number = next(self._numbers)
        fds = [fd] if data_file is None else [fd, data_file.fd]
        self.send(
            {
                "watch": number,
                "filename": file.filename,
                "offset": offset,
                "no_flush": no_flush,
            },
            redo.fd,
            *fds,
        )
        self.nb_wards += 1
        return Ward(self, number, redo, fd, lock)

    def forget(self, number: int) -> None:
        """An image was closed."""
        self.nb_wards -= 1
        self.send({"forget": number})

    def send(self, message: dict[str, object], *fds: int) -> None:
        """Tell the other end. That there is none any more is said once, and is no error: it takes
        two deaths to lose something."""
        try:
            socket.send_fds(self._sock, [json.dumps(message).encode()], fds)
        except OSError as error:
            if self._sock.fileno() >= 0:
                log_lost(error)
                self._sock.close()


def log_lost(error: Exception) -> None:
    """The guardian was killed, could not be started, or cannot do its work."""
    reason = getattr(error, "strerror", None) or error
    log.warning(
        "no guardian (%s): if this process is killed, writes that were not flushed are lost", reason
    )


@contextlib.contextmanager
def guardian(*, keep_stderr: bool = True) -> Iterator[Guardian | None]:
    """A guardian for this process, for the body. To be called with one thread and nothing open.

    `keep_stderr`: what goes wrong is said there; a daemon's has to let go of it.

    None if it cannot be started, which is logged. A body that is left in order has closed its
    images, and the guardian is gone afterwards.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = os.fork()
    except OSError as error:
        ours.close()
        theirs.close()
        log_lost(error)
        yield None
        return
    if pid == 0:
        ours.close()
        _run(theirs, keep_stderr=keep_stderr)
    theirs.close()
    server_end = Guardian(ours)
    try:
        yield server_end
    finally:
        ours.close()
        if not server_end.nb_wards:  # else it waits for our end
            with contextlib.suppress(ChildProcessError):  # SIGCHLD was ignored when we came
                os.waitpid(pid, 0)


def _run(sock: socket.socket, *, keep_stderr: bool) -> None:
    """The guardian's whole life; it does not return."""
    status = 1
    try:
        os.setsid()
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write(COMM)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1) if keep_stderr else (0, 1, 2):
            os.dup2(nowhere, stream)
        os.closerange(3, sock.fileno())
        os.closerange(sock.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")
        wards = _listen(sock)
        for ward in wards.values():
            ward.rescue()
        status = 0
    except BaseException as error:
        _complain(f"guardian: {error!r}")
    finally:
        os._exit(status)


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"nbdserve: {text}\n".encode(errors="surrogateescape"))


def _listen(sock: socket.socket) -> dict[int, _Orphan]:
    """Note what is to be watched, until the server is gone; what is left then."""
    wards: dict[int, _Orphan] = {}
    while True:
        data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE, MAX_FDS)
        if not data:
            return wards
        message = json.loads(data)
        if "forget" in message:
            wards.pop(message["forget"]).close()
        else:
            log_fd, *files = fds
            wards[message["watch"]] = _Orphan(
                message["filename"], message["offset"], message["no_flush"], log_fd, files
            )


@dataclass(frozen=True, slots=True)
class _Orphan:
    """An image in the guardian's process. `files`: the image, and its data file if it has one."""

    filename: str
    start: int
    no_flush: bool
    log_fd: int
    files: list[int]

    def close(self) -> None:
        for fd in (self.log_fd, *self.files):
            os.close(fd)

    def rescue(self) -> None:
        """The server is dead: write what it has not written."""
        log = RedoLog(self.log_fd)
        try:
            if not len(log):
                return
            self._wait_for_io()
            if replay(log.records(), self):
                self.flush()
        except OSError as error:
            _complain(
                f"{self.filename}: the server was killed, and finishing its work failed:"
                f" {error.strerror}; what was written since the last flush may be lost"
            )
        finally:
            log.close()
            for fd in self.files:
                os.close(fd)

    def _wait_for_io(self) -> None:
        while server_is_alive(self.files[0]):
            time.sleep(POLL)

    # --- the file to replay into -----------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.files[0], length, self.start + offset)

    def write(self, offset: int, data: bytes) -> None:
        while data:
            done = os.pwrite(self.files[0], data, self.start + offset)
            data, offset = data[done:], offset + done

    def flush(self) -> None:
        if not self.no_flush:
            for fd in reversed(self.files):
                os.fdatasync(fd)

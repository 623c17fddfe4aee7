"""Image locks: the byte-range locks by which QEMU's tools and nbdserve exclude each other.

Follows block/file-posix.c of QEMU (``raw_handle_perm_lock``, ``raw_apply_lock_bytes``,
``raw_check_lock_bytes``), of which 7.2 was observed. Whoever opens an image states what
he does with it (permissions) and what he lets others do (shared), and holds *read* locks
on single bytes of the file itself:

- byte 100 + bit for every permission he uses;
- byte 200 + bit for every permission he does **not** share.

As read locks never conflict, taking them always works between well-behaved users. A
conflict is found afterwards, by asking whether a *write* lock could be had: on byte
200 + bit of each permission used (does somebody not share it?) and on 100 + bit of each
one not shared (does somebody use it?). Locking before asking means that of two who start
at once at least one sees the other; possibly both give up.

The locks are OFD locks: they belong to the open file description. They live as long as
any duplicate of it, in this process or in a child, and closing an unrelated descriptor
of the same file does not drop them, as it would POSIX locks. QEMU 7.2 has no second
descriptor for them: they are on the one it reads and writes. They are advisory; the
bytes need not exist, and are never read or written.

A kernel without OFD locks (before 3.15, some sandboxes) gets no locking at all, which is
QEMU's ``locking=auto``. A *file system* that refuses them is an error, as in QEMU.

Two more bytes are ours, and mean nothing to QEMU. A guardian (guardian.py) holds the image locks of
its server on a description of its own, with GUARDIAN_BYTE; the server marks its own by SERVER_BYTE,
until the last of its I/O has ended, which may be after its death.

There was a fifth permission (bit 4, "graph-mod") whose bytes QEMU up to 6.1 may lock;
it conflicted with nothing, so it is neither locked nor tested here.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import functools
import os
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdserve.errors import ImageError, LockedError

if TYPE_CHECKING:
    from collections.abc import Iterator

PERMISSION_BASE = 100
SHARED_BASE = 200
SERVER_BYTE = 300
GUARDIAN_BYTE = 301


class Permission(enum.IntFlag):
    """What may be done with a node (QEMU's ``BLK_PERM_*``); each value is its bit on disk."""

    CONSISTENT_READ = 0x1
    """Read, and find there what a guest would."""
    WRITE = 0x2
    WRITE_UNCHANGED = 0x4
    """Write what is there already, as copy-on-read does."""
    RESIZE = 0x8

    ALL = CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE


class Role(enum.Enum):
    """What a host file is to the node above it."""

    FORMAT_RW = enum.auto()
    """The file of a writable qcow2 node."""
    FORMAT_RO = enum.auto()
    """The file of a read-only qcow2 node: a backing file too."""
    RAW_RW = enum.auto()
    """The file of a writable raw node that is exported."""
    RAW_RO = enum.auto()
    """The file of a read-only raw node that is exported."""
    RAW_BACKING = enum.auto()
    """The file of a raw node that backs an overlay."""
    DATA_FILE_RW = enum.auto()
    """The external data file of a writable qcow2 node."""
    DATA_FILE_RO = enum.auto()
    """The external data file of a read-only qcow2 node."""
    CREATE = enum.auto()
    """A file that a new image is about to replace (``raw_co_create``)."""


_READ = Permission.CONSISTENT_READ
_METADATA_SHARED = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
_NO_RESIZE = Permission.ALL & ~Permission.RESIZE

PERMISSIONS: Final[dict[Role, tuple[Permission, Permission]]] = {
    Role.FORMAT_RW: (_READ | Permission.WRITE | Permission.RESIZE, _METADATA_SHARED),
    Role.FORMAT_RO: (_READ, _METADATA_SHARED),
    Role.RAW_RW: (_READ | Permission.WRITE, _NO_RESIZE),
    Role.RAW_RO: (_READ, _NO_RESIZE),
    Role.RAW_BACKING: (_READ, Permission.ALL),
    Role.DATA_FILE_RW: (_READ | Permission.WRITE | Permission.RESIZE, _NO_RESIZE),
    Role.DATA_FILE_RO: (_READ, _NO_RESIZE),
    Role.CREATE: (Permission.WRITE | Permission.RESIZE, _NO_RESIZE),
}
"""(permissions, shared) by role, as qemu-nbd 7.2 takes them.

Observed from the ``lock:`` lines of /proc/PID/fdinfo (bytes locked -> role):

- qcow2 rw, with any cache mode and number of clients: 100 101 103, 201 203
- qcow2 with -r, or as a backing file at any depth, or under -s: 100, 201 203
- raw rw, probed or not, with --offset or not: 100 101, 203; with -r: 100, 203
- raw as a backing file, whether the overlay is rw or -r: 100 alone
- external data file (data_file_raw) of qcow2 rw: 100 101 103, 203; with -r: 100, 203

So QEMU lets two programs write to one raw image, and lets a raw backing file be written
to; so does nbdserve. qemu-io takes the same but for raw (rw 100 101, -r 100: it shares
resizing too); ``-U`` (force-share) takes byte 100 alone with any format, and that is
``acquire(permissions, Permission.ALL)``. While only probing a format QEMU locks nothing.
"""


class _Phrase(NamedTuple):
    lock: str
    do: str
    done: str


_PHRASES = {
    Permission.CONSISTENT_READ: _Phrase("consistent read", "read", "read"),
    Permission.WRITE: _Phrase("write", "write to", "written to"),
    Permission.WRITE_UNCHANGED: _Phrase("write unchanged", "rewrite parts of", "rewritten"),
    Permission.RESIZE: _Phrase("resize", "resize", "resized"),
}


class ImageLock:
    """The lock bytes held on one open image file.

    :param fd: the descriptor the image is read and written through, open for reading at
        least; the caller keeps it open and closes it, which also releases the locks.
    :param filename: the name errors give the image.
    """

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._held: frozenset[int] = frozenset()

    def acquire(self, permissions: Permission, shared: Permission) -> None:
        """Hold exactly the locks of ``permissions`` and ``shared``, whatever was held before.

        All or nothing: on an error the bytes held before are held still, and no others.
        Giving up permissions, or sharing more, always succeeds.

        :raises LockedError: somebody does not share a permission asked for, or uses one not
            shared; the message names him where /proc tells.
        :raises ImageError: the file system refuses the locks.
        """
        if not ofd_locks_available():
            return
        before = self._held
        wanted = _lock_bytes(permissions, shared)
        try:
            for byte in sorted(wanted - before):
                self._lock(byte)
            if not wanted <= before:
                self._check(permissions, shared)
        except BaseException:
            self._keep_only(before)
            raise
        self._keep_only(wanted)

    def copy_to(self, fd: int) -> None:
        """Hold the same locks on another open file description of the file, for as long as that
        exists: requests through it may be in flight when this process is gone. Raises OSError."""
        for byte in sorted(self._held):
            _set_lock(fd, byte, fcntl.F_RDLCK)

    def twin(self, fd: int) -> ImageLock:
        """Hold the same locks on another open file description of the file, for a guardian.

        :raises ImageError: there are none to hold, so nobody would wait for the guardian; or the
            file system refuses them.
        """
        if not self._held:
            raise ImageError(f"{self._filename}: it is not locked")
        twin = ImageLock(fd, self._filename)
        try:
            for byte in (*sorted(self._held), GUARDIAN_BYTE):
                twin._lock(byte)
            self._lock(SERVER_BYTE)
        except BaseException:
            twin.release()
            raise
        return twin

    def release(self) -> None:
        """Drop every lock; a second call does nothing. To be called before closing the fd."""
        self._keep_only(frozenset())

    def _check(self, permissions: Permission, shared: Permission) -> None:
        """Follows ``raw_check_lock_bytes``."""
        for bit, phrase in _PHRASES.items():
            if permissions & bit and (user := self._conflict(SHARED_BASE, bit)):
                raise LockedError(
                    f"{self._filename}: in use by {user}: nobody else may"
                    f' {phrase.do} it ("{phrase.lock}" lock refused)'
                )
        for bit, phrase in _PHRASES.items():
            if not shared & bit and (user := self._conflict(PERMISSION_BASE, bit)):
                raise LockedError(
                    f"{self._filename}: in use by {user}: it may be {phrase.done}"
                    f' meanwhile (shared "{phrase.lock}" lock refused)'
                )

    def _conflict(self, base: int, bit: Permission) -> str | None:
        """Who holds a lock on the byte of ``bit``, in words; None if nobody else does."""
        byte = base + bit.bit_length() - 1
        try:
            kind, pid = _test_lock(self._fd, byte)
        except OSError as error:
            raise self._refused(error) from error
        return None if kind == fcntl.F_UNLCK else _describe_holders(self._fd, byte, pid)

    def _lock(self, byte: int) -> None:
        try:
            _set_lock(self._fd, byte, fcntl.F_RDLCK)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise self._refused(error) from error
            # Somebody who does not follow the rules above holds a write lock on it.
            _, pid = _test_lock(self._fd, byte)
            raise LockedError(
                f"{self._filename}: in use by {_describe_holders(self._fd, byte, pid)}:"
                " it is locked exclusively"
            ) from error
        self._held |= {byte}

    def _keep_only(self, bytes_to_keep: frozenset[int]) -> None:
        for byte in sorted(self._held - bytes_to_keep):
            _set_lock(self._fd, byte, fcntl.F_UNLCK)
            self._held -= {byte}

    def _refused(self, error: OSError) -> ImageError:
        return ImageError(
            f"{self._filename}: cannot lock: {error.strerror}"
            " (its file system must support byte-range locks)",
            error.errno,
        )


def server_is_alive(fd: int) -> bool:
    """Whether the server whose guardian holds `fd` lives, or I/O of its. Raises OSError if that
    cannot be known."""
    return _test_lock(fd, SERVER_BYTE)[0] != fcntl.F_UNLCK


def is_being_rescued(fd: int) -> bool:
    """Whether a guardian has the image, and its server is dead. Raises OSError."""
    return _test_lock(fd, GUARDIAN_BYTE)[0] != fcntl.F_UNLCK and not server_is_alive(fd)


@functools.cache
def ofd_locks_available() -> bool:
    """Whether the kernel has OFD locks; without them :class:`ImageLock` locks nothing.

    Follows ``qemu_probe_lock_ops``: asks on /dev/null, so it says nothing of a file system.
    """
    try:
        fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        _test_lock(fd, 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _lock_bytes(permissions: Permission, shared: Permission) -> frozenset[int]:
    """The offsets to lock, as the module's head says."""
    return frozenset(
        base + bit.bit_length() - 1
        for base, mask in ((PERMISSION_BASE, permissions), (SHARED_BASE, ~shared))
        for bit in _PHRASES
        if mask & bit
    )


_FLOCK = struct.Struct("hhqqi0q")
"""struct flock with a 64-bit off_t: l_type, l_whence, l_start, l_len, l_pid, padding."""


def _set_lock(fd: int, byte: int, kind: int) -> None:
    # l_pid must be 0 in the OFD commands.
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _test_lock(fd: int, byte: int) -> tuple[int, int]:
    """What keeps us from a write lock on the byte: (F_UNLCK for nothing, its owner's pid).

    The pid is -1 if the lock in the way is an OFD lock, which no process owns.
    """
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, query))
    return kind, pid


_MAX_NAMED = 3
"""Holders named in an error; a popular backing file may have hundreds."""


def _describe_holders(fd: int, byte: int, pid: int) -> str:
    """``qemu-nbd (pid 7)``, several of them, or "another process" if /proc does not tell.

    :param pid: the owner if it is a POSIX lock, else not positive.
    """
    pids = [pid] if pid > 0 else sorted(_find_holders(os.fstat(fd), fd, byte))
    if not pids and (pids := sorted(_find_holders(os.fstat(fd), fd, GUARDIAN_BYTE))):
        return f"the guardian (pid {pids[0]}) of a server that was killed"
    if not pids:
        return "another process"
    named = [f"{_process_name(pid)} (pid {pid})" for pid in pids[:_MAX_NAMED]]
    if len(pids) > _MAX_NAMED:
        named.append(f"{len(pids) - _MAX_NAMED} more")
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _process_name(pid: int) -> str:
    if pid == os.getpid():
        return "this process itself"
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read().removesuffix("\n")
    except OSError:
        return "a process"
    # A process chooses its name; it must not break out of the one line of an error.
    return "".join(char if char.isprintable() else "?" for char in name)


def _find_holders(image: os.stat_result, own_fd: int, byte: int) -> Iterator[int]:
    """Pids that have the image open with a lock on ``byte``, as far as we may look.

    A guardian's description does not count, unless it is what is looked for.
    """
    own = (os.getpid(), own_fd)
    for pid in _numbers("/proc"):
        for fd in _numbers(f"/proc/{pid}/fdinfo"):
            if (pid, fd) != own and _holds(image, pid, fd, byte):
                yield pid
                break


def _holds(image: os.stat_result, pid: int, fd: int, byte: int) -> bool:
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii", errors="replace") as file:
            lines = list(file)
        if not any(_covers(line, byte) for line in lines):
            return False
        if byte != GUARDIAN_BYTE and any(_covers(line, GUARDIAN_BYTE) for line in lines):
            return False
        # The device number in the lock line is not the one stat gives on btrfs and
        # overlayfs, so the files are compared by stat; last, as it can hang on a dead NFS.
        return os.path.samestat(image, os.stat(f"/proc/{pid}/fd/{fd}"))
    except (OSError, ValueError):
        # Gone meanwhile, not ours to look at, or not as Linux writes it.
        return False


def _covers(line: str, byte: int) -> bool:
    """Whether a line of fdinfo is a byte-range lock that covers the byte.

    ``lock: 1: OFDLCK ADVISORY READ -1 fe:00:2148193 100 101``, where the last number is
    inclusive or "EOF"; neighbouring bytes of the same owner come merged (proc(5)).
    """
    match line.split():
        case ["lock:", _, "OFDLCK" | "POSIX", _, _, _, _, start, end]:
            return int(start) <= byte and (end == "EOF" or byte <= int(end))
    return False


def _numbers(directory: str) -> list[int]:
    """The entries that are numbers (pids, descriptors); none if it cannot be read."""
    try:
        return [int(name) for name in os.listdir(directory) if name.isdecimal()]
    except OSError:
        return []

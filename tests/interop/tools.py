"""What several files here share: the libnbd client, maps, refusals, digests."""

import dataclasses
import hashlib
import json
import pathlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import peers
from peers import PathLike

CLIENT = pathlib.Path(__file__).with_name("client.py")
NBDSERVE = [sys.executable, "-m", "nbdserve"]

HOLE, ZERO = 1, 2
"""The flags of base:allocation ("base:allocation metadata context")."""

PATIENCE = 20.0
"""Seconds to wait for what should happen soon: a loaded machine fails no test."""


def client(action: str, *arguments: PathLike | int) -> str:
    """Run `tests/interop/client.py ACTION ARGUMENTS`; returns its stdout."""
    words = [str(argument) for argument in arguments]
    return peers.run(peers.SYSTEM_PYTHON, "-I", CLIENT, action, *words).stdout


def sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until the condition holds; it is a failure if it does not within PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.01)


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    offset: int
    length: int
    flags: int


def map_of(uri: str) -> list[Extent]:
    """`nbdinfo --map`, with neighbours that say the same made one."""
    rows = json.loads(peers.run("nbdinfo", "--map", "--json", uri).stdout)
    found: list[Extent] = []
    for row in rows:
        if found and found[-1].flags == row["type"]:
            last = found.pop()
            found.append(Extent(last.offset, last.length + row["length"], last.flags))
        else:
            found.append(Extent(row["offset"], row["length"], row["type"]))
    return found


def side_by_side(one: list[Extent], other: list[Extent]) -> Iterator[tuple[int, int, int, int]]:
    """Two maps of one disk as (offset, length, flags of one, flags of the other)."""
    ends = sorted({extent.offset + extent.length for extent in one + other})
    assert one[-1].offset + one[-1].length == other[-1].offset + other[-1].length
    offset = 0
    for end in ends:
        mine, theirs = (
            next(extent.flags for extent in extents if offset < extent.offset + extent.length)
            for extents in (one, other)
        )
        yield offset, end - offset, mine, theirs
        offset = end


def refused(
    *argv: PathLike, command: str = "serve", program: tuple[str, ...] = ()
) -> str:
    """Start our server, by `program` if there is one, and expect what every refusal is: soon, exit
    status 1, nothing on stdout and one line on stderr, which is returned."""
    words = [str(word) for word in argv]
    done = subprocess.run(
        [*program, *NBDSERVE, command, *words], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("nbdserve: ")
    return done.stderr


class BareClient:
    """A client that does just what it is told, badly if so: it sends requests as they are and
    reads replies only when asked.  Simple replies; NBD_OPT_EXPORT_NAME."""

    READ, WRITE, DISC, FLUSH, TRIM, _, WRITE_ZEROES = range(7)
    FUA, NO_HOLE = 1, 2
    _REQUEST = struct.Struct(">IHHQQI")
    _REPLY = struct.Struct(">IIQ")

    def __init__(
        self, path: pathlib.Path, *, negotiate: bool = True, export: bytes = b""
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(path))
        assert self._receive(18).startswith(b"NBDMAGICIHAVEOPT")
        if negotiate:
            no_zeroes_and_fixed = 3
            self.sock.sendall(struct.pack(
                ">IQII", no_zeroes_and_fixed, 0x49484156454F5054, 1, len(export)) + export)
            self._receive(10)

    def request(
        self, command: int, cookie: int, offset: int, data: bytes | int, flags: int = 0
    ) -> bytes:
        """A request as bytes: `data` is a WRITE's payload or another command's length."""
        payload = data if isinstance(data, bytes) else b""
        length = data if isinstance(data, int) else len(data)
        return self._REQUEST.pack(0x25609513, flags, command, cookie, offset, length) + payload

    def ask(self, request: bytes) -> None:
        """Send one request that is no READ; its answer is the next, and no error."""
        self.sock.sendall(request)
        _, error, cookie = self._REPLY.unpack(self._receive(self._REPLY.size))
        assert (error, cookie) == (0, self._REQUEST.unpack_from(request)[3])

    def replies(self, data: Mapping[int, int] | None = None) -> Iterator[tuple[int, int]]:
        """(cookie, error) of each reply until the server closes. `data`: by cookie, how many bytes
        it carries; they are received and forgotten."""
        while head := self._receive(self._REPLY.size, or_end=True):
            magic, error, cookie = self._REPLY.unpack(head)
            assert magic == 0x67446698
            if data and not error:
                self._receive(data.get(cookie, 0))
            yield cookie, error

    def close(self) -> None:
        self.sock.close()

    def _receive(self, length: int, *, or_end: bool = False) -> bytes:
        # MSG_WAITALL waits for nothing on a socket with a timeout.
        data = b""
        while len(data) < length and (more := self.sock.recv(length - len(data))):
            data += more
        assert len(data) == length or (or_end and not data)
        return data


class Client(BareClient):
    """Asks for one thing at a time."""

    def perform(self, command: int, offset: int, data: bytes | int) -> tuple[int, bytes]:
        """(error, what was read)."""
        self.sock.sendall(self.request(command, 7, offset, data))
        _, error, _ = self._REPLY.unpack(self._receive(self._REPLY.size))
        length = data if isinstance(data, int) and command == self.READ and not error else 0
        return error, self._receive(length)

    def write(self, offset: int, data: bytes) -> int:
        """The error."""
        return self.perform(self.WRITE, offset, data)[0]

    def flush(self) -> int:
        """The error."""
        return self.perform(self.FLUSH, 0, 0)[0]

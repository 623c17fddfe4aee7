"""Bad clients, many at once, over real sockets.

One thread, no sleeps: each kind is a function that gets sockets which are connected and does what
its clients do, as far as it goes without waiting for the server. What the server has done with it
is seen at the server, or by a request of an honest client that is answered behind it.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator

KIB, MIB = 1 << 10, 1 << 20
READ, WRITE, DISC, FLUSH = range(4)
SHORT_HELLO = struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 0)  # EXPORT_NAME, ""
ANSWER = 18 + 10  # greeting; size and flags


def request(command: int, cookie: int, offset: int, length: int, payload: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, length) + payload


def dial(path: pathlib.Path, *, negotiate: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(str(path))
    if negotiate:
        sock.sendall(SHORT_HELLO)
        exactly(sock, ANSWER)
    return sock


def exactly(sock: socket.socket, nb_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < nb_bytes:
        more = sock.recv(nb_bytes - len(data))
        if not more:
            raise ConnectionError(f"end of stream after {len(data)} of {nb_bytes} bytes")
        data += more
    return bytes(data)


class Honest:
    """Reads and writes, one request after the other, each answer checked."""

    def __init__(self, path: pathlib.Path) -> None:
        self.sock = dial(path)
        self._cookie = 0

    def __enter__(self) -> Honest:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    def _ask(self, command: int, offset: int, length: int, payload: bytes = b"") -> None:
        self._cookie += 1
        self.sock.sendall(request(command, self._cookie, offset, length, payload))
        magic, error, cookie = struct.unpack(">IIQ", exactly(self.sock, 16))
        assert (magic, error, cookie) == (0x67446698, 0, self._cookie)

    def read(self, offset: int, length: int) -> bytes:
        self._ask(READ, offset, length)
        return exactly(self.sock, length)

    def write(self, offset: int, data: bytes) -> None:
        self._ask(WRITE, offset, len(data), data)


def put(socks: list[socket.socket], data: bytes) -> int:
    """Send to each what it takes; returns how many bytes were taken."""
    taken = 0
    for sock in socks:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while True:
                sent = sock.send(data)
                taken += sent
                if sent < len(data):
                    break
                break
    return taken


def silent(path: pathlib.Path, number: int) -> list[socket.socket]:
    """Connect and say nothing."""
    return [dial(path, negotiate=False) for _ in range(number)]


def idle(path: pathlib.Path, number: int) -> list[socket.socket]:
    """Negotiate, do one request, and say nothing more."""
    socks = [dial(path) for _ in range(number)]
    for sock in socks:
        sock.sendall(request(READ, 1, 0, 4096))
        exactly(sock, 16 + 4096)
    return socks


def dripping(path: pathlib.Path, number: int) -> list[socket.socket]:
    """Announce a write of 64 MiB and send its header a byte at a time, then some of the payload."""
    socks = [dial(path) for _ in range(number)]
    for byte in request(WRITE, 1, 0, 64 * MIB) + b"xyz":
        for sock in socks:
            sock.send(bytes([byte]))
    return socks


def hoarding(path: pathlib.Path, number: int) -> list[socket.socket]:
    """Send most of a large write and never the rest."""
    socks = [dial(path) for _ in range(number)]
    message = request(WRITE, 1, 0, 8 * MIB) + bytes(128 * KIB)
    for _ in range(8):
        put(socks, message)
        message = bytes(128 * KIB)
    return socks


def flooding(length: int) -> Callable[[pathlib.Path, int], list[socket.socket]]:
    """Send as many reads of that length as the socket takes, read nothing."""

    def flood(path: pathlib.Path, number: int) -> list[socket.socket]:
        socks = [dial(path) for _ in range(number)]
        message = b"".join(request(READ, n, 0, length) for n in range(200))
        for _ in range(3):
            put(socks, message)
        return socks

    return flood


def half_closed(path: pathlib.Path, number: int) -> list[socket.socket]:
    """As those that flood, and close the sending half."""
    socks = flooding(256 * KIB)(path, number)
    for sock in socks:
        sock.shutdown(socket.SHUT_WR)
    return socks


def pinning(path: pathlib.Path, number: int) -> list[socket.socket]:
    """Writes that wait, of lengths that keep the buffers they came in; replies are not read."""
    socks = [dial(path) for _ in range(number)]
    for _ in range(4):
        put(socks, request(WRITE, 1, 0, 600 * KIB, bytes(600 * KIB)))
    return socks


KINDS: dict[str, Callable[[pathlib.Path, int], list[socket.socket]]] = {
    "silent, before the handshake": silent,
    "idle, in transmission": idle,
    "64 MiB announced, a byte at a time": dripping,
    "most of a write, never the rest": hoarding,
    "reads of 4 KiB, nothing read": flooding(4 * KIB),
    "reads of 256 KiB, nothing read": flooding(256 * KIB),
    "reads of 4 MiB, nothing read": flooding(4 * MIB),
    "reads of 32 MiB, nothing read": flooding(32 * MIB),
    "half-closed, nothing read": half_closed,
}


@contextlib.contextmanager
def crowd(kind: str, path: pathlib.Path, number: int) -> Iterator[list[socket.socket]]:
    """So many of a kind, until the end."""
    socks = KINDS[kind](path, number)
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


def has_ended(sock: socket.socket) -> bool:
    """Whether the server has closed it."""
    poll = select.poll()
    poll.register(sock, select.POLLHUP)
    return bool(poll.poll(0))

"""A disk behind NBD, on a unix socket: as much of a client as slots.py needs.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

import os
import socket
import struct

READ, WRITE, _, FLUSH = range(4)
EXPORT_NAME = 1
NO_ZEROES = 3  # and the fixed newstyle handshake


class Disk:
    """`size` in bytes. What goes wrong is an OSError; what takes too long, a TimeoutError."""

    def __init__(self, path: str | os.PathLike[str], timeout: float = 30) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(os.fspath(path))
        magic, option, _ = struct.unpack(">8s8sH", self.take(18))
        if magic != b"NBDMAGIC":
            raise ConnectionError(f"{path}: no NBD server")
        self.socket.sendall(struct.pack(">I8sII", NO_ZEROES, option, EXPORT_NAME, 0))
        self.size, _ = struct.unpack(">QH", self.take(10))

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def read(self, offset: int, length: int) -> bytes:
        self.ask(READ, offset, length)
        return self.take(length)

    def write(self, offset: int, data: bytes) -> None:
        self.ask(WRITE, offset, len(data), data)

    def flush(self) -> None:
        self.ask(FLUSH)

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        head = struct.pack(">IHHQQI", 0x25609513, 0, command, 0, offset, length)
        self.socket.sendall(head + data)
        _, error, _ = struct.unpack(">IIQ", self.take(16))
        if error:
            raise OSError(error, os.strerror(error))

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise ConnectionResetError("the server is gone")
            data += piece
        return data

"""A block device behind NBD, on a unix socket: as much of a client as the ledger needs."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Self

READ, WRITE, DISCONNECT, FLUSH, TRIM = range(5)
FUA = 1
TIMEOUT = 30.0


class DeviceError(OSError):
    """The device answered with an error."""


class Device:
    """Connects at once. A context manager, which disconnects."""

    def __init__(self, path: str | os.PathLike[str], export: str = "") -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._cookie = 0
        try:
            self._socket.connect(os.fspath(path))
            magic, have_option, _ = struct.unpack(">8s8sH", self._take(18))
            if (magic, have_option) != (b"NBDMAGIC", b"IHAVEOPT"):
                raise ConnectionError(f"{path}: not an NBD server")
            name = export.encode()
            self._socket.sendall(struct.pack(">I8sII", 3, have_option, 1, len(name)) + name)
            self.size, self.flags = struct.unpack(">QH", self._take(10))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            with contextlib.suppress(OSError):  # the server is gone
                self._send(DISCONNECT, 0, 0)
            self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        self._ask(READ, offset, length)
        return self._take(length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self._ask(WRITE, offset, len(data), data, flags=FUA if fua else 0)

    def flush(self) -> None:
        self._ask(FLUSH, 0, 0)

    def trim(self, offset: int, length: int) -> None:
        self._ask(TRIM, offset, length)

    def _ask(
        self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0
    ) -> None:
        self._send(command, offset, length, data, flags)
        _, error, cookie = struct.unpack(">IIQ", self._take(16))
        assert cookie == self._cookie
        if error:
            raise DeviceError(error, os.strerror(error))

    def _send(
        self, command: int, offset: int, length: int, data: bytes = b"", flags: int = 0
    ) -> None:
        self._cookie += 1
        head = struct.pack(
            ">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length
        )
        self._socket.sendall(head + data)

    def _take(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise ConnectionResetError("the server is gone")
            data += piece
        return bytes(data)

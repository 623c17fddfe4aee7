"""What a client is told first: enough of the protocol to ask a server how long its disk is.

A server in another process says it to nobody else, and its options, an offset for example, have
their part in it.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from nbdserve.errors import NbdserveError
from nbdserve.nbd.proto import OPTION_MAGIC, REQUEST_MAGIC, ClientFlag, Command, Option

if TYPE_CHECKING:
    import pathlib

__all__ = ["export_size"]

SECONDS = 30.0


def export_size(path: pathlib.Path, export: str) -> int:
    """The size of an export in bytes. Raises NbdserveError, OSError."""
    name = export.encode()
    option = OPTION_MAGIC + struct.pack(">II", Option.EXPORT_NAME, len(name)) + name
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(str(path))
        with sock.makefile("rb") as replies:
            replies.read(18)  # two magic numbers and flags
            sock.sendall(struct.pack(">I", ClientFlag.FIXED_NEWSTYLE) + option)
            answer = replies.read(134)
            if len(answer) < 134:
                raise NbdserveError(f"{path}: the server does not say what it serves")
            sock.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))
    size: int = struct.unpack(">Q", answer[:8])[0]
    return size

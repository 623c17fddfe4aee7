"""The ledger's format: blocks of 4096 bytes, each one entry with its checksum."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ledger.device import Device

BLOCK = 4096
HEAD = struct.Struct(">4sIII")  # magic, number, length, crc32 of the text


class Ledger:
    """`entries`: what is in it."""

    def __init__(self, device: Device, *, durable: bool = True) -> None:
        """`durable`: flush after each entry. What is not flushed is not there for good."""
        self._device = device
        self._durable = durable
        self.entries: list[str] = []
        while (found := self._read(len(self.entries))) is not None:
            self.entries.append(found)

    def _read(self, number: int) -> str | None:
        if (number + 1) * BLOCK > self._device.size:
            return None
        block = self._device.read(number * BLOCK, BLOCK)
        magic, named, length, crc = HEAD.unpack_from(block)
        text = block[HEAD.size : HEAD.size + length]
        if (magic, named, crc) != (b"LEDG", number, zlib.crc32(text)):
            return None
        return text.decode()

    def append(self, entry: str) -> None:
        """It is there for good when this returns. Raises OSError; it may be there or not then."""
        text = entry.encode()
        number = len(self.entries)
        head = HEAD.pack(b"LEDG", number, len(text), zlib.crc32(text))
        self._device.write(number * BLOCK, (head + text).ljust(BLOCK, b"\0"))
        if self._durable:
            self._device.flush()
        self.entries.append(entry)

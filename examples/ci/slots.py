"""Updates that survive: two slots on a disk, and the firmware is in the one that is newer.

An update goes into the other slot. Its header, a sector, makes it the newer one, and is written
when all else is on the disk for good. Whatever happens meanwhile, one slot is whole.
"""

import struct
import zlib

from disk import Disk

HEADER = struct.Struct(">4sIII")  # magic, number of the update, length, CRC-32 of the firmware
SECTOR = 512


class Damaged(Exception):
    """What the disk has is not what was written."""


class Slots:
    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.starts = (0, disk.size // 2)

    def firmware(self) -> bytes | None:
        """The last one that was installed."""
        number, length, checksum, start = self.newer()
        if not number:
            return None
        firmware = self.disk.read(start + SECTOR, length)
        if zlib.crc32(firmware) != checksum:
            raise Damaged(f"update {number}")
        return firmware

    def update(self, firmware: bytes) -> None:
        """It is installed for good when this returns. After an OSError it may be, or the one
        before it is."""
        number, _, _, newer = self.newer()
        start = next(start for start in self.starts if start != newer)
        self.disk.write(start + SECTOR, firmware)
        self.disk.flush()
        header = HEADER.pack(b"SLOT", number + 1, len(firmware), zlib.crc32(firmware))
        self.disk.write(start, header.ljust(SECTOR, b"\0"))
        self.disk.flush()

    def newer(self) -> tuple[int, int, int, int]:
        """Number (0: no update yet), length, checksum, and where the slot starts."""
        found = []
        for start in self.starts:
            magic, *header = HEADER.unpack(self.disk.read(start, HEADER.size))
            if magic == b"SLOT":
                found.append((*header, start))
        return max(found, default=(0, 0, 0, self.starts[1]))

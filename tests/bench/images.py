"""The files under the servers: made once by qemu-img, all in one folder that goes afterwards.

The bytes are random, so that neither a server nor nbdcopy can take a zero for a hole.
"""

import dataclasses
import mmap
import os
import pathlib

import peers
from bench.cases import MIB, Disk

SIZE_BYTES = 1024 * MIB


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    path: pathlib.Path
    format: str

    def settle(self) -> None:
        """Wait until the disk has it all: the next run starts with nothing to write back."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def warm(self) -> None:
        """Read it once, into the page cache."""
        with open(self.path, "rb", buffering=0) as file:
            while file.read(4 * MIB):
                pass


class Images:
    """The disks of one run, in `folder`: `raw` and `full` hold the same bytes at the start."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.raw = Image(folder / "full.raw", "raw")
        self.full = Image(folder / "full.qcow2", "qcow2")
        self._empty = Image(folder / "empty.qcow2", "qcow2")
        with open(self.raw.path, "wb") as file:
            for _ in range(SIZE_BYTES // MIB):
                file.write(os.urandom(MIB))
        peers.qemu_img("convert", "-f", "raw", "-O", "qcow2", self.raw.path, self.full.path)
        for image in (self.raw, self.full):
            image.settle()
            image.warm()

    def for_case(self, disk: Disk, *, raw: bool) -> Image:
        if disk is Disk.FULL:
            return self.raw if raw else self.full
        self._empty.path.unlink(missing_ok=True)
        peers.qemu_img("create", "-q", "-f", "qcow2", self._empty.path, str(SIZE_BYTES))
        claim_memory(SIZE_BYTES * 3 // 2)
        return self._empty


def claim_memory(nb_bytes: int) -> None:
    """Make the host back that much of a virtual machine's free memory, then free it again.

    Where the host takes idle memory back, the first server to fill the page cache would pay for
    getting it, up to 10 us a page: ten times what is measured here.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, nb_bytes, flags=flags).close()

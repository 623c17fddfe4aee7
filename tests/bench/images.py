"""The files under the servers: made by qemu-img when first asked for, in one folder that goes
afterwards.

The bytes are random, so that neither a server nor nbdcopy can take a zero for a hole.
"""

import dataclasses
import enum
import functools
import mmap
import os
import pathlib

import peers
from bench.cases import MIB, Disk

SIZE_BYTES = 1024 * MIB

# As `stat -f` calls them.  New kernels let O_DIRECT through there, where it means nothing.
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


class Copy(enum.Enum):
    """Which copy of the disk a contestant gets."""

    QCOW2 = "qcow2"
    RAW = "raw"  # whoever writes to it spoils it for nbdcopy's copy in: readers only
    DEVICE = "device"  # raw too; the client itself reads and writes it, with O_DIRECT


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

    def cool(self) -> None:
        """Out of the page cache with it; what is not on the disk yet stays, so settle first."""
        with open(self.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Images:
    """The disks of one run, in `folder`: all but the empty one hold the same bytes at the start."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._empty = Image(folder / "empty.qcow2", "qcow2")

    def for_case(self, disk: Disk, copy: Copy) -> Image:
        """The file for the next run, in the state that `disk` says.

        Raises `peers.PeerFailed` where O_DIRECT is wanted and the folder's file system has none.
        """
        if disk is Disk.EMPTY:
            return self._new()
        if disk is Disk.FULL and copy is not Copy.DEVICE:
            return self.raw if copy is Copy.RAW else self.full
        require_direct_io(self._folder)
        image = self.device if copy is Copy.DEVICE else self.uncached
        image.cool()
        return image

    @functools.cached_property
    def raw(self) -> Image:
        image = Image(self._folder / "full.raw", "raw")
        with open(image.path, "wb") as file:
            for _ in range(SIZE_BYTES // MIB):
                file.write(os.urandom(MIB))
        image.settle()
        image.warm()
        return image

    @functools.cached_property
    def full(self) -> Image:
        image = self._converted("full.qcow2", "qcow2")
        image.warm()
        return image

    # O_DIRECT has files of its own: it throws out of the page cache what it writes.

    @functools.cached_property
    def uncached(self) -> Image:
        return self._converted("uncached.qcow2", "qcow2")

    @functools.cached_property
    def device(self) -> Image:
        return self._converted("device.raw", "raw")

    def _converted(self, name: str, format: str) -> Image:
        image = Image(self._folder / name, format)
        peers.qemu_img("convert", "-f", "raw", "-O", format, self.raw.path, image.path)
        image.settle()
        return image

    def _new(self) -> Image:
        self._empty.path.unlink(missing_ok=True)
        peers.qemu_img("create", "-q", "-f", "qcow2", self._empty.path, str(SIZE_BYTES))
        claim_memory(SIZE_BYTES * 3 // 2)
        return self._empty


def require_direct_io(folder: pathlib.Path) -> None:
    """Raise `peers.PeerFailed` unless files there can do without the page cache."""
    kind = peers.run("stat", "--file-system", "--format=%T", folder).stdout.strip()
    probe = folder / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_DIRECT))
    except OSError:
        able = False
    else:
        able = kind not in IN_MEMORY
    finally:
        probe.unlink(missing_ok=True)
    if not able:
        raise peers.PeerFailed(
            f"{folder} is on {kind}, without O_DIRECT: set TMPDIR to a folder on a real disk, "
            "or choose other cases with --only")


def claim_memory(nb_bytes: int) -> None:
    """Make the host back that much of a virtual machine's free memory, then free it again.

    Where the host takes idle memory back, the first server to fill the page cache would pay for
    getting it, up to 10 us a page: ten times what is measured here.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, nb_bytes, flags=flags).close()

"""Where in a tree a node is, and what that means for the file it may be.

A tree is opened from the root down (opener.py). On the way to a node it is known what stands before
the names of its options in an error, who uses what is in it, and which files are above. From that
follow the lock that its file takes, and two refusals that images, which name files themselves,
make necessary: of a path that is too long, and of one that comes back to a file it already holds.
Such an image would never finish opening, or never finish reading.
"""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING, NamedTuple

import trio

from nbdserve.drivers.file import FileNode
from nbdserve.drivers.locks import PERMISSIONS, Permission, Role, is_being_rescued
from nbdserve.errors import ImageError, LockedError

if TYPE_CHECKING:
    from nbdserve.block.node import Leaf
    from nbdserve.blockdev import FileOptions
    from nbdserve.inherit import Effective

__all__ = ["MAX_CHAIN", "Place", "Use"]

# QEMU has no limit and fails on its stack at some thousands.
MAX_CHAIN = 200

# Seconds to wait for a lock, and for one that the guardian of a dead server holds.
PATIENCE = 0.2
RESCUE_PATIENCE = 30


class Use(enum.Enum):
    """What the nearest format below which a file is, or who reads a tree without one, does."""

    EXPORT = enum.auto()
    BACKING = enum.auto()
    FORMAT = enum.auto()
    DATA = enum.auto()


ROLES: dict[tuple[Use, bool], Role] = {
    (Use.EXPORT, False): Role.RAW_RW,
    (Use.EXPORT, True): Role.RAW_RO,
    (Use.BACKING, True): Role.RAW_BACKING,
    (Use.FORMAT, False): Role.FORMAT_RW,
    (Use.FORMAT, True): Role.FORMAT_RO,
    (Use.DATA, False): Role.DATA_FILE_RW,
    (Use.DATA, True): Role.DATA_FILE_RO,
}
"""(use, whether it only reads) -> the role that decides the file's lock."""


class Place(NamedTuple):
    """Where in the tree a node is, and for whom.

    path: what stands before its options' names; use, only_reads: of its data by who uses it;
    above: the host's files on the way to the root; depth: the nodes on it.
    """

    path: str
    use: Use
    only_reads: bool
    above: tuple[FileNode, ...] = ()
    depth: int = 0

    def file(self, use: Use, settings: Effective) -> Place:
        """The place of a node's file."""
        return self._replace(
            path=f"{self.path}file.",
            use=use,
            only_reads=settings.read_only,
            depth=self.depth + 1,
        )

    def data_file(self, file: Leaf, settings: Effective) -> Place:
        """The place of the data file of an image whose metadata is in `file`."""
        return Place(
            f"{self.path}data-file.",
            Use.DATA,
            settings.read_only,
            self._below(file),
            self.depth + 1,
        )

    def backing(self, file: Leaf) -> Place:
        """The place of the backing file of an image whose own data is in `file`."""
        return Place(
            f"{self.path}backing.", Use.BACKING, True, self._below(file), self.depth + 1
        )

    def _below(self, file: Leaf) -> tuple[FileNode, ...]:
        return (*self.above, file) if isinstance(file, FileNode) else self.above

    def check_depth(self, filename: str) -> None:
        """Raises ImageError: the path to here is too long."""
        if self.depth > MAX_CHAIN:
            raise ImageError(
                f"{filename}: the backing chain is longer than {MAX_CHAIN} images"
            )

    def check_is_new(self, file: FileNode) -> None:
        """Raises ImageError: the file that was opened for here is above already."""
        for above in self.above:
            if os.path.sameopenfile(above.fd, file.fd):
                if self.use is Use.DATA:
                    raise ImageError(f"{file.filename}: holds an image of this chain already")
                raise ImageError(f"{file.filename}: the backing chain is a loop")

    async def lock(self, file: FileNode, options: FileOptions, settings: Effective) -> None:
        """Take the lock that the use of a file calls for. Raises LockedError, ImageError.

        A server that was killed may still have I/O in flight, and a guardian work to do.
        """
        if options.locking == "off":
            return
        permissions, shared = PERMISSIONS[ROLES[self.use, self.only_reads]]
        started = trio.current_time()
        while True:
            try:
                return file.lock(permissions, Permission.ALL if settings.force_share else shared)
            except LockedError:
                patience = RESCUE_PATIENCE if is_being_rescued(file.fd) else PATIENCE
                if trio.current_time() - started > patience:
                    raise
            await trio.sleep(PATIENCE / 20)

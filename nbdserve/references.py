"""Which files an image may name: any, none, or those in a folder.

A qcow2 header can name two other files, a backing file and an external data file; the name of a
backing file can be a whole tree of further names (``json:``), and each of those images can name
more. Whoever made an image thereby reads, and with a data file writes, what the server may. QEMU
leaves it at that and so do we by default; those who take images from strangers refuse such images
beforehand (OpenStack: CVE-2015-5163, CVE-2024-32498). Here the user can have that, or say in which
folder the files must be.

It can put nothing into a tree but what QEMU puts there: filters that fail, lose or record what
passes, and those of users' own, are for users to name.

Law: every name from within an image passes here once, where it comes out of a header and before
anything is opened; nothing that the user has named does. So options that go in place of an image's
name, such as ``backing.file.filename``, are how to allow what is refused.

Symbolic links are followed before a path is judged, and again when it is opened. That keeps what
stands in an image from leading out of the folder, not somebody who changes links at that moment.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdserve.errors import ConfigError, ImageError
from nbdserve.imageopts import shown

if TYPE_CHECKING:
    from nbdserve.imageopts import Options

__all__ = ["ANY_FILE", "NO_FILE", "References", "parse_references"]

OPTION = "--image-refs"

DRIVERS = frozenset({"file", "host_device", "qcow2", "raw", "throttle"})
"""Those that a name from within an image may ask for."""


@dataclass(frozen=True, slots=True)
class References:
    """The files that images may name; `folder`: only those in it or below, None: all or none."""

    allowed: bool
    folder: str | None = None

    def check(self, name: str, options: Options) -> None:
        """Whether options that a name from within an image stands for may be used.

        :raises ImageError: they name a file, or a driver, that they may not.
        """
        for key, value in options.items():
            # The one option of drivers that names a file (blockdev.py, where other types than
            # strings are refused).
            option = key.rpartition(".")[2]
            if option == "filename" and isinstance(value, str):
                self._check_file(value)
            elif option == "driver" and isinstance(value, str) and value not in DRIVERS:
                raise ImageError(
                    f"{shown(name)}: {key}: no image may ask for the driver {shown(value)!r}",
                    errno.EPERM,
                )

    def _check_file(self, filename: str) -> None:
        if not self.allowed:
            raise ImageError(
                f"{shown(filename)}: images may name no other file ({OPTION}=none)", errno.EPERM
            )
        if self.folder is None:
            return
        folder, path = os.path.realpath(self.folder), os.path.realpath(filename)
        if os.path.commonpath([folder, path]) != folder:
            raise ImageError(
                f"{shown(filename)}: is not in {self.folder}, where {OPTION} wants it",
                errno.EPERM,
            )


ANY_FILE = References(allowed=True)
NO_FILE = References(allowed=False)


def parse_references(value: str) -> References:
    """What `any`, `none` or a folder's path allows. Raises ConfigError: it is none of these."""
    words = {"any": ANY_FILE, "none": NO_FILE}
    if value not in words and not os.path.isdir(value):
        raise ConfigError(f"{OPTION}: {value!r} is neither any nor none nor a folder")
    return words.get(value) or References(allowed=True, folder=value)

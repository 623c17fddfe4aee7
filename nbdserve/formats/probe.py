"""Guess an image's format from its first 512 bytes, as QEMU does.

Probing is a convenience with a trap: the first bytes of a raw image belong to the guest,
who can write there the header of another format, naming a backing file of his choice, and
be believed at the next start. Hence three rules, which are QEMU's (``bdrv_probe_all``,
``raw_open`` and ``raw_co_pwritev``):

- what carries another format's signature is never taken for raw;
- an image that was only *guessed* to be raw is served with a warning;
- and whoever serves it refuses a write that would put any signature into its first sector.

Everything here is a pure function of bytes. Signatures only: whether a qcow2 header makes
sense is for the qcow2 driver to say, which has better words for it.
"""

from __future__ import annotations

import re

from nbdserve.errors import ImageError

PROBE_SIZE = 512
"""Bytes from the start of the image that decide (QEMU's ``BLOCK_PROBE_BUF_SIZE``)."""

RAW_PROBED_WARNING = (
    "{filename}: no format was given and it has the signature of none, so it is served as raw;"
    " because a guest could forge a signature, writes that put one into the first 512 bytes"
    " will fail; use -f raw to allow them"
)
"""For ``str.format(filename=...)``, when an image to be written to was guessed to be raw."""

_BOCHS = {0: b"Bochs Virtual HD Image\0", 32: b"Redolog\0", 48: b"Growing\0"}
_CLOOP_SCRIPT = (
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
)

_SIGNATURES: tuple[tuple[str, dict[int, bytes]], ...] = (
    # Version 1 is another format; any other is qcow2, if perhaps one that does not exist yet.
    ("qcow", {0: b"QFI\xfb\0\0\0\x01"}),
    ("qcow2", {0: b"QFI\xfb"}),
    ("qed", {0: b"QED\0"}),
    ("vdi", {64: b"\x7f\x10\xda\xbe"}),
    ("vhdx", {0: b"vhdxfile"}),
    ("vpc", {0: b"conectix"}),
    # Version 1 only: QEMU takes LUKS 2 for raw data, which is the guest's to decrypt.
    ("luks", {0: b"LUKS\xba\xbe\0\x01"}),
    ("parallels", {0: b"WithoutFreeSpace\x02\0\0\0"}),
    ("parallels", {0: b"WithouFreSpacExt\x02\0\0\0"}),
    ("bochs", _BOCHS | {64: b"\0\0\x01\0"}),
    ("bochs", _BOCHS | {64: b"\0\0\x02\0"}),
    ("vmdk", {0: b"KDMV"}),
    ("vmdk", {0: b"COWD"}),
    ("cloop", {0: _CLOOP_SCRIPT}),
)
"""(format, what must be where in the file, by byte offset); the first that fits counts.

The facts are those of the ``*_probe`` functions of QEMU's block/*.c, all numbers in the
byte order they have on disk.
"""

_VMDK_DESCRIPTOR = rb"(?:#[^\n]*\n| +\r?\n)*version=[123]\r?\n"
"""A VMDK can also be a text file: comments and lines of blanks, then the version."""


def probe_format(first_bytes: bytes, filename: str) -> str:
    """The format to open an image with when the user named none: "qcow2" or "raw".

    :param first_bytes: the first PROBE_SIZE bytes, or all of a shorter image.
    :param filename: for the error; QEMU also takes any ``*.dmg`` for that format.
    :raises ImageError: it has the signature of a format that nbdserve does not serve.
    """
    name = looks_like_format(first_bytes)
    if name is None and first_bytes and len(filename) > 4 and filename.endswith(".dmg"):
        name = "dmg"
    if name is None:
        return "raw"
    if name == "qcow2":
        return name
    raise ImageError(
        f"{filename}: looks like an image in {name} format, which nbdserve does not serve;"
        " use -f raw to serve its bytes as they are"
    )


def looks_like_format(first_sector: bytes) -> str | None:
    """The format whose signature these bytes carry; None if they can pass for raw data.

    A raw node whose format was guessed calls this for every write that touches the first
    PROBE_SIZE bytes, with the sector as it would become, and fails the write with EPERM if
    there is an answer (``raw_co_pwritev``). Zeroes and discards need no check.
    """
    sector = first_sector[:PROBE_SIZE]
    for name, parts in _SIGNATURES:
        if all(sector.startswith(magic, offset) for offset, magic in parts.items()):
            return name
    return "vmdk" if re.match(_VMDK_DESCRIPTOR, sector) else None

"""Sizes as people type them: "512", "64k", "1.5G".

The spelling is qemu-img's (follows ``qemu_strtosz`` in util/cutils.c), so that a size copied from
a command line or a manual means the same number of bytes here. Powers of 1024 throughout. The
arithmetic is exact: QEMU multiplies the fraction as a floating point number, we do not, and both
drop what is left below one byte.
"""

from __future__ import annotations

import re

from nbdserve.errors import ConfigError

__all__ = ["MAX_SIZE", "parse_size"]

MAX_SIZE = 2**63 - 1
"""The largest size in bytes: file offsets are signed 64-bit numbers."""

_UNITS = {suffix: 1 << 10 * power for power, suffix in enumerate("bkmgtpe")}

# At most twenty digits each, which is more than 2**63 needs: int() is never handed a megabyte.
_DECIMAL = re.compile(
    r"\s*\+?(?P<whole>[0-9]{1,20})(?:\.(?P<fraction>[0-9]{0,20}))?(?P<suffix>[bkmgtpe]?)",
    re.IGNORECASE | re.ASCII,
)
_HEXADECIMAL = re.compile(r"\s*\+?0x[0-9a-f]{1,16}", re.IGNORECASE | re.ASCII)


def parse_size(text: str, option: str = "size") -> int:
    """The number of bytes that `text` says, as qemu-img reads it.

    A decimal number with at most one suffix out of b, k, M, G, T, P, E (either case; none is b);
    a fraction needs a suffix that gives it a meaning. Or a hexadecimal number, which takes no
    suffix, because b and e are digits there.

    :param option: what the size is for; the error names it.
    :raises ConfigError: not a size, or not between 0 and MAX_SIZE.
    """
    size = _bytes(text)
    if size is None:
        raise ConfigError(
            f"{option}: {text!r} is not a size; write a number of bytes,"
            " or a number with one of the suffixes b, k, M, G, T, P, E"
        )
    if size > MAX_SIZE:
        raise ConfigError(f"{option}: {text!r} is more than {MAX_SIZE} bytes")
    return size


def _bytes(text: str) -> int | None:
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    unit = _UNITS[match["suffix"].lower() or "b"]
    fraction = match["fraction"] or ""
    if fraction.strip("0") and unit == 1:
        return None
    below_unit: int = int(fraction or "0") * unit // 10 ** len(fraction)
    return int(match["whole"]) * unit + below_unit

"""``--throttle``: limits as people type them, ``bps-total=1M,iops-read=100,iops-read-max=500``.

The keys are QEMU's, with or without the ``throttling.`` that ``-drive`` wants before them, so that
a command line can be carried over. Values in bytes take the suffixes of every size here; numbers
of operations and of seconds are plain numbers. Rules that tie values together are config.py's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from nbdserve.config import RateLimit, ThrottleConfig, ThrottleLimits
from nbdserve.errors import ConfigError, naming
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nbdserve.imageopts import Scalar

__all__ = ["limits_of", "parse_throttle"]

OPTION = "--throttle"

RATES = tuple(name for name, _ in ThrottleLimits().rates())

# What a key's end says of the limit that its beginning names; the order tells which end is meant.
ENDS = {"-max-length": "length", "-max": "maximum", "": "average"}

_NUMBER = re.compile(r"\+?[0-9]{1,20}", re.ASCII)


def parse_throttle(values: Iterable[str]) -> ThrottleConfig | None:
    """The throttle that all ``--throttle`` of a command line stand for together; None without any.

    ``group`` names the limits' group: one of --object, or one of its own.

    :raises ConfigError: an unknown key, one given twice, a value that is none, or values that
        contradict each other.
    """
    with naming(OPTION):
        pairs: dict[str, Scalar] = {}
        for text in values:
            for item in text.split(","):
                key, separator, value = item.partition("=")
                key = key.removeprefix("throttling.")
                if not separator:
                    raise ConfigError(f"{item!r} is not KEY=VALUE")
                if key in pairs:
                    raise ConfigError(f"{key} is given twice")
                pairs[key] = value
        if not pairs:
            return None
        group = pairs.pop("group", None)
        return ThrottleConfig(limits_of(pairs), None if group is None else str(group))


def limits_of(pairs: Mapping[str, Scalar]) -> ThrottleLimits:
    """Limits by QEMU's names. Raises ConfigError, as `parse_throttle`."""
    rates: defaultdict[str, dict[str, int]] = defaultdict(dict)
    iops_size = 0
    for key, text in pairs.items():
        if key == "iops-size":
            iops_size = _value(key, text, in_bytes=True)
            continue
        rate, part = _split(key)
        in_bytes = rate.startswith("bps") and part != "length"
        rates[rate.replace("-", "_")][part] = _value(key, text, in_bytes=in_bytes)
    limits = {name: RateLimit(**parts) for name, parts in rates.items()}
    return ThrottleLimits(**limits, iops_size=iops_size)


def _split(key: str) -> tuple[str, str]:
    """The limit that a key is about, and the field of it."""
    for end, part in ENDS.items():
        rate = key.removesuffix(end)
        if key.endswith(end) and rate in RATES:
            return rate, part
    known = ", ".join(RATES)
    raise ConfigError(
        f"unknown key {key!r}; known are {known}, each also with -max and -max-length,"
        " and iops-size"
    )


def _value(key: str, value: Scalar, *, in_bytes: bool) -> int:
    text = str(value)
    if text.strip().startswith("-"):
        raise ConfigError(f"{key}: {text} is negative")
    if in_bytes:
        return parse_size(text, key)
    if not _NUMBER.fullmatch(text):
        raise ConfigError(f"{key}: {text!r} is not a number")
    return int(text)

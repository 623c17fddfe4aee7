"""``--object throttle-group,id=g0,x-iops-total=100``: objects that block nodes refer to by name.

One kind exists here, the throttle group. Its limits are written as in QEMU: ``limits.iops-total``
or, older, ``x-iops-total``; or the whole as JSON, ``{"qom-type": "throttle-group", "id": ...}``.
Unlike QEMU, which takes plain numbers only, bytes may have the suffixes of every size here.

Follows user_creatable_parse_str and keyval_parse, and ThrottleGroupProperties of qapi/qom.json.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nbdserve.cli.throttle import limits_of
from nbdserve.errors import ConfigError, naming
from nbdserve.imageopts import parse_json_name, parse_keyval

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbdserve.config import ThrottleLimits
    from nbdserve.imageopts import Options

__all__ = ["parse_objects"]

OPTION = "--object"

KIND = "throttle-group"

# Where the limits are; what is before the name of each.
PREFIXES = ("limits.", "x-")

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


def parse_objects(values: Iterable[str]) -> dict[str, ThrottleLimits]:
    """The throttle groups of a command line by their ids, each with its limits.

    :raises ConfigError: another kind of object, an id that is none or given twice, limits that
        contradict each other.
    """
    groups: dict[str, ThrottleLimits] = {}
    for text in values:
        with naming(OPTION):
            name, limits = _group(text)
            if name in groups:
                raise ConfigError(f"id: {name!r} is given twice")
            groups[name] = limits
    return groups


def _group(text: str) -> tuple[str, ThrottleLimits]:
    options = parse_json_name(text) if text.startswith("{") else parse_keyval(text, "qom-type")
    kind = options.pop("qom-type", None)
    if kind != KIND:
        raise ConfigError(f"{kind!r} is not supported, only {KIND}")
    name = options.pop("id", None)
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise ConfigError(
            f"id: {name!r} is not a name: letters, digits and - . _ after a first letter"
        )
    limits: Options = {}
    for key, value in options.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            raise ConfigError(f"{key}: {KIND} has no such property")
        limit = key.removeprefix(prefix)
        if limit in limits:
            raise ConfigError(f"{limit} is given twice")
        limits[limit] = value
    return name, limits_of(limits)

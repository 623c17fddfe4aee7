"""What a node does with options that were not given to it: the rules by which they are inherited.

A pure function per kind of parent. A node's own options always win; what is missing comes

- at the root from the command line, that is, from flags such as --cache, --read-only and --discard
  (update_options_from_flags; bdrv_parse_discard_flags for an option that overrides the flag);
- at a child from the node above it (bdrv_inherited_options), by its role there.

Everything but a backing file inherits read-only; a backing file is read-only unless it says
otherwise, and is refused then, as nothing writes to one here. `discard` is not inherited: the node
above has already decided what it passes on, so below it everything may be unmapped. Neither is
`detect-zeroes`: once is enough, at the root. The I/O engine goes down to every file that names no
own (BDRV_O_NATIVE_AIO and BDRV_O_IO_URING are flags, and flags go down).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.blockdev import Aio, DetectZeroes, Discard, NodeOptions

__all__ = ["ChildRole", "Effective", "child_settings", "root_settings"]


class ChildRole(enum.Enum):
    """What a child is to its parent (BdrvChildRole)."""

    FILE = enum.auto()
    """What a format stores everything, or its data alone, in; or what a filter filters."""
    BACKING = enum.auto()
    """What an image reads where it has nothing of its own (BDRV_CHILD_COW)."""


@dataclass(frozen=True, slots=True)
class Effective:
    """How a node is opened. `aio` None: the fastest engine that is correct."""

    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    direct: bool = False
    no_flush: bool = False
    discard: Discard = "ignore"
    detect_zeroes: DetectZeroes = "off"
    aio: Aio | None = None


GIVEN = tuple(field.name for field in fields(Effective) if field.name != "aio")
"""The settings that are options of every node; the engine is one of files only."""


def root_settings(options: NodeOptions, flags: Effective, path: str = "") -> Effective:
    """Settings of a root, whose `flags` are the command line's.

    :param path: what stands before an option's name in an error.
    :raises ConfigError: settings that exclude each other.
    """
    return _resolve(options, flags, path)


def child_settings(
    options: NodeOptions, parent: Effective, role: ChildRole, path: str
) -> Effective:
    """Settings of a child. Raises ConfigError, as `root_settings`; or if the parent could not work
    with such a child."""
    is_backing = role is ChildRole.BACKING
    defaults = Effective(
        read_only=is_backing or parent.read_only,
        auto_read_only=not is_backing and parent.auto_read_only,
        force_share=parent.force_share,
        direct=parent.direct,
        no_flush=parent.no_flush,
        discard="unmap",
        aio=parent.aio,
    )
    settings = _resolve(options, defaults, path)
    if settings.auto_read_only and parent.read_only:
        settings = replace(settings, read_only=True)
    if is_backing and not settings.read_only:
        raise ConfigError(f"{path}read-only=off: nothing here writes to a backing file")
    if settings.detect_zeroes != "off":
        raise ConfigError(f"{path}detect-zeroes: only the uppermost node looks for zeroes")
    if settings.read_only and not defaults.read_only:
        raise ConfigError(f"{path}read-only=on: the node above is not read-only and writes to it")
    return settings


def _resolve(options: NodeOptions, defaults: Effective, path: str) -> Effective:
    values = {name: getattr(options, name) for name in GIVEN}
    given = {name: value for name, value in values.items() if value is not None}
    settings = replace(defaults, **given)
    if settings.force_share and not settings.read_only:
        raise ConfigError(f"{path}force-share=on needs read-only=on")
    if settings.detect_zeroes == "unmap" and settings.discard != "unmap":
        raise ConfigError(f"{path}detect-zeroes=unmap needs {path}discard=unmap")
    return settings

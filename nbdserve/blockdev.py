"""What is asked of each node of a tree: options as typed values, one class per driver.

From imageopts.py's flat dict, whose keys are strings, to frozen dataclasses in which every name is
known and every value has its type. None means that an option was not given: what it then is
depends on the node above (inherit.py) or on the image (a backing file, a format to be probed), and
only graph.py, which opens nodes, sees both. Nothing here opens a file.

An option that a driver does not have is refused by its name. That covers options of QEMU's drivers
that have no counterpart here: to accept one is to promise what it does.

Names, types and defaults follow bdrv_runtime_opts (block.c) and the runtime options of
block/qcow2.c, block/raw-format.c, block/file-posix.c and block/throttle.c.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nbdserve.errors import ConfigError, ImageError
from nbdserve.faults import parse_faults
from nbdserve.imageopts import Options, options_of_name
from nbdserve.optionreader import OptionReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdserve.block.filter import FilterNode
    from nbdserve.faults import Fault
    from nbdserve.imageopts import Scalar
    from nbdserve.powercut.content import Content

__all__ = [
    "AIO_MODES",
    "DETECT_ZEROES_MODES",
    "DISCARD_MODES",
    "FORMATS",
    "Aio",
    "CustomOptions",
    "DetectZeroes",
    "Discard",
    "FaultOptions",
    "FileOptions",
    "FilterOptions",
    "MemoryOptions",
    "NodeOptions",
    "PowerCutOptions",
    "ProbedOptions",
    "Qcow2Options",
    "RawOptions",
    "ThrottleOptions",
    "image_tree",
    "named_tree",
    "parse_node",
]

N = TypeVar("N", bound="NodeOptions")

Aio = Literal["threads", "io_uring", "native"]
DetectZeroes = Literal["off", "on", "unmap"]
Discard = Literal["ignore", "unmap"]
FileDriver = Literal["file", "host_device"]
Locking = Literal["auto", "on", "off"]

DISCARD_MODES: dict[str, Discard] = {
    "ignore": "ignore",
    "off": "ignore",
    "unmap": "unmap",
    "on": "unmap",
}
"""Every spelling of a discard mode (follows ``bdrv_parse_discard_flags``)."""

DETECT_ZEROES_MODES: dict[str, DetectZeroes] = {"off": "off", "on": "on", "unmap": "unmap"}
AIO_MODES: dict[str, Aio] = {"threads": "threads", "io_uring": "io_uring", "native": "native"}
LOCKING_MODES: dict[str, Locking] = {"auto": "auto", "on": "on", "off": "off"}

FORMATS = ("qcow2", "raw")
"""The drivers that probing can find, and that a format may name."""

_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)
MAX_NODE_NAME = 31
"""Bytes; QEMU keeps node names in 32 bytes."""

SECTOR = 512

MIN_REFCOUNT_CACHE = 256 << 10
"""Bytes of a cache-size that go to refcounts: four blocks of 64 KiB (MIN_REFCOUNT_CACHE_SIZE)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """What every node takes, whatever its driver. `direct` and `no_flush` are cache.direct and
    cache.no-flush; `auto_read_only`: a file is opened read-only if the node above only reads."""

    node_name: str | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    direct: bool | None = None
    no_flush: bool | None = None
    discard: Discard | None = None
    detect_zeroes: DetectZeroes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions(NodeOptions):
    """A host file. `driver` None: file or host_device, whichever it is. `aio` None: the server's.
    locking: auto and on are one here, off takes no locks and looks for none."""

    filename: str
    driver: FileDriver | None = None
    aio: Aio | None = None
    locking: Locking = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions(NodeOptions):
    """A leaf in memory, which begins with a copy of this content; no name asks for it. `filename`:
    what it is called."""

    content: Content
    filename: str = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawOptions(NodeOptions):
    """A window of `size` bytes at `offset` in the child; size None: to its end."""

    file: NodeOptions
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2Options(NodeOptions):
    """A qcow2 image. `backing`: options for the backing file, which go before what the image says;
    empty: only the image is asked; None: there is none, whatever the image says. They stay a dict
    because what they lack is in the image's header. `data_file`, whole, goes before what the image
    says; None: the image is asked. Cache sizes in bytes, None: the default."""

    file: NodeOptions
    data_file: NodeOptions | None = None
    backing: Options | None = field(default_factory=dict)
    l2_cache_size: int | None = None
    refcount_cache_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions(NodeOptions):
    """A filter, which stands on `file` and may be above a format or below one."""

    file: NodeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleOptions(FilterOptions):
    """The filter that limits what passes, by the limits of a group."""

    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOptions(FilterOptions):
    """The filter whose requests fail. `room`: bytes of new space that are left; None: no end."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    room: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerCutOptions(FilterOptions):
    """The filter that logs what passes, for power cuts. All of a tree have one log, so what one of
    them says of it holds for all; None: the others say. `log`: a file that it is streamed to."""

    history: bool | None = None
    log: str | None = None
    max_data: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomOptions(FilterOptions):
    """A filter of a user's own: its class, and the arguments that it is called with."""

    kind: type[FilterNode]
    arguments: dict[str, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedOptions(NodeOptions):
    """An image whose format the file tells. `rest`: all options but those of the file, to be read
    once the driver is known; `path` as in `parse_node`."""

    file: NodeOptions
    rest: Options
    path: str

    def of_format(self, driver: str) -> NodeOptions:
        """The options for the driver that was found. Raises ConfigError: it does not have them."""
        return PARENTS[driver](OptionReader(self.rest, self.path), self.file)


def parse_node(options: Mapping[str, Scalar], path: str = "") -> NodeOptions:
    """A node and all below it.

    :param path: what stands before an option's name in an error, for example "backing.".
    :raises ConfigError: unknown, missing or contradictory options, or values of a wrong type.
    """
    return _node(options, path, is_child=False)


def image_tree(name: str, image_format: str | None, *, directory: str = "") -> NodeOptions:
    """The tree that an image's name stands for, and the name of its format.

    `directory` as in `options_of_name`. Raises as it does, and as `named_tree`.
    """
    return named_tree(name, options_of_name(name, directory), image_format)


def named_tree(
    name: str,
    options: Options,
    image_format: str | None,
    *,
    given: Mapping[str, Scalar] | None = None,
    path: str = "",
) -> NodeOptions:
    """The tree that the options of an image's name stand for.

    A format goes before one that a json: name says, and options that are `given` go before both
    (bdrv_open_backing_file). `path` as in `parse_node`.

    :raises ImageError: a format that there is not.
    :raises ConfigError: as `parse_node`.
    """
    if image_format is not None:
        if image_format not in FORMATS:
            file = options.get("file.filename", name)
            known = ", ".join(FORMATS)
            raise ImageError(f"{file}: unknown format {image_format!r}; known are {known}")
        options = {**options, "driver": image_format}
    return parse_node({**options, **(given or {})}, path)


def _node(options: Mapping[str, Scalar], path: str, *, is_child: bool) -> NodeOptions:
    """`is_child`: without a driver it is a host file, not an image to probe (bdrv_inherited_options
    sets BDRV_O_PROTOCOL for the child of a format)."""
    reader = OptionReader(options, path)
    driver = reader.text("driver")
    if driver in FILE_DRIVERS or (driver is None and is_child):
        return _file(reader, FILE_DRIVERS[driver] if driver else None)
    custom = None if driver is None or driver in PARENTS else _find_filter(driver)
    if driver is not None and driver not in PARENTS and custom is None:
        known = ", ".join([*PARENTS, *FILE_DRIVERS])
        raise ConfigError(f"{path}driver: unknown driver {driver!r}; known are {known}")
    below = reader.child("file")
    if not below:
        alternative = f"{path}driver or " if driver is None else ""
        raise ConfigError(f"{alternative}{path}file.filename must be given")
    file = _node(below, f"{path}file.", is_child=True)
    if custom is not None:
        return _custom(reader, file, custom)
    if driver is not None:
        return PARENTS[driver](reader, file)
    rest = reader.left()
    return ProbedOptions(file=file, rest=rest, path=path, **_common(reader))


def _file(reader: OptionReader, driver: FileDriver | None) -> FileOptions:
    filename = reader.text("filename")
    if not filename:
        raise ConfigError(f"{reader.path}filename must be given")
    return _finish(
        reader,
        FileOptions,
        driver or "file",
        filename=filename,
        driver=driver,
        aio=reader.choice("aio", AIO_MODES),
        locking=reader.choice("locking", LOCKING_MODES) or "auto",
    )


def _raw(reader: OptionReader, file: NodeOptions) -> RawOptions:
    offset, size = reader.size("offset") or 0, reader.size("size")
    if size is not None and size % SECTOR:
        raise ConfigError(f"{reader.path}size: {size} is not a multiple of {SECTOR}")
    return _finish(reader, RawOptions, "raw", file=file, offset=offset, size=size)


def _qcow2(reader: OptionReader, file: NodeOptions) -> Qcow2Options:
    l2, refcount = _cache_sizes(reader)
    data_file = reader.child("data-file")
    return _finish(
        reader,
        Qcow2Options,
        "qcow2",
        file=file,
        data_file=_node(data_file, f"{reader.path}data-file.", is_child=True)
        if data_file
        else None,
        backing=reader.child("backing", nullable=True),
        l2_cache_size=l2,
        refcount_cache_size=refcount,
    )


def _cache_sizes(reader: OptionReader) -> tuple[int | None, int | None]:
    """(L2, refcount) in bytes; cache-size is the sum of both (follows ``read_cache_sizes``)."""
    names = ("cache-size", "l2-cache-size", "refcount-cache-size")
    total, l2, refcount = (reader.size(name) for name in names)
    if total is None:
        return l2, refcount
    path = reader.path
    if l2 is not None and refcount is not None:
        raise ConfigError(f"{path}{', '.join(names)} cannot all be set: one is the sum of the two")
    for name, part in zip(names[1:], (l2, refcount), strict=True):
        if part is not None and part > total:
            raise ConfigError(f"{path}{name}: {part} is more than cache-size, {total}")
    if l2 is not None:
        return l2, total - l2
    refcount = min(refcount if refcount is not None else MIN_REFCOUNT_CACHE, total)
    return total - refcount, refcount


def _throttle(reader: OptionReader, file: NodeOptions) -> ThrottleOptions:
    group = reader.text("throttle-group")
    if not group:
        raise ConfigError(f"{reader.path}throttle-group must be given")
    return _finish(reader, ThrottleOptions, "throttle", file=file, group=group)


def _fault(reader: OptionReader, file: NodeOptions) -> FaultOptions:
    if reader.text("faults") is not None:
        raise ConfigError(f"{reader.path}faults: it is a list, as {reader.path}faults.0.error=EIO")
    return _finish(
        reader,
        FaultOptions,
        "fault",
        file=file,
        faults=parse_faults(reader.child("faults") or {}, f"{reader.path}faults."),
        seed=reader.integer("seed") or 0,
        room=reader.size("room"),
    )


def _power_cut(reader: OptionReader, file: NodeOptions) -> PowerCutOptions:
    path = reader.text("log")
    if path == "":
        raise ConfigError(f"{reader.path}log: the path is empty")
    return _finish(
        reader,
        PowerCutOptions,
        "power-cut",
        file=file,
        history=reader.boolean("history"),
        log=path,
        max_data=reader.size("max-data"),
    )


def _find_filter(driver: str) -> type[FilterNode] | None:
    from nbdserve.block.filter import find_filter  # imports trio, and is seldom needed

    return find_filter(driver)


def _custom(reader: OptionReader, file: NodeOptions, kind: type[FilterNode]) -> CustomOptions:
    common = _common(reader)
    arguments = {key.replace("-", "_"): value for key, value in reader.left().items()}
    try:
        inspect.signature(kind).bind(None, **arguments)
    except TypeError as error:
        raise ConfigError(f"{reader.path}driver={kind.driver}: {error}") from None
    return CustomOptions(file=file, kind=kind, arguments=arguments, **common)


FILE_DRIVERS: dict[str, FileDriver] = {"file": "file", "host_device": "host_device"}
PARENTS: dict[str, Callable[[OptionReader, NodeOptions], NodeOptions]] = {
    "qcow2": _qcow2,
    "raw": _raw,
    "throttle": _throttle,
    "fault": _fault,
    "power-cut": _power_cut,
}
"""Drivers that stand on another node, by name."""


def _finish(reader: OptionReader, kind: type[N], driver: str, /, **fields: Any) -> N:  # noqa: ANN401
    """The node, once all its own options were taken. Raises ConfigError for what is left."""
    node = kind(**fields, **_common(reader))
    for key in reader.left():
        raise ConfigError(f"{reader.path}{key}: the driver {driver} has no such option")
    return node


def _common(reader: OptionReader) -> dict[str, Any]:
    """The fields of NodeOptions."""
    name = reader.text("node-name")
    if name is not None:
        _check_node_name(f"{reader.path}node-name", name)
    return {
        "node_name": name,
        "read_only": reader.boolean("read-only"),
        "auto_read_only": reader.boolean("auto-read-only"),
        "force_share": reader.boolean("force-share"),
        "direct": reader.boolean("cache.direct"),
        "no_flush": reader.boolean("cache.no-flush"),
        "discard": reader.choice("discard", DISCARD_MODES),
        "detect_zeroes": reader.choice("detect-zeroes", DETECT_ZEROES_MODES),
    }


def _check_node_name(option: str, name: str) -> None:
    """Follows id_wellformed and bdrv_assign_node_name."""
    if not _NODE_NAME.fullmatch(name):
        raise ConfigError(
            f"{option}: {name!r} is not a name: letters, digits and - . _ after a first letter"
        )
    if len(name) > MAX_NODE_NAME:
        raise ConfigError(f"{option}: {name!r} is longer than {MAX_NODE_NAME} characters")

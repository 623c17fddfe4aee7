"""What to serve and how, as values: the border between strings and the server.

The command line (cli/) is the only place that parses strings; everything behind
it receives these frozen dataclasses and may rely on them being complete and
consistent: each class checks, when made, the rules that tie its own fields
together and raises ConfigError naming the option. Nothing here opens a file,
binds a socket or knows a driver, so a configuration can be made, compared and
printed in a test without a machine around it.

Names and meanings are QEMU's (docs/interop/qemu-nbd, block/ `bdrv_parse_cache_mode`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from nbdserve.blockdev import Aio, DetectZeroes, Discard, NodeOptions, image_tree
from nbdserve.errors import ConfigError
from nbdserve.inherit import Effective, root_settings
from nbdserve.references import ANY_FILE, References

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nbdserve.faults import Fault

DEFAULT_PORT = 10809
"""The port IANA assigned to NBD."""

MAX_NAME = 4096
"""Longest export name or description in bytes of UTF-8 (NBD protocol, "Values": string limits)."""


@dataclass(frozen=True, slots=True)
class CacheMode:
    """One of QEMU's cache modes, and the three properties it stands for.

    ``direct`` (host file opened with O_DIRECT) and ``no_flush`` (a flush stops at the
    OS) belong to nodes; ``writeback`` (a write may be answered before it is durable,
    WCE) belongs to the BlockBackend.
    """

    name: str
    direct: bool
    no_flush: bool
    writeback: bool


CACHE_MODES: dict[str, CacheMode] = {
    mode.name: mode
    for mode in (
        CacheMode("writeback", direct=False, no_flush=False, writeback=True),
        CacheMode("none", direct=True, no_flush=False, writeback=True),
        CacheMode("writethrough", direct=False, no_flush=False, writeback=False),
        CacheMode("directsync", direct=True, no_flush=False, writeback=False),
        CacheMode("unsafe", direct=False, no_flush=True, writeback=True),
    )
}
"""The modes by their name on the command line (follows ``bdrv_parse_cache_mode``)."""


CACHE_AUTO = CacheMode("auto", direct=True, no_flush=False, writeback=True)
"""As none where io_uring and O_DIRECT are to be had for all files, else as writeback (graph.py)."""


MAX_LIMIT = 10**15
"""Largest value of a throttle's limits, and of a maximum times its length (THROTTLE_VALUE_MAX)."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What may go in a second: ``average`` in the long run, ``maximum`` in a burst, which lasts
    ``length`` seconds. In bytes or operations; 0 is no limit, and no burst of its own."""

    average: int = 0
    maximum: int = 0
    length: int = 1


@dataclass(frozen=True, slots=True)
class ThrottleLimits:
    """All limits of a throttle. ``iops_size``: one operation of more bytes counts as several.

    Names, meanings and rules are QEMU's (ThrottleLimits of qapi/block-core.json,
    ``throttle_is_valid``).
    """

    bps_total: RateLimit = RateLimit()
    bps_read: RateLimit = RateLimit()
    bps_write: RateLimit = RateLimit()
    iops_total: RateLimit = RateLimit()
    iops_read: RateLimit = RateLimit()
    iops_write: RateLimit = RateLimit()
    iops_size: int = 0

    def rates(self) -> list[tuple[str, RateLimit]]:
        """(option, limit) of the six, the total of each unit first."""
        names = [field.name for field in fields(self) if field.name != "iops_size"]
        return [(name.replace("_", "-"), getattr(self, name)) for name in names]

    def options(self) -> dict[str, int]:
        """The options that say the same, without those that have their defaults."""
        found: dict[str, int] = {}
        for name, limit in self.rates():
            length = limit.length if limit.length != 1 else 0
            found |= {name: limit.average, f"{name}-max": limit.maximum}
            found |= {f"{name}-max-length": length}
        found["iops-size"] = self.iops_size
        return {name: value for name, value in found.items() if value}

    def __post_init__(self) -> None:
        for name, limit in self.rates():
            _check_rate(name, limit)
        for unit in ("bps", "iops"):
            total, *parts = (pair for pair in self.rates() if pair[0].startswith(unit))
            for name, limit in parts:
                if total[1].average and limit.average:
                    raise ConfigError(
                        f"{total[0]} and {name} cannot both be set:"
                        " the total counts reads and writes already"
                    )
        _check_range("iops-size", self.iops_size)
        if self.iops_size and not any(
            limit.average for name, limit in self.rates() if name.startswith("iops")
        ):
            raise ConfigError("iops-size needs iops-total, iops-read or iops-write")


def _check_range(name: str, value: int) -> None:
    if value < 0:
        raise ConfigError(f"{name}: {value} is negative")
    if value > MAX_LIMIT:
        raise ConfigError(f"{name}: {value} is more than {MAX_LIMIT}")


def _check_rate(name: str, limit: RateLimit) -> None:
    """The rules within one limit, in an order that names what is missing first."""
    _check_range(name, limit.average)
    _check_range(f"{name}-max", limit.maximum)
    if limit.length < 1:
        raise ConfigError(f"{name}-max-length: {limit.length} is less than 1 second")
    if limit.length > 1 and not limit.maximum:
        raise ConfigError(f"{name}-max-length needs {name}-max")
    if limit.maximum and not limit.average:
        raise ConfigError(f"{name}-max needs {name}")
    if limit.maximum and limit.maximum < limit.average:
        raise ConfigError(
            f"{name}-max: {limit.maximum} is below {name}, {limit.average}"
        )
    if limit.maximum * limit.length > MAX_LIMIT:
        raise ConfigError(
            f"{name}-max-length: {limit.length} seconds of {limit.maximum} are"
            f" more than {MAX_LIMIT}"
        )


@dataclass(frozen=True, slots=True)
class ThrottleConfig:
    """Limits, and the name of the group they are shared in; None: they are not shared.

    A group without limits here takes those that another member set; else the last set win.
    """

    limits: ThrottleLimits = ThrottleLimits()
    group: str | None = None

    def __post_init__(self) -> None:
        if self.group == "":
            raise ConfigError("the group's name is empty")
        if self.group is None and not self.limits.options():
            raise ConfigError("no limit is given")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The image to open, and the window of it to serve.

    ``filename`` and ``format`` (a driver's name, None to probe) stand for a tree of nodes;
    ``options`` give the tree node by node, and ``filename`` is then what the image is called.
    What else is here is for the nodes that have no such option of their own; ``aio`` None is the
    fastest I/O engine that is correct. ``offset`` is in bytes: the served disk begins there in
    the guest's disk. ``references``: the files that images may name themselves. ``faults``: what
    goes wrong with the disk as it is served, above all nodes.
    """

    filename: str
    format: str | None = None
    read_only: bool = False
    cache: CacheMode = CACHE_MODES["writeback"]
    discard: Discard = "unmap"
    detect_zeroes: DetectZeroes = "off"
    offset: int = 0
    aio: Aio | None = None
    throttle: ThrottleConfig | None = None
    force_share: bool = False
    options: NodeOptions | None = None
    references: References = ANY_FILE
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if not self.filename:
            raise ConfigError("the image's file name is empty")
        if "\0" in self.filename:
            raise ConfigError(f"the image's file name {self.filename!r} contains a NUL byte")
        if self.offset < 0:
            raise ConfigError(f"--offset: {self.offset} is negative")
        if self.options is not None and self.format is not None:
            raise ConfigError("a format cannot be given beside the image's options")
        root_settings(self.tree, self.flags)

    @property
    def tree(self) -> NodeOptions:
        """What is asked of the uppermost node and all below it."""
        return self.options or image_tree(self.filename, self.format)

    @property
    def flags(self) -> Effective:
        """What the uppermost node does where its own options say nothing."""
        return Effective(
            read_only=self.read_only,
            force_share=self.force_share,
            direct=self.cache.direct,
            no_flush=self.cache.no_flush,
            discard=self.discard,
            detect_zeroes=self.detect_zeroes,
            aio=self.aio,
        )


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """The name a client asks for, and the words shown to one that lists exports."""

    name: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        for option, text in (("--export-name", self.name), ("--description", self.description)):
            try:
                length = len(text.encode())
            except UnicodeEncodeError:
                raise ConfigError(f"{option}: {text!r} is not valid UTF-8") from None
            if length > MAX_NAME:
                raise ConfigError(f"{option}: {length} bytes, but NBD allows {MAX_NAME} at most")
            if "\0" in text:
                raise ConfigError(f"{option}: {text!r} contains a NUL byte")


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """Where to listen: a unix socket if ``unix_path`` is set, else TCP.

    ``host`` None or "" means every IPv4 and IPv6 address; ``port`` 0 lets the kernel choose.
    """

    host: str | None = "127.0.0.1"
    port: int = DEFAULT_PORT
    unix_path: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port: {self.port} is not between 0 and 65535")
        if self.unix_path == "":
            raise ConfigError("--socket: the path is empty")


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """One run of the server.

    ``others`` are served beside ``image`` and ``export``. ``groups``: throttle groups by name, for
    throttles and throttle nodes to refer to. ``max_clients`` 0 means any number. Without
    ``persistent`` the server ends when the last client has left; it always waits for the first.
    """

    image: ImageConfig
    export: ExportConfig = ExportConfig()
    listen: ListenConfig = ListenConfig()
    max_clients: int = 0
    persistent: bool = True
    pid_file: str | None = None
    verbose: bool = False
    others: tuple[tuple[ImageConfig, ExportConfig], ...] = ()
    groups: Mapping[str, ThrottleLimits] = field(default_factory=dict)

    def served(self) -> Iterator[tuple[ImageConfig, ExportConfig]]:
        """All images with their exports, the first one first."""
        yield self.image, self.export
        yield from self.others

    def __post_init__(self) -> None:
        names = [export.name for _, export in self.served()]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"the export name {name!r} is given twice")
        if self.max_clients < 0:
            raise ConfigError(f"--shared: {self.max_clients} is negative")
        if self.pid_file == "":
            raise ConfigError("--pid-file: the path is empty")

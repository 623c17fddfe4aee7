"""The options that ``serve`` and ``qemu-nbd`` share, and the one place that parses them.

Names and meanings are qemu-nbd's. The two commands differ in defaults alone, so there is
one table of options, and ``shared_options`` takes the defaults that a command wants
different. ``serve_config`` is a pure function from parsed options to configuration: what
any command line means can be asked without serving anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nbdserve.cli.throttle import parse_throttle
from nbdserve.config import (
    CACHE_MODES,
    DEFAULT_PORT,
    Aio,
    DetectZeroes,
    Discard,
    ExportConfig,
    ImageConfig,
    ListenConfig,
    ServeConfig,
)
from nbdserve.errors import ConfigError
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")

DISCARD_MODES: dict[str, Discard] = {
    "ignore": "ignore",
    "off": "ignore",
    "unmap": "unmap",
    "on": "unmap",
}
"""Every spelling of a discard mode (follows ``bdrv_parse_discard_flags``)."""

DEFAULT_CACHE = "writeback"

AIO_MODES: dict[str, Aio] = {"threads": "threads", "io_uring": "io_uring", "native": "native"}

DETECT_ZEROES_MODES: dict[str, DetectZeroes] = {"off": "off", "on": "on", "unmap": "unmap"}


def _bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    return parse_size(value, f"--{param.name}")


def _once(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str | None:
    """The value of an option that qemu-nbd takes once only; None if it was not given."""
    if len(values) > 1:
        raise ConfigError(f"--{param.name} can only be specified once")
    return values[0] if values else None


def _integer(minimum: int, maximum: int | None = None) -> click.IntRange:
    kind = click.IntRange(minimum, maximum)
    kind.name = "integer"  # as its errors call it; by itself "integer range"
    return kind


@dataclass(frozen=True, slots=True)
class Defaults:
    """What ``serve`` and ``qemu-nbd`` disagree about."""

    bind: str
    shared: int
    discard: str


def shared_options(defaults: Defaults) -> Callable[[F], F]:
    """A decorator that adds the image argument and every option both commands have."""
    option = click.option
    parameters = [
        option("-p", "--port", metavar="PORT", type=_integer(0, 65535), default=DEFAULT_PORT,
               show_default=True, help="TCP port; 0 lets the system choose."),
        option("-b", "--bind", metavar="HOST", default=defaults.bind, show_default=True,
               help="Address or host name to listen on; empty for every IPv4 and IPv6 address."),
        option("-k", "--socket", metavar="PATH",
               help="Listen on this unix socket, not on TCP."),
        option("-f", "--format", metavar="FORMAT",
               help="Image format (raw, qcow2); probed if not given."),
        option("-r", "--read-only", is_flag=True, help="Refuse every write."),
        option("-x", "--export-name", metavar="NAME", default="",
               help="Name of the export; empty by default."),
        option("-D", "--description", metavar="TEXT", default="",
               help="Description shown to clients that list exports."),
        option("-e", "--shared", metavar="N", type=_integer(0), default=defaults.shared,
               show_default=True, help="How many clients at a time; 0 for any number."),
        option("-o", "--offset", callback=_bytes, default="0", metavar="SIZE",
               help="Serve the disk from this byte on (suffixes k, M, G, ...)."),
        option("--cache", type=click.Choice(list(CACHE_MODES)), multiple=True, callback=_once,
               show_default=DEFAULT_CACHE, help="Cache mode."),
        option("--aio", type=click.Choice(list(AIO_MODES)), multiple=True, callback=_once,
               help="I/O engine; by default io_uring with O_DIRECT (--cache=none, directsync), else"
               " threads. native needs O_DIRECT."),
        option("--discard", type=click.Choice(list(DISCARD_MODES)), multiple=True, callback=_once,
               default=[defaults.discard], show_default=True,
               help="Whether a client's trim frees space in the image."),
        option("--detect-zeroes", type=click.Choice(list(DETECT_ZEROES_MODES)), default="off",
               show_default=True, help="Turn writes of zeroes into write-zeroes requests."),
        option("--throttle", metavar="KEY=VALUE,...", multiple=True,
               help="Limit bytes (bps-total, bps-read, bps-write) and requests (iops-...) a second;"
               " bursts with -max and -max-length; iops-size."),
        option("--pid-file", metavar="PATH", help="Write the server's process id to this file."),
        option("--fork", is_flag=True,
               help="Go to the background; return once clients are accepted."),
        option("-v", "--verbose", is_flag=True, help="Log what happens to stderr."),
        click.argument("image"),
    ]  # fmt: skip

    def decorate(function: F) -> F:
        for parameter in reversed(parameters):
            function = parameter(function)
        return function

    return decorate


def serve_config(options: dict[str, Any], *, persistent: bool) -> ServeConfig:
    """The configuration that parsed options stand for.

    :param options: click's values by parameter name, as ``shared_options`` declares them.
    :raises ConfigError: a value, or a combination of values, that cannot be honoured.
    """
    return ServeConfig(
        image=ImageConfig(
            filename=options["image"],
            format=options["format"],
            read_only=options["read_only"],
            cache=CACHE_MODES[options["cache"] or DEFAULT_CACHE],
            discard=DISCARD_MODES[options["discard"]],
            detect_zeroes=DETECT_ZEROES_MODES[options["detect_zeroes"]],
            offset=options["offset"],
            aio=AIO_MODES[options["aio"]] if options["aio"] is not None else None,
            throttle=parse_throttle(options["throttle"]),
        ),
        export=ExportConfig(options["export_name"], options["description"]),
        listen=ListenConfig(options["bind"], options["port"], options["socket"]),
        max_clients=options["shared"],
        persistent=persistent,
        pid_file=options["pid_file"],
        verbose=options["verbose"],
    )

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

from nbdserve.blockdev import AIO_MODES, DETECT_ZEROES_MODES, DISCARD_MODES
from nbdserve.cli.image import DEFAULT_CACHE, image_config
from nbdserve.cli.objects import parse_objects
from nbdserve.cli.throttle import parse_throttle
from nbdserve.config import (
    CACHE_MODES,
    DEFAULT_PORT,
    ExportConfig,
    ListenConfig,
    ServeConfig,
)
from nbdserve.errors import ConfigError
from nbdserve.references import References, parse_references
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")

def _bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    return parse_size(value, f"--{param.name}")


def _references(ctx: click.Context, param: click.Parameter, value: str) -> References:
    return parse_references(value)


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
        option("--image-opts", is_flag=True,
               help="IMAGE is options, as driver=qcow2,file.filename=..., for each node."),
        option("--image-refs", metavar="any|none|FOLDER", default="any",
               show_default=True, callback=_references,
               help="The files that an image may name as its backing file or data file: any, none,"
               " or those in a folder. What you name yourself is always allowed."),
        option("-r", "--read-only", is_flag=True, help="Refuse every write."),
        option("-x", "--export-name", metavar="NAME", default="",
               help="Name of the export; empty by default."),
        option("-D", "--description", metavar="TEXT", default="",
               help="Description shown to clients that list exports."),
        option("-e", "--shared", metavar="N", type=_integer(0), default=defaults.shared,
               show_default=True, help="How many clients at a time; 0 for any number."),
        option("-o", "--offset", callback=_bytes, default="0", metavar="SIZE",
               help="Serve the disk from this byte on (suffixes k, M, G, ...)."),
        option("--cache", type=click.Choice([*CACHE_MODES, "auto"]), multiple=True, callback=_once,
               show_default=DEFAULT_CACHE, help="Cache mode."),
        option("--aio", type=click.Choice(list(AIO_MODES)), multiple=True, callback=_once,
               help="I/O engine; by default io_uring, or threads where it is forbidden. native"
               " needs O_DIRECT (--cache=none, directsync)."),
        option("--discard", type=click.Choice(list(DISCARD_MODES)), multiple=True, callback=_once,
               show_default=defaults.discard,
               help="Whether a client's trim frees space in the image."),
        option("--detect-zeroes", type=click.Choice(list(DETECT_ZEROES_MODES)),
               show_default="off", help="Turn writes of zeroes into write-zeroes requests."),
        option("--throttle", metavar="KEY=VALUE,...", multiple=True,
               help="Limit bytes (bps-total, bps-read, bps-write) and requests (iops-...) a second;"
               " bursts with -max and -max-length; iops-size; group=NAME to share them."),
        option("--object", metavar="throttle-group,id=NAME,...", multiple=True,
               help="A throttle group, with limits as x-iops-total=..., for group=NAME and for"
               " throttle nodes."),
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


def serve_config(
    options: dict[str, Any], *, persistent: bool, discard: str = "unmap"
) -> ServeConfig:
    """The configuration that parsed options stand for.

    :param options: click's values by parameter name, as ``shared_options`` declares them.
    :param discard: the command's default.
    :raises ConfigError: a value, or a combination of values, that cannot be honoured.
    """
    throttle = parse_throttle(options["throttle"])
    served = [
        (
            image_config(image, options, discard=discard, throttle=throttle),
            ExportConfig(name, description),
        )
        for image, name, description in (
            (options["image"], options["export_name"], options["description"]),
            *((image, name, "") for name, image in options.get("export", ())),
        )
    ]
    return ServeConfig(
        *served[0],
        listen=ListenConfig(options["bind"], options["port"], options["socket"]),
        max_clients=options["shared"],
        persistent=persistent,
        pid_file=options["pid_file"],
        verbose=options["verbose"],
        others=tuple(served[1:]),
        groups=parse_objects(options["object"]),
    )

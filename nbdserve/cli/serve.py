"""``nbdserve serve``: qemu-nbd's options with defaults for people.

Listens on this machine only, stays until it is stopped, takes any number of clients,
lets a trim shrink the image, and says on stdout how to reach it. The first line is the
NBD URI alone, for scripts.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from nbdserve.cli.options import Defaults, serve_config, shared_options
from nbdserve.cli.run import run_server
from nbdserve.errors import ConfigError, naming
from nbdserve.faults import parse_fault

if TYPE_CHECKING:
    from nbdserve.config import ExportConfig
    from nbdserve.faults import Fault
    from nbdserve.server import Ready


def _exports(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, str]]:
    """(name, image) of each NAME=IMAGE."""
    pairs = [value.partition("=") for value in values]
    for value, (name, _, image) in zip(values, pairs, strict=True):
        if not name or not image:
            raise ConfigError(f"--export: {value!r} is not NAME=IMAGE")
    return [(name, image) for name, _, image in pairs]


def _faults(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[Fault, ...]:
    with naming("--fault"):
        return tuple(parse_fault(value) for value in values)


@click.command("serve", context_settings={"help_option_names": ["-h", "--help"]})
@shared_options(Defaults(bind="127.0.0.1", shared=0, discard="unmap"))
@click.option("--export", metavar="NAME=IMAGE", multiple=True, callback=_exports,
              help="Serve this image too, under that name and with the same options.")
@click.option("--fault", metavar="KEY=VALUE,...", multiple=True, callback=_faults,
              help="Have the disk go wrong, as ops=write+flush,error=EIO,count=3; or by delay,"
              " stuck, short, torn, lost, flip-bits, bps, disconnect (docs/faults.md).")
@click.option("-U", "--force-share", is_flag=True,
              help="Let others write to the image meanwhile; needs --read-only.")
def command(**options: Any) -> None:  # noqa: ANN401 - click's values, typed in options.py
    """Serve IMAGE until stopped by a signal (Ctrl-C)."""
    config = serve_config(options, persistent=True)
    run_server(config, lambda ready: usage(ready, config.export), fork=options["fork"])


def usage(ready: Ready, export: ExportConfig) -> str:
    """The URI on a line of its own, then the commands that use it, then further URIs."""
    from nbdserve.listeners import connectable_host

    uri = shlex.quote(ready.uri)
    if ready.where.unix_path is not None:
        where = ["-unix", ready.where.unix_path]
    else:
        where = [connectable_host(ready.where), str(ready.where.port)]
    name = ["-N", export.name] if export.name else []
    read_only = ["-readonly"] if ready.read_only else []
    kernel = shlex.join(["nbd-client", *where, "/dev/nbd0", *name, *read_only])
    return (
        f"{ready.uri}\n"
        f"  qemu-img info {uri}\n"
        f"  nbdcopy {uri} copy.img\n"
        f"  {kernel}    # as root, after modprobe nbd\n"
        + "".join(f"{shlex.quote(other)}\n" for other in ready.others)
    )

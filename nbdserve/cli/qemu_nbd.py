"""``nbdserve qemu-nbd``: the drop-in for qemu-nbd.

Its options, its defaults and its life cycle: every interface, one client at a time, gone
when the last client has left unless --persistent, silent on stdout. An option of
qemu-nbd that is not supported is refused by its name, never taken for something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from nbdserve import __version__
from nbdserve.cli.options import Defaults, F, serve_config, shared_options
from nbdserve.cli.run import run_server
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.config import ServeConfig

DEFAULTS = Defaults(bind="0.0.0.0", shared=1, discard="ignore")

UNSUPPORTED: tuple[tuple[tuple[str, ...], bool], ...] = (
    (("-s", "--snapshot"), False),
    (("-l", "--load-snapshot"), True),
    (("-c", "--connect"), True),
    (("-d", "--disconnect"), False),
    (("-L", "--list"), False),
    (("-B", "--bitmap"), True),
    (("-A", "--allocation-depth"), False),
    (("-P", "--partition"), True),
    (("-T", "--trace"), True),
    (("--tls-creds",), True),
    (("--tls-authz",), True),
    (("--tls-hostname",), True),
    (("--selinux-label",), True),
)
"""Names of each option that is refused, and whether it takes a value."""


def _refuse(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if value:
        raise ConfigError(f"{'/'.join(param.opts)} is not supported yet")


def _unsupported_options() -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for names, takes_value in UNSUPPORTED:
            # Eager, and with the image optional: told before anything else that is wrong.
            function = click.option(
                *names, is_flag=not takes_value, multiple=takes_value, hidden=True,
                expose_value=False, is_eager=True, callback=_refuse,
            )(function)  # fmt: skip
        return function

    return decorate


@click.command("qemu-nbd", context_settings={"help_option_names": ["-h", "--help"]})
@shared_options(DEFAULTS)
@click.option("-t", "--persistent", is_flag=True, help="Stay when the last client has left.")
@click.option("-n", "--nocache", is_flag=True, help="The same as --cache=none.")
@_unsupported_options()
@click.version_option(__version__, "-V", "--version", message="nbdserve %(version)s")
def command(**options: Any) -> None:  # noqa: ANN401 - click's values, typed in options.py
    """Serve IMAGE as qemu-nbd does."""
    run_server(config_of(options), lambda ready: "", fork=options["fork"])


def config_of(options: dict[str, Any]) -> ServeConfig:
    """The configuration that this command's parsed options stand for.

    :raises ConfigError: as ``serve_config``; or both -n and --cache, as in qemu-nbd.
    """
    if options["nocache"]:
        if options["cache"] is not None:
            raise ConfigError("-n and --cache can only be specified once")
        options = {**options, "cache": "none"}
    options = {**options, "force_share": False}  # only as an option of a node
    return serve_config(options, persistent=options["persistent"], discard=DEFAULTS.discard)

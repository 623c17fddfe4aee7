"""The ``nbdserve`` command: finds the subcommand, and turns whatever is raised into one line.

Exit status is 0 or 1, as with qemu-nbd and qemu-img, for bad options too (click's own
default would be 2). No traceback reaches a user: a bug is reported in one line as well, its
traceback is logged at debug level, which --verbose shows.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from nbdserve import __version__
from nbdserve.errors import NbdserveError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "serve": "nbdserve.cli.serve",
    "qemu-nbd": "nbdserve.cli.qemu_nbd",
    "nbdkit": "nbdserve.cli.nbdkit",
    "create": "nbdserve.cli.create",
    "cut": "nbdserve.cli.cut",
}
"""Subcommand -> the module whose ``command`` it is; imported when it is asked for."""

_CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
"""Control characters, for example in file names, are escaped: an error is one line, and nothing
in it is a command to the terminal (U+009B begins one, as ESC [ does)."""


class _Commands(click.Group):
    """The subcommands of COMMANDS, loaded on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[name]).command
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=_Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, "-V", "--version", message="nbdserve %(version)s")
def cli() -> None:
    """Serve qcow2 images over the network block device protocol."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    :param argv: the arguments without the program's name; None for the process's own.
    """
    try:
        cli.main(argv, prog_name="nbdserve", standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        logging.getLogger("nbdserve").debug("traceback of the error below", exc_info=True)
        line = f"nbdserve: {describe(error)}".translate(_CONTROL)
        click.echo(line, err=True)
        sys.exit(1)
    sys.exit(0)


def describe(error: BaseException) -> str:
    """One sentence for the user: names the file or option and says what is wrong with it."""
    match error:
        case click.Abort():
            return "aborted"
        case click.MissingParameter():
            return error.format_message().rstrip(".")
        case click.BadParameter() if error.param is not None:
            return f"{error.param.opts[-1]}: {error.message.rstrip('.')}"
        case click.ClickException():
            return error.format_message().rstrip(".")
        case NbdserveError():
            return str(error)
        case OSError() if error.strerror is not None:
            names = [str(name) for name in (error.filename, error.filename2) if name is not None]
            return ": ".join([*names, error.strerror])
        case BaseExceptionGroup():
            return "; ".join(dict.fromkeys(describe(inner) for inner in error.exceptions))
        case _:
            return f"internal error: {error!r}"

"""``nbdserve create``: a new, empty qcow2 image, by qemu-img create's names.

    nbdserve create disk.qcow2 10G
    nbdserve create -o cluster_size=128k,lazy_refcounts=on disk.qcow2 10G
    nbdserve create -b base.qcow2 -F qcow2 overlay.qcow2
    nbdserve create -o data_file=disk.raw,data_file_raw=on disk.qcow2 10G

As in qemu-img, ``-b`` needs ``-F`` (a format that were probed each time could be
changed by the guest), the backing file is opened before anything is written, a relative
name counts from the new image's folder, and its size is the default for the overlay. A
data file is made with the image; its name counts from the working directory. A file that
exists is overwritten, unless a server, a guest or a tool has it locked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from nbdserve.errors import ConfigError
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from nbdserve.config import ImageConfig

_BOOLEANS = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
"""Every spelling of a boolean in an option list (follows ``qapi_bool_parse``)."""

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
"""compat= to the qcow2 version (follows ``qcow2_create``)."""


FORMAT_OPTIONS: dict[str, tuple[str, Callable[[str], object]]] = {
    "cluster_size": ("cluster_size", parse_size),
    "compat": ("version", _VERSIONS.__getitem__),
    "refcount_bits": ("refcount_bits", int),
    "compression_type": ("compression_type", str),
    "lazy_refcounts": ("lazy_refcounts", _BOOLEANS.__getitem__),
    "data_file": ("data_file", str),
    "data_file_raw": ("data_file_raw", _BOOLEANS.__getitem__),
}
"""-o name -> the parameter of ``create_image`` and how to read its value.

A reader raises ValueError, KeyError or ConfigError for a value that is none."""


@click.command("create", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-f", "--format", type=click.Choice(["qcow2"]), default="qcow2",
              help="Format of the new image; only qcow2.")
@click.option("-o", "options", metavar="NAME=VALUE,...", multiple=True,
              help=f"Format options: {', '.join(FORMAT_OPTIONS)}.")
@click.option("-b", "--backing", metavar="FILE", help="Backing file; FILE becomes its overlay.")
@click.option("-F", "--backing-format", metavar="FORMAT", help="Format of the backing file.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
@click.argument("file")
@click.argument("size", required=False)
def command(
    format: str,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    quiet: bool,
    file: str,
    size: str | None,
) -> None:  # fmt: skip
    """Create the qcow2 image FILE.

    SIZE is in bytes, or with a suffix k, M, G, T; an overlay's is its backing file's if not given.
    """
    if not file:
        raise ConfigError("the new image's file name is empty")
    parameters = format_options(options)
    length = None if size is None else parse_size(size, "SIZE")
    if backing is not None:
        found = _backing_size(_backing_config(file, backing, backing_format))
        length = found if length is None else length
    elif backing_format is not None:
        raise ConfigError("-F: a backing format needs a backing file (-b)")
    if length is None:
        raise ConfigError(f"{file}: a new image needs a size, or a backing file to take it from")

    from nbdserve.formats.qcow2.create import create_image

    def create() -> None:
        create_image(
            file, length, backing_file=backing, backing_format=backing_format, **parameters
        )

    data_file = parameters.get("data_file")
    if data_file is None:
        _while_locked(file, create)
    else:
        _while_locked(data_file, lambda: _while_locked(file, create))
    if not quiet:
        said = "".join(f" {name}={value}" for name, value in parameters.items())
        said += f" backing_file={backing} backing_fmt={backing_format}" if backing else ""
        click.echo(os.fsencode(f"Formatting '{file}', fmt={format} size={length}{said}"))


def format_options(lists: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of ``create_image`` that ``-o`` lists stand for; later ones win.

    The syntax is QemuOpts': NAME=VALUE between commas, a comma in a value doubled, a
    boolean's name alone means on.

    :raises ConfigError: an unknown name, or a value that is none.
    """
    parameters: dict[str, Any] = {}
    for text in lists:
        for item in text.replace(",,", "\0").split(","):
            name, given, value = item.replace("\0", ",").partition("=")
            if name not in FORMAT_OPTIONS:
                known = ", ".join(FORMAT_OPTIONS)
                raise ConfigError(f"-o: {name!r} is not a supported option (there are: {known})")
            parameter, read = FORMAT_OPTIONS[name]
            parameters[parameter] = _parsed(name, value if given else "on", read)
    return parameters


def _parsed(name: str, value: str, read: Callable[[str], object]) -> object:
    try:
        return read(value)
    except (ValueError, KeyError, ConfigError):
        raise ConfigError(f"-o {name}: {value!r} is not a valid value") from None


def _backing_config(file: str, backing: str, backing_format: str | None) -> ImageConfig:
    from nbdserve.blockdev import image_tree
    from nbdserve.config import ImageConfig

    if backing_format is None:
        raise ConfigError(f"-b: {backing}: its format must be given too (-F)")
    tree = image_tree(backing, backing_format, directory=os.path.dirname(file))
    return ImageConfig(backing, options=tree, read_only=True)


def _backing_size(config: ImageConfig) -> int:
    """The guest-visible size of an image, which must open."""
    import trio

    from nbdserve.graph import open_backend

    async def size() -> int:
        async with open_backend(config) as backend:
            return backend.size

    return trio.run(size)


def _while_locked(file: str, create: Callable[[], None]) -> None:
    """Call ``create``; if ``file`` exists, hold its lock meanwhile.

    :raises LockedError: somebody uses the file.
    """
    if not os.path.exists(file):
        create()
        return

    from nbdserve.graph import locked_for_creation

    with locked_for_creation(file):
        create()

"""``nbdserve nbdkit``: an image behind nbdkit, by the plugin in nbdserve/nbdkit/.

nbdkit brings a Python of its own, the system's, which knows nothing of the environment that
nbdserve is installed in. This finds the plugin and the libraries that it needs, looks whether that
Python can use them, and becomes nbdkit. Everything that is not IMAGE and not key=value goes to
nbdkit as it is: its options are read here only to know where they end.
"""

from __future__ import annotations

import getopt
import os
import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

import click

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

# nbdkit(1). Those of later versions than Debian's 1.32 are here too.
SHORT_OPTIONS = "46D:e:fg:i:nop:P:rst:u:U:vV"
LONG_OPTIONS = [
    "debug=", "export=", "export-name=", "exportname=", "filter=", "group=", "ip-addr=",
    "ipaddr=", "log=", "mask-handshake=", "pid-file=", "pidfile=", "port=", "run=",
    "selinux-label=", "threads=", "timeout=", "tls=", "tls-certificates=", "tls-psk=", "unix=",
    "user=",
    "dump-config", "dump-plugin", "exit-with-parent", "foreground", "help", "ipv4-only",
    "ipv6-only", "keepalive", "long-options", "new-style", "newstyle", "no-fork", "no-mc",
    "no-meta-contexts", "no-sr", "no-structured-replies", "old-style", "oldstyle", "print-uri",
    "read-only", "readonly", "short-options", "single", "stdin", "swap", "tls-verify-peer",
    "verbose", "version", "vsock",
]  # fmt: skip

READ_ONLY = {"-r", "--readonly", "--read-only"}
THREADS = {"-t", "--threads"}
# With these nbdkit serves nothing, and needs no image.
NO_IMAGE = {"--dump-plugin", "--dump-config", "--version", "-V", "--long-options",
            "--short-options"}  # fmt: skip

OLDEST = (3, 11)

# For each connection; what more cost and gain docs/nbdkit.md says.
DEFAULT_THREADS = 4
WAITING_THREADS = 16
WAITING_MODES = {"cache=none", "cache=directsync", "cache=writethrough", "cache=auto"}


@click.command(
    "nbdkit",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
@click.argument("arguments", metavar="[NBDKIT OPTIONS] IMAGE [KEY=VALUE]...", nargs=-1,
                type=click.UNPROCESSED)  # fmt: skip
def command(arguments: tuple[str, ...]) -> None:
    """Serve IMAGE with nbdkit, its options and filters.

    KEY=VALUE are parameters of the image (cache=none, format=qcow2, l2-cache-size=8M, ...;
    docs/nbdkit.md) or of filters.
    """
    nbdkit = find_nbdkit()
    environment = {**os.environ, **settings(nbdkit)}
    words = nbdkit_arguments(arguments)
    check_python(nbdkit, environment)
    os.execve(nbdkit, [nbdkit, *words], environment)


def nbdkit_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of nbdkit, without its name. Raises ConfigError."""
    try:
        options, rest = getopt.gnu_getopt(list(arguments), SHORT_OPTIONS, LONG_OPTIONS)
    except getopt.GetoptError as error:
        raise ConfigError(f"nbdkit: {error.msg}") from None
    names = {name for name, _ in options}
    images = [word for word in rest if not _is_parameter(word)]
    parameters = [word for word in rest if _is_parameter(word)]
    if len(images) > 1:
        raise ConfigError(f"nbdkit: {images[1]!r}: one image is served, and {images[0]!r} is it")
    has_image = images or any(
        word.startswith(("file=", "file.", "driver=")) for word in parameters
    )
    if not has_image and not names & NO_IMAGE:
        raise ConfigError("nbdkit: IMAGE must be given")
    words = [f"{name}={restored(value) if name == '--run' else value}"
             if name.startswith("--") and value else name + value
             for name, value in options]  # fmt: skip
    if not names & THREADS:
        waits = WAITING_MODES & set(parameters)
        words.append(f"--threads={WAITING_THREADS if waits else DEFAULT_THREADS}")
    words += ["python", script()]
    if names & READ_ONLY and not any(word.startswith("read-only=") for word in parameters):
        words.append("read-only=on")
    return [*words, *(f"file={image}" for image in images), *parameters]


def _is_parameter(word: str) -> bool:
    """As nbdkit sees it: a key begins with a letter and has letters, digits and - . _."""
    key, separator, _ = word.partition("=")
    return bool(separator) and key[:1].isalpha() and key.isascii() and not key.strip(
        "-._abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    )


def find_nbdkit() -> str:
    """Its path. Raises ConfigError."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which("nbdkit", path=path)
    if found is None:
        raise ConfigError("nbdkit is not installed (Debian: nbdkit, nbdkit-plugin-python)")
    return found


def check_python(nbdkit: str, environment: dict[str, str]) -> None:
    """Whether nbdkit's Python plugin can run ours. Raises ConfigError."""
    done = subprocess.run(
        [nbdkit, "--dump-plugin", "python"],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    version = said.get("python_version")
    if done.returncode != 0 or version is None:
        raise ConfigError("nbdkit has no Python plugin (Debian: nbdkit-plugin-python)")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ConfigError(f"nbdkit's Python is {version}, and {oldest} is needed")


def settings(nbdkit: str) -> dict[str, str]:
    """The environment variables that are nbdkit's. An interpreter within another program looks for
    its library beside the first python3 of PATH: that shall be the one it was built with, and not
    that of a virtual environment, whose library may be another version's."""
    own = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(nbdkit))), "bin")
    path = os.environ.get("PATH", os.defpath)
    return {
        "PATH": os.pathsep.join([own, path]),
        "PYTHONPATH": python_path(os.environ.get("PYTHONPATH")),
    }


def restored(run: str) -> str:
    """The command of --run, with the environment that we were given."""
    before = "".join(
        f"export {name}={shlex.quote(os.environ[name])}; " if name in os.environ
        else f"unset {name}; "
        for name in ("PATH", "PYTHONPATH")
    )
    return before + run


def script() -> str:
    """The plugin, a file of this package."""
    import nbdserve

    return os.path.join(os.path.dirname(nbdserve.__file__), "nbdkit", "script.py")


def python_path(given: str | None) -> str:
    """Where nbdkit's Python finds this package and what it needs; `given` goes before that."""
    import construct
    import trio

    import nbdserve

    places = [os.path.dirname(os.path.dirname(module.__file__ or ""))
              for module in (nbdserve, trio, construct)]  # fmt: skip
    # What the interpreter that runs this has is no business of another version's standard library.
    places = [place for place in places if place != os.path.dirname(os.__file__)]
    return os.pathsep.join(dict.fromkeys([*([given] if given else []), *places]))

"""nbdkit's callbacks (nbdkit-plugin(3), nbdkit-python-plugin(3), API version 2).

The order of things is nbdkit's, and the law of this module:

* `config`, `config_complete`: parameters are read; nothing is opened.
* `get_ready`, still with a terminal: the image is opened for trial and closed, in a thread that
  ends. A bad one ends nbdkit. For reading only, unless read-only=off was said: whether nbdkit has
  -r nobody tells before `open`, and what is served read-only must not be written by a trial.
* `after_fork`, still one thread: the guardian is forked, then trio's thread started.
* `open`, the first: the image is opened, for reading if nbdkit or a filter asks for that. It stays
  open. Opened for reading, it is opened anew when somebody comes who wants to write.
* `cleanup`: the image is flushed and closed, trio's thread and the guardian end.

A file that may not be written is served read-only, as nbdkit's file plugin does.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
import threading
from typing import TYPE_CHECKING

import nbdkit

from nbdserve import __version__
from nbdserve.errors import DisconnectError, NbdserveError
from nbdserve.guardian import guardian
from nbdserve.nbdkit.disk import Disk
from nbdserve.nbdkit.loop import Loop
from nbdserve.nbdkit.native import ThreadStates, Told, tell_in_one_line
from nbdserve.nbdkit.parameters import PARAMETERS, Parameters, for_reading
from nbdserve.statistics import log_statistics, plain

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from nbdserve.config import ImageConfig
    from nbdserve.nbdkit.loop import Image

API_VERSION = 2

__all__ = [
    "API_VERSION", "after_fork", "block_size", "cache", "can_cache", "can_extents",
    "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_write", "can_zero",
    "cleanup", "close", "config", "config_complete", "default_export", "dump_plugin",
    "export_description", "extents", "flush", "get_ready", "get_size", "is_rotational",
    "list_exports", "open", "pread", "pwrite", "thread_model", "trim", "zero",
]  # fmt: skip

MAXIMUM_PAYLOAD = 64 << 20
"""Bytes in one request, as nbdkit itself has it."""

PREFERRED = 4096

# Why a file may be served read-only without being asked.
UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})

log = logging.getLogger("nbdserve.nbdkit")


class _Plugin:
    """All that is kept: there is one plugin in a process."""

    def __init__(self) -> None:
        self.parameters = Parameters()
        self.config: ImageConfig
        self.loop: Loop
        self.at_end = contextlib.ExitStack()
        self.image: Image | None = None
        self.handles = 0
        self.opening = threading.Lock()


plugin = _Plugin()


class _Handler(logging.Handler):
    """Our log is nbdkit's: all in its debug messages (-v), warnings on stderr in any case."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            with contextlib.suppress(OSError):
                print(f"nbdkit: nbdserve: {text}", file=sys.stderr, flush=True)
        else:
            nbdkit.debug(text)


@contextlib.contextmanager
def _told(what: str = "") -> Generator[None]:
    """What goes wrong in the body is told in one line, and nbdkit answers with its errno."""
    try:
        yield
    except NbdserveError as error:
        nbdkit.set_error(error.errno or errno.EIO)
        raise Told(f"{what}{error}") from None
    except OSError as error:
        raise _failed(what, error) from None


def _failed(what: str, error: OSError) -> Told:
    number = error.errno or errno.EIO
    if isinstance(error, DisconnectError):
        number = errno.ESHUTDOWN  # what nbdkit says if it is older than its disconnect()
        getattr(nbdkit, "disconnect", bool)(True)
    nbdkit.set_error(number)
    names = [str(name) for name in (error.filename,) if name is not None]
    return Told(what + ": ".join([*names, error.strerror or str(error)]))


# --- the life of the plugin ---------------------------------------------------------------------


def dump_plugin() -> None:
    # nbdkit ends without Python's knowing: what is not flushed is lost.
    print(f"nbdserve_version={__version__}", f"nbdserve_parameters={','.join(PARAMETERS)}",
          sep="\n", flush=True)  # fmt: skip


def thread_model() -> int:
    return nbdkit.THREAD_MODEL_PARALLEL


def config(key: str, value: str) -> None:
    with _told():
        plugin.parameters.add(key, value)


def config_complete() -> None:
    with _told():
        plugin.config = plugin.parameters.image()
        plugin.parameters.export()
        plugin.parameters.groups()


def get_ready() -> None:
    config = plugin.config
    if plugin.parameters.read_only is None:
        config = for_reading(config)
    loop = Loop(plugin.parameters.groups())
    loop.start()
    try:
        with _told():
            loop.close(loop.open(config))
    finally:
        loop.stop()


def after_fork() -> None:
    our_guardian = plugin.at_end.enter_context(guardian())
    plugin.loop = Loop(plugin.parameters.groups(), our_guardian)
    plugin.loop.start()
    plugin.at_end.callback(plugin.loop.stop)


def cleanup() -> None:
    try:
        if plugin.image is not None:
            _close_image(plugin.image)
    finally:
        plugin.at_end.close()


def _close_image(image: Image) -> None:
    plugin.image = None
    try:
        plugin.loop.close(image)
    except (OSError, NbdserveError) as error:
        log.error("%s: closing it failed: %s", plugin.config.filename, error)
    if image.statistics:
        log_statistics(plain({"exports": {"": image.statistics}, "connections": [], "engines": []}))


# --- connections --------------------------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> Sequence[tuple[str, str]]:
    export = plugin.parameters.export()
    return [(export.name, export.description)]


def default_export(readonly: bool, is_tls: bool) -> str:
    return plugin.parameters.export().name


class Handle:
    """A connection: its disk, and the states of its threads."""

    __slots__ = ("disk", "kept", "read", "states", "write")

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.states = ThreadStates()
        self.kept = self.states.kept
        self.read = disk.read
        self.write = disk.write


def open(readonly: bool) -> Handle:
    name, wanted = nbdkit.export_name(), plugin.parameters.export().name
    with _told(), plugin.opening:
        if wanted and name not in ("", wanted):
            raise OSError(errno.ENOENT, f"there is no export {name!r}")
        handle = Handle(Disk(plugin.loop, _image(readonly=readonly)))
        plugin.handles += 1
        return handle


def _image(*, readonly: bool) -> Image:
    image = plugin.image
    if image is not None and image.backend.read_only and not readonly and not plugin.handles:
        _close_image(image)  # perhaps it can be written
        image = None
    if image is None:
        image = plugin.image = _opened(readonly=readonly)
    return image


def _opened(*, readonly: bool) -> Image:
    config = plugin.config
    if not readonly:
        try:
            return plugin.loop.open(config)
        except (NbdserveError, OSError) as error:
            if error.errno not in UNWRITABLE or plugin.parameters.read_only is not None:
                raise
            log.info("%s: read-only: %s", config.filename, error)
    return plugin.loop.open(for_reading(config))


def close(h: Handle) -> None:
    h.disk.close()
    with plugin.opening:
        plugin.handles -= 1
    h.states.drop()


def export_description(h: Handle) -> str:
    return plugin.parameters.export().description


def get_size(h: Handle) -> int:
    return h.disk.size


def block_size(h: Handle) -> tuple[int, int, int]:
    return 1, PREFERRED, MAXIMUM_PAYLOAD


def is_rotational(h: Handle) -> bool:
    return False


def can_multi_conn(h: Handle) -> bool:
    return True


def can_write(h: Handle) -> bool:
    return not h.disk.read_only


def can_flush(h: Handle) -> bool:
    return True


def can_trim(h: Handle) -> bool:
    return not h.disk.read_only


def can_zero(h: Handle) -> bool:
    return not h.disk.read_only


def can_fast_zero(h: Handle) -> bool:
    return not h.disk.read_only


def can_extents(h: Handle) -> bool:
    return True


def can_fua(h: Handle) -> int:
    return nbdkit.FUA_NATIVE


def can_cache(h: Handle) -> int:
    return nbdkit.CACHE_NATIVE


# --- requests -----------------------------------------------------------------------------------


def pread(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    if threading.get_ident() not in h.kept:
        h.states.keep()
    try:
        h.read(offset, buf)
    except OSError as error:
        raise _failed(f"read of {len(buf)} bytes at {offset}: ", error) from None


def pwrite(h: Handle, buf: memoryview, offset: int, flags: int) -> None:
    if threading.get_ident() not in h.kept:
        h.states.keep()
    try:
        h.write(offset, buf, fua=bool(flags & nbdkit.FLAG_FUA))
    except OSError as error:
        raise _failed(f"write of {len(buf)} bytes at {offset}: ", error) from None


def flush(h: Handle, flags: int) -> None:
    with _told("flush: "):
        h.disk.flush()


def trim(h: Handle, count: int, offset: int, flags: int) -> None:
    with _told(f"trim of {count} bytes at {offset}: "):
        h.disk.trim(offset, count, fua=bool(flags & nbdkit.FLAG_FUA))


def zero(h: Handle, count: int, offset: int, flags: int) -> None:
    with _told(f"zero of {count} bytes at {offset}: "):
        h.disk.zero(
            offset,
            count,
            may_trim=bool(flags & nbdkit.FLAG_MAY_TRIM),
            fast=bool(flags & nbdkit.FLAG_FAST_ZERO),
            fua=bool(flags & nbdkit.FLAG_FUA),
        )


def cache(h: Handle, count: int, offset: int, flags: int) -> None:
    with _told(f"cache of {count} bytes at {offset}: "):
        h.disk.cache(offset, count)


def extents(h: Handle, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    with _told(f"extents of {count} bytes at {offset}: "):
        pieces = h.disk.extents(offset, count, one=bool(flags & nbdkit.FLAG_REQ_ONE))
    found = []
    for length, data, zero, _ in pieces:
        kind = (0 if data else nbdkit.EXTENT_HOLE) | (nbdkit.EXTENT_ZERO if zero else 0)
        found.append((offset, length, kind))
        offset += length
    return found


def _begin() -> None:
    root = logging.getLogger("nbdserve")
    root.addHandler(_Handler())
    root.setLevel(logging.INFO)
    root.propagate = False
    tell_in_one_line()


_begin()

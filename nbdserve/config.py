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

from dataclasses import dataclass
from typing import Literal

from nbdserve.errors import ConfigError

Discard = Literal["ignore", "unmap"]
DetectZeroes = Literal["off", "on", "unmap"]
Aio = Literal["threads", "io_uring", "native"]

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


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The image to open, and the window of it to serve.

    ``format`` is a driver's name, None to probe. ``aio`` is the I/O engine's, None for
    the fastest that is correct. ``offset`` is in bytes: the served
    disk begins there in the guest's disk.
    """

    filename: str
    format: str | None = None
    read_only: bool = False
    cache: CacheMode = CACHE_MODES["writeback"]
    discard: Discard = "unmap"
    detect_zeroes: DetectZeroes = "off"
    offset: int = 0
    aio: Aio | None = None

    def __post_init__(self) -> None:
        if not self.filename:
            raise ConfigError("the image's file name is empty")
        if "\0" in self.filename:
            raise ConfigError(f"the image's file name {self.filename!r} contains a NUL byte")
        if self.offset < 0:
            raise ConfigError(f"--offset: {self.offset} is negative")
        if self.detect_zeroes == "unmap" and self.discard != "unmap":
            raise ConfigError("--detect-zeroes=unmap needs --discard=unmap")


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

    ``max_clients`` 0 means any number. Without ``persistent`` the server ends when the
    last client has left; it always waits for the first.
    """

    image: ImageConfig
    export: ExportConfig = ExportConfig()
    listen: ListenConfig = ListenConfig()
    max_clients: int = 0
    persistent: bool = True
    pid_file: str | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.max_clients < 0:
            raise ConfigError(f"--shared: {self.max_clients} is negative")
        if self.pid_file == "":
            raise ConfigError("--pid-file: the path is empty")

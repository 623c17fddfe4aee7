"""Listening sockets: where clients knock, and the URI that leads them there.

The sockets here are plain non-blocking ones of the standard library, already
listening when they are handed out: from then on a client that connects waits in
the kernel's queue and will be served, which is what "ready" means. Accepting is
server.py's part.

A unix socket is a file, and two laws keep it harmless. Only a socket on which
nobody listens is ever replaced (qemu-nbd removes whatever it finds at that path,
a regular file as well; we refuse). And only the file that we made is removed at
the end: if somebody has put another one in its place, it stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote

import trio

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from nbdserve.config import ListenConfig

MAX_UNIX_PATH = 107
"""Bytes: ``sun_path`` has 108 on Linux, of which one ends the string (unix(7))."""

_CONNECTABLE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""What a client on this machine dials to reach a wildcard address."""


@dataclass
class Listeners:
    """Sockets that are listening, non-blocking.

    ``where`` is the configuration with what the kernel chose filled in: the real port, and
    the absolute path of a unix socket.
    """

    sockets: list[socket.socket]
    where: ListenConfig
    file_id: tuple[int, int] | None = None
    """Device and inode of the unix socket's file."""

    def close(self) -> None:
        """Stop listening: clients still in the kernel's queue are disconnected. Idempotent."""
        for sock in self.sockets:
            sock.close()

    def remove(self) -> None:
        """Close, and remove the unix socket's file if it is still ours. Idempotent."""
        self.close()
        path, ours = self.where.unix_path, self.file_id
        if path is None or ours is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if _file_id(path) == ours:
                os.unlink(path)
        self.file_id = None


def nbd_uri(where: ListenConfig, export_name: str) -> str:
    """The URI of an export, by the NBD project's "NBD URI" document.

    Everything but unreserved characters is percent-encoded, the scope of an IPv6 address
    too (RFC 6874); only the slashes of an export name or a socket's path stay readable.
    """
    path = quote(export_name, safe="/")
    if where.unix_path is not None:
        socket_path = quote(os.fsencode(os.path.abspath(where.unix_path)), safe="/")
        return f"nbd+unix:///{path}?socket={socket_path}"
    host = connectable_host(where)
    authority = f"[{quote(host, safe=':')}]" if ":" in host else quote(host)
    return f"nbd://{authority}:{where.port}/{path}"


def connectable_host(where: ListenConfig) -> str:
    """The host a client on this machine connects to, for a TCP listener."""
    host = where.host or ""
    return _CONNECTABLE.get(host, host)


async def open_listeners(where: ListenConfig, *, backlog: int) -> Listeners:
    """Listen on a unix socket or on TCP, IPv4 and IPv6.

    :raises ConfigError: naming the option, with the errno of the system call that failed.
    """
    if where.unix_path is not None:
        return _listen_unix(where, where.unix_path, backlog)
    return await _listen_tcp(where, backlog)


async def _listen_tcp(where: ListenConfig, backlog: int) -> Listeners:
    host = where.host or None
    try:
        found = await trio.socket.getaddrinfo(
            host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(f"--bind: {host}: {error.strerror}", errno.EINVAL) from None
    sockets: list[socket.socket] = []
    port = where.port
    with contextlib.ExitStack() as undo:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and len(found) > 1:
                    continue  # a kernel without IPv6: the resolver may name it nevertheless
                raise
            undo.callback(sock.close)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                # With port 0 the kernel chooses for the first address; the others follow it.
                sock.bind((address[0], port, *address[2:]))
                sock.listen(backlog)
            except OSError as error:
                raise _tcp_error(str(address[0]), port, error) from None
            port = sock.getsockname()[1]
            sock.setblocking(False)
            sockets.append(sock)
        undo.pop_all()
    return Listeners(sockets, replace(where, port=port))


def _tcp_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"--bind: {host}: {error.strerror}", error.errno)
    return ConfigError(f"--port: {port} on {host}: {error.strerror}", error.errno)


def _listen_unix(where: ListenConfig, path: str, backlog: int) -> Listeners:
    length = len(os.fsencode(path))
    if length > MAX_UNIX_PATH:
        raise ConfigError(
            f"--socket: {path}: the path has {length} bytes, a socket's {MAX_UNIX_PATH} at most",
            errno.ENAMETOOLONG,
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        made = _file_id(path)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise ConfigError(f"--socket: {path}: {error.strerror}", error.errno) from None
    except ConfigError:
        sock.close()
        raise
    sock.setblocking(False)
    return Listeners([sock], replace(where, unix_path=os.path.abspath(path)), made)


def _remove_stale(path: str) -> None:
    """Remove a socket that a server which was killed has left behind.

    :raises ConfigError: there is a file of another kind, or somebody listens.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--socket: {path}: exists and is not a socket", errno.EEXIST)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full queue answers EAGAIN, and means a listener as well
        refused = probe.connect_ex(path)
    if refused != errno.ECONNREFUSED:
        in_use = refused in (0, errno.EAGAIN)
        code = errno.EADDRINUSE if in_use else refused
        raise ConfigError(f"--socket: {path}: {os.strerror(code)}", code)
    os.unlink(path)


def _file_id(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino

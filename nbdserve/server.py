"""The life of a server: open, listen, accept, stop in order.

The order is the law of this module:

1. the image is opened. If it is refused, no socket was made and nothing written;
2. sockets listen, the pid file is written, and only then is readiness announced;
3. clients are accepted until somebody stops it or, if not persistent, the last has left;
4. stop: the sockets close, throttled requests are let go, every connection is asked to
   finish what is in flight, and after SHUTDOWN_TIMEOUT those that have not are cut off;
5. the image is flushed and closed, then socket and pid file go. Whoever sees them
   gone may open the image.

`open_server` is that for a body, in any trio program. `serve` is a process's: it stops by signals,
which are received from before 1 until after 5, so that a second one interrupts nothing. SIGUSR1
stops nothing: it has the statistics logged, which is also done at the end if the server is verbose.
What one connection does wrong ends that connection alone.

Life cycle and client limit follow qemu-nbd (``nbd_accept``, ``nbd_client_closed``,
``nbd_update_server_watch``): at the limit nobody is turned away, the next client waits
in the kernel's queue; and a client that left before it reached transmission, such as
one that only listed the exports, does not count as the last one.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from nbdserve.graph import open_backend, shared_by_drives
from nbdserve.listeners import Listeners, nbd_uri, open_listeners
from nbdserve.nbd.budget import TICK, Budget
from nbdserve.nbd.connection import Connection
from nbdserve.nbd.export import Export
from nbdserve.nbd.poller import Poller
from nbdserve.pidfile import pid_file
from nbdserve.statistics import log_statistics, plain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Sequence

    from nbdserve.block.completions import Completions
    from nbdserve.config import ListenConfig, ServeConfig
    from nbdserve.guardian import Guardian

SHUTDOWN_TIMEOUT = 5.0
"""Seconds a stop waits for requests in flight and for clients to read their replies.

Long enough for a 64 MiB request on a slow disk; well below the 10 s after which Docker
and the 90 s after which systemd send SIGKILL, so that the flush still has its time.
"""

ACCEPT_PAUSE = 0.1
"""Seconds to wait after accept() failed, most often for want of file descriptors.

The client stays in the queue and the socket readable: without a pause the loop would spin.
"""

UNIX_SEND_BUFFER = 1 << 20
"""Bytes; the kernel grants up to net.core.wmem_max. With its default of 208 KiB a reply of 256 KiB
takes two turns, which costs a fifth of the throughput. TCP tunes its buffers itself."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Those that end qemu-nbd in order."""

STATISTICS_SIGNAL = signal.SIGUSR1

log = logging.getLogger("nbdserve.server")


@dataclass(frozen=True, slots=True)
class Ready:
    """What can be told once clients are accepted.

    ``where`` has the port the kernel chose, or the absolute path of the unix socket;
    ``uri``, ``size`` (in bytes) and ``read_only`` are the first export's; ``others``: the URIs of
    the rest.
    """

    uri: str
    where: ListenConfig
    size: int
    read_only: bool
    others: Sequence[str] = ()


async def serve(
    config: ServeConfig,
    *,
    on_ready: Callable[[Ready], None],
    guardian: Guardian | None = None,
) -> None:
    """Serve an image until a stop signal, or until the last client has left.

    Must run in the main thread. ``on_ready`` is called once, when clients are accepted and
    the pid file is written; what it raises stops the server. A caller who does not want to be
    killed by a SIGUSR1 that comes too early or too late ignores it before. ``guardian``: who
    finishes the write-back if this process is killed (guardian.py).

    :raises NbdserveError: the image is refused, or an option cannot be honoured.
    :raises OSError: the last flush failed, or the image could not be closed.
    """
    received = (*STOP_SIGNALS, STATISTICS_SIGNAL)
    with _single_exception(), trio.open_signal_receiver(*received) as signals:
        async with trio.open_nursery() as nursery:
            wishes = _Wishes()
            nursery.start_soon(_watch_signals, signals, wishes)
            try:
                async with open_server(config, guardian=guardian) as server:
                    wishes.report = server.log_statistics
                    on_ready(server.ready)
                    nursery.start_soon(_stop_when_wished, wishes, server)
                    await server.stopped.wait()
            finally:
                if config.verbose:
                    wishes.report()
            nursery.cancel_scope.cancel()


class _Wishes:
    """What signals ask for. `report` logs the statistics, once there is a server that has some."""

    def __init__(self) -> None:
        self.stop = trio.Event()
        self.report: Callable[[], None] = lambda: None


async def _stop_when_wished(wishes: _Wishes, server: Server) -> None:
    await wishes.stop.wait()
    server.stop()


@contextlib.asynccontextmanager
async def open_server(
    config: ServeConfig, *, guardian: Guardian | None = None
) -> AsyncIterator[Server]:
    """A server that accepts clients while the body runs, in any thread that runs trio.

    It has no signals: `Server.stop` is how to end it, as is leaving the body, which returns when
    the image is closed. If the body raises or is cancelled, clients are cut off at once. Raises as
    `serve`, and what the body raises.
    """
    with (
        _single_exception(),
        contextlib.ExitStack() as at_end,
        shared_by_drives(config.groups, guardian) as shared,
    ):
        async with contextlib.AsyncExitStack() as drives:
            exports = []
            for image, what in config.served():
                backend = await drives.enter_async_context(open_backend(image, shared))
                multi_conn = config.max_clients != 1
                exports.append(Export(what.name, backend, what.description, multi_conn=multi_conn))
            listeners = await open_listeners(config.listen, backlog=_backlog(config))
            at_end.callback(listeners.remove)
            if config.pid_file is not None:
                at_end.enter_context(pid_file(config.pid_file))
            server = Server(listeners, exports, config)
            for export, uri in zip(exports, server.uris, strict=True):
                log.info("serving %s at %s", export.backend.filename, uri)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.run)
                    try:
                        yield server
                    finally:
                        server.stop()
            finally:
                server.close()


class Server:
    """The accept loops and the connections of one run. `uris`: of all `exports`, in order.
    `stopped`: it was asked to stop, or the last client has left if that is its end."""

    def __init__(
        self, listeners: Listeners, exports: Sequence[Export], config: ServeConfig
    ) -> None:
        self.exports = exports
        self.uris = [nbd_uri(listeners.where, export.name) for export in exports]
        self.stopped = trio.Event()
        self._listeners = listeners
        self._max_clients = config.max_clients
        self._persistent = config.persistent
        self._connections: dict[Connection, str] = {}  # with the client's name
        self._lines: dict[Connection, tuple[socket.socket, trio.CancelScope]] = {}
        self._nb_accepted = 0
        self._started = trio.current_time()
        self._room = trio.lowlevel.ParkingLot()
        self._engines: list[Completions] = list(
            {engine for export in exports for engine in export.backend.engines}
        )
        self._poller = Poller(self._engines)
        self._budget = Budget()
        for export in exports:
            export.backend.on_wait = self._poller.waits

    @property
    def ready(self) -> Ready:
        """What can be told of it."""
        first = self.exports[0].backend
        where, (uri, *others) = self._listeners.where, self.uris
        return Ready(uri, where, first.size, first.read_only, others)

    def stop(self) -> None:
        """Take no more clients, have those there are finish what is in flight, and end."""
        self.stopped.set()

    def disconnect(self) -> None:
        """Drop all clients, without a word and whatever they wait for; others may come."""
        for sock, scope in self._lines.values():
            with contextlib.suppress(OSError):  # it has gone itself
                sock.shutdown(socket.SHUT_RDWR)  # no reply leaves from here on
            scope.cancel()

    async def run(self) -> None:
        """Accept until ``stopped``; return when every connection has ended or was cut off."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._poller.run)
            nursery.start_soon(self._watch_memory)
            await self._accept_and_serve()
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """It runs no longer, though it may have been cancelled before it began to."""
        self._poller.close()

    async def _accept_and_serve(self) -> None:
        async with trio.open_nursery() as clients:
            async with trio.open_nursery() as acceptors:
                for listener in self._listeners.sockets:
                    acceptors.start_soon(self._accept_loop, listener, clients)
                await self.stopped.wait()
                acceptors.cancel_scope.cancel()
            self._listeners.close()
            for export in self.exports:
                export.backend.drain_begin()
            for connection in self._connections:
                connection.shutdown()
            clients.cancel_scope.deadline = trio.current_time() + SHUTDOWN_TIMEOUT
        if clients.cancel_scope.cancelled_caught:
            log.warning("clients that had not finished after %g s were cut off", SHUTDOWN_TIMEOUT)

    async def _watch_memory(self) -> None:
        while True:
            await trio.sleep(TICK)
            self._budget.look()

    def _full(self) -> bool:
        return 0 < self._max_clients <= len(self._connections)

    async def _accept_loop(self, listener: socket.socket, clients: trio.Nursery) -> None:
        # accept() itself never waits: between two listeners the last place could be given twice.
        failing = False
        while True:
            while self._full():
                await self._room.park()
            await trio.lowlevel.wait_readable(listener)
            if self._full():
                continue
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                if not failing:  # once, not ten times a second
                    log.warning(
                        "cannot accept a client: %s; it waits until it can be", error.strerror
                    )
                failing = True
                await trio.sleep(ACCEPT_PAUSE)
                continue
            failing = False
            if listener.family == socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER)
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setblocking(False)
            connection = Connection(
                sock, self.exports, self._poller,
                budget=self._budget, log=log.getChild("client"),
            )  # fmt: skip
            name = "{}:{}".format(*address[:2]) if address else "on the unix socket"
            self._connections[connection] = name
            self._lines[connection] = sock, trio.CancelScope()
            self._nb_accepted += 1
            clients.start_soon(self._run_client, connection, sock, name)

    async def _run_client(
        self, connection: Connection, sock: socket.socket, name: str
    ) -> None:
        log.info("client %s connected", name)
        try:
            with self._lines[connection][1]:
                await connection.run()
        except Exception as error:
            # A bug of ours; the other clients shall not suffer from it.
            log.error("client %s: internal error: %r", name, error)
            log.debug("client %s", name, exc_info=True)
        finally:
            sock.close()
            del self._connections[connection], self._lines[connection]
            self._room.unpark_all()
        log.info("client %s left", name)
        if not self._persistent and not self._connections and connection.negotiated:
            self.stopped.set()

    def statistics(self) -> dict[str, object]:
        """All counters there are, as json can hold them; docs/statistics.md says what they mean."""
        tree: dict[str, object] = plain(
            {
                "seconds": trio.current_time() - self._started,
                "clients": len(self._connections),
                "accepted": self._nb_accepted,
                "memory": self._budget.statistics(),
                "exports": {
                    export.name: export.backend.statistics() for export in self.exports
                },
                "connections": [
                    {"client": name, **connection.statistics()}
                    for connection, name in self._connections.items()
                ],
                "engines": [
                    {"name": engine.name, **plain(engine.statistics())}
                    for engine in self._engines
                ],
            }
        )
        return tree

    def log_statistics(self) -> None:
        """Log them. Never raises: who serves shall not suffer from who asks."""
        try:
            log_statistics(self.statistics())
        except Exception:
            log.exception("internal error in the statistics")


async def _watch_signals(signals: AsyncIterator[int], wishes: _Wishes) -> None:
    async for number in signals:
        if number == STATISTICS_SIGNAL:
            wishes.report()
        else:
            log.info("stopping: %s", signal.Signals(number).name)
            wishes.stop.set()


def _backlog(config: ServeConfig) -> int:
    """How many clients may wait to be accepted; follows qemu-nbd's ``main``."""
    if config.persistent or config.max_clients == 0:
        return socket.SOMAXCONN
    return min(config.max_clients, socket.SOMAXCONN)


@contextlib.contextmanager
def _single_exception() -> Generator[None]:
    """Nurseries wrap what is raised in groups; a caller wants the one exception inside."""
    try:
        yield
    except BaseExceptionGroup as group:
        inner: BaseException = group
        while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
            inner = inner.exceptions[0]
        if inner is group:
            raise
        raise inner from inner.__cause__

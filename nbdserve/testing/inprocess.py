"""A server for a test in its own process, in a thread with a trio of its own.

So a test of any kind can look into it and change it while it runs. `Server` of server.py is what
runs there. It has no guardian: it dies with the test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from nbdserve.config import ExportConfig, ImageConfig, ListenConfig, ServeConfig
from nbdserve.server import open_server
from nbdserve.testing.hosted import Hosted
from nbdserve.testing.logs import Log
from nbdserve.testing.served import Served

if TYPE_CHECKING:
    import os
    import pathlib
    from collections.abc import Callable

    from nbdserve.testing.images import NewDisk
    from nbdserve.testing.plan import Plan

__all__ = ["InProcess"]

R = TypeVar("R")


class InProcess(Served):
    """`backend`: what is served, to be touched by `call` alone."""

    def __init__(
        self,
        image: str | os.PathLike[str] | NewDisk,
        plan: Plan,
        *,
        folder: pathlib.Path | None = None,
        clients: int = 0,
        export: str = "",
        **settings: Any,  # noqa: ANN401 - ImageConfig's own
    ) -> None:
        super().__init__(image, plan, folder)
        self._clients = clients
        self._export = ExportConfig(export)
        self._settings = settings
        self._log = Log()

    @property
    def log(self) -> str:
        return str(self._log)

    def _start(self) -> None:
        config = ServeConfig(
            ImageConfig(self._plan.name(str(self.image)), **self._settings),
            self._export,
            ListenConfig(unix_path=str(self.socket)),
            max_clients=self._clients,
        )
        self._thread = Hosted(open_server(config), f"nbdserve at {self.socket}", self._log.open)
        try:
            self._server = self._thread.start()
        except BaseException:
            self._log.close()
            raise
        self.backend = self._server.exports[0].backend
        self.uri, self.size = self._server.uris[0], self.backend.size

    def _stop(self) -> None:
        try:
            self._thread.stop()
        finally:
            self._log.close()

    def call(self, function: Callable[..., R], *args: object) -> R:
        """A function's result, called in the server's thread, between two steps of its tasks."""
        return self._thread.call(function, *args)

    def statistics(self) -> dict[str, Any]:
        """All counters: docs/statistics.md."""
        return self.call(self._server.statistics)

    def disconnect(self) -> None:
        """Drop all clients, whatever they wait for; they may come again."""
        self.call(self._server.disconnect)

"""A server for a test in its own process, in a thread with a trio of its own.

So a test of any kind can look into it and change it while it runs. `Server` of server.py is what
runs there. It has no guardian: it dies with the test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from nbdserve.config import ListenConfig
from nbdserve.errors import ConfigError
from nbdserve.filters.power_cut import power_cut_of
from nbdserve.server import open_server
from nbdserve.testing.controls import FaultControl, fault_nodes
from nbdserve.testing.hosted import Hosted
from nbdserve.testing.images import InMemory
from nbdserve.testing.logs import Log
from nbdserve.testing.served import Served, running

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

    from nbdserve.block.backend import BlockBackend
    from nbdserve.powercut.powercut import Outcome, PowerCut
    from nbdserve.powercut.writelog import WriteLog
    from nbdserve.server import Server

__all__ = ["InProcess"]

R = TypeVar("R")


class InProcess(Served):
    """A server in a thread.

    faults, file_faults: what is going wrong above and below the format. backend: what is served, to
    be touched by `call` alone. An outcome or a content that is served has no `image`: it is in
    memory.
    """

    faults: FaultControl
    file_faults: FaultControl
    backend: BlockBackend

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - as Served
        super().__init__(*arguments, **settings)
        self._log = Log()
        self._power_cut: PowerCut | None = None

    @property
    def log(self) -> str:
        return str(self._log)

    def _start(self, folder: pathlib.Path) -> None:
        listen = ListenConfig(unix_path=str(self.socket))
        if isinstance(self._wanted, InMemory):
            filename = self._wanted.filename
            tree = self._plan.tree(self._wanted.content, filename)
            config = self._manner.config(filename, tree, listen)
        else:
            config = self._manner.config(self._plan.name(str(self.image)), None, listen)
        self._thread: Hosted[Server] = Hosted(
            open_server(config), f"nbdserve at {self.socket}", self._log.open
        )
        try:
            self._server = self._thread.start()
        except BaseException:
            self._log.close()
            raise
        try:
            self._look()
        except BaseException:
            self._stop()
            raise

    def _look(self) -> None:
        self.backend = self._server.exports[0].backend
        self.uri, self.size = self._server.uris[0], self.backend.size
        root = self.backend.root
        above, *_, below = fault_nodes(root)  # the plan has both
        self.faults = FaultControl(self._thread, above)
        self.file_faults = FaultControl(self._thread, below)
        self._power_cut = power_cut_of(root)

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

    # --- the disk, past the protocol ------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """What the disk holds, as its clients would read it. Raises OSError; ValueError: it ends
        before."""
        self._check(offset, length)
        buffer = bytearray(length)
        self._thread.run(self.backend.read, offset, memoryview(buffer))
        return bytes(buffer)

    def write(self, offset: int, data: bytes) -> None:
        """As a client's; raises as `read`."""
        self._check(offset, len(data))
        self._thread.run(self.backend.write, offset, data)

    def flush(self) -> None:
        """As a client's. Raises OSError."""
        self._thread.run(self.backend.flush)

    def _check(self, offset: int, length: int) -> None:
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"{length} bytes at {offset}: the disk has {self.size}")

    # --- power cuts -----------------------------------------------------------------------------

    @property
    def _power(self) -> PowerCut:
        if self._power_cut is None:
            raise ConfigError("for power cuts ask for power_cut='disk' or power_cut='file'")
        return self._power_cut

    def _ask(self, function: Callable[..., R], *args: object) -> R:
        """In the server's thread as long as there is one."""
        return self.call(function, *args) if self in running else function(*args)

    @property
    def write_log(self) -> WriteLog:
        return self._ask(self._power.log.copy)

    def mark(self, note: str) -> None:
        self._ask(self._power.mark, note)

    def _cut(self, seed: int) -> Outcome:
        power = self._power
        if self not in running:
            return power.cut(seed)

        def stop_the_world() -> Outcome:
            self._server.disconnect()
            return power.cut(seed)

        outcome = self.call(stop_the_world)
        self.stop()
        return outcome

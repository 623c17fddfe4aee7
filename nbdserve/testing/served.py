"""What servers for tests have in common: `Served`, started and stopped.

Law: whatever a test does, its server goes away with what it made; and what it logged is there
until then and after. Starting one takes milliseconds and asking it microseconds: synchronous
methods, whatever the test is, but for a context manager that does not hold up an event loop.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from nbdserve.listeners import MAX_UNIX_PATH
from nbdserve.powercut.powercut import outcomes_of
from nbdserve.testing.aside import aside
from nbdserve.testing.images import InMemory, NewDisk, free_path
from nbdserve.testing.plan import DISK
from nbdserve.testing.power import ServedOutcome

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

    from nbdserve.powercut.powercut import Outcome
    from nbdserve.powercut.writelog import WriteLog
    from nbdserve.testing.manner import Manner
    from nbdserve.testing.plan import Plan

__all__ = ["Served", "running"]

running: list[Served] = []
"""All that are started and not stopped, of this process. A process that is forked from it has none:
it would remove its parent's folders, and wait for threads that it has not."""

os.register_at_fork(after_in_child=running.clear)


class Served(ABC):
    """A server on a unix socket. `start` and `stop` it, or use it as a context manager: ``with`` in
    synchronous code, ``async with`` under trio and asyncio, whose loop then is not held up.

    uri, socket: where it is; image: the file; size: of the disk in bytes.
    """

    uri: str
    socket: pathlib.Path
    image: pathlib.Path
    size: int

    def __init__(
        self,
        image: str | os.PathLike[str] | NewDisk | InMemory,
        plan: Plan,
        manner: Manner,
        *,
        folder: pathlib.Path | None = None,
        socket: pathlib.Path | None = None,
    ) -> None:
        """`folder`: for the socket, and an image that is made; None: one that is removed at the
        end. So is that of a socket for which its name is too long. `socket`: where it shall be."""
        self._wanted = image
        self._plan = plan
        self._manner = manner
        self._folder = folder
        self._socket = socket
        self._made: list[str] = []

    @property
    @abstractmethod
    def log(self) -> str:
        """What it has logged so far, or the end of that."""

    @abstractmethod
    def _start(self, folder: pathlib.Path) -> None: ...

    @abstractmethod
    def _stop(self) -> None: ...

    def start(self) -> Self:
        """Returns when clients are accepted. Raises NbdserveError, OSError. Does nothing the second
        time, so that one of a fixture, which is started, can be used by ``with``."""
        if self in running:
            return self
        try:
            folder = self._folder or self._make_folder()
            self.socket = self._socket or self._free_socket(folder)
            self._find_image(folder)
            self._start(folder)
        except BaseException:
            self._remove()
            raise
        running.append(self)
        return self

    def _free_socket(self, folder: pathlib.Path) -> pathlib.Path:
        path = free_path(folder, "nbd", ".sock")
        fits = len(os.fsencode(path)) <= MAX_UNIX_PATH
        return path if fits else self._make_folder() / "nbd.sock"

    def _find_image(self, folder: pathlib.Path) -> None:
        if isinstance(self._wanted, NewDisk):
            self.image = self._wanted.make(folder, self._plan.format)
        elif not isinstance(self._wanted, InMemory):
            self.image = pathlib.Path(self._wanted).absolute()

    def stop(self) -> None:
        """Clients are dropped once what they asked is done, the image is flushed and closed. Raises
        OSError if that fails. Does nothing the second time."""
        if self not in running:
            return
        running.remove(self)
        try:
            self._stop()
        finally:
            self._remove()

    def _make_folder(self) -> pathlib.Path:
        self._made.append(tempfile.mkdtemp(prefix="nbdserve-"))
        return pathlib.Path(self._made[-1])

    def _remove(self) -> None:
        while self._made:
            shutil.rmtree(self._made.pop(), ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            return await aside(self.start)
        except BaseException:  # cancelled; else there is nothing to stop
            await aside(self.stop)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        await aside(self.stop)

    # --- power cuts: `power_cut` says where -----------------------------------------------------

    @property
    @abstractmethod
    def write_log(self) -> WriteLog:
        """A copy of what was done until now, to be saved and replayed. Raises ConfigError: nobody
        asked for `power_cut`."""

    @abstractmethod
    def mark(self, note: str) -> None:
        """A note of what has happened up to now, such as "order 7 is committed", for outcomes from
        now on. Raises ConfigError."""

    @abstractmethod
    def _cut(self, seed: int) -> Outcome: ...

    def cut(self, seed: int = 0) -> ServedOutcome:
        """Cut the power: clients are dropped, the server is gone, and nothing more reaches what is
        below the cut. What that may hold then: seed 0: all is lost that may be; 1: nothing is;
        another: by chance.

        May be called again, for another outcome of the same moment. Raises ConfigError.
        """
        return self._known(self._cut(seed))

    def all_cuts(self, limit: int, seed: int = 0) -> Iterator[ServedOutcome]:
        """Distinct outcomes, at most `limit`, as if the power had been cut at any moment until now.
        The server goes on. Raises ConfigError."""
        return map(self._known, outcomes_of(self.write_log, limit, seed))

    def _known(self, outcome: Outcome) -> ServedOutcome:
        is_disk = self._plan.power_cut == DISK
        named = self._wanted.filename if isinstance(self._wanted, InMemory) else str(self.image)
        return ServedOutcome.of(outcome, "raw" if is_disk else self._plan.format, named)


@atexit.register
def _stop_all() -> None:
    """For a program that forgets to: a process would outlive it, and a folder."""
    for served in reversed(running.copy()):
        with contextlib.suppress(Exception):
            served.stop()

"""What servers for tests have in common: `Served`, started and stopped.

Law: whatever a test does, its server goes away with what it made; and what it logged is there
until then and after. Starting one takes milliseconds and asking it microseconds: synchronous
methods, whatever the test is, but for a context manager that does not hold up an event loop.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self, TypeVar

import trio

from nbdserve.listeners import MAX_UNIX_PATH
from nbdserve.testing.images import NewDisk, free_path

if TYPE_CHECKING:
    import types
    from collections.abc import Callable

    from nbdserve.testing.plan import Plan

__all__ = ["Served", "running"]

R = TypeVar("R")

running: list[Served] = []
"""All that are started and not stopped, of this process."""


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
        self, image: str | os.PathLike[str] | NewDisk, plan: Plan, folder: pathlib.Path | None
    ) -> None:
        """`folder`: for the socket, and an image that is made; None: one that is removed at the
        end. So is that of a socket for which its name is too long."""
        self._wanted = image
        self._plan = plan
        self._folder = folder
        self._made: list[str] = []

    @property
    @abstractmethod
    def log(self) -> str:
        """What it has logged so far, or the end of that."""

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _stop(self) -> None: ...

    def start(self) -> Self:
        """Returns when clients are accepted. Raises NbdserveError, OSError."""
        try:
            folder = self._folder or self._make_folder()
            self.socket = free_path(folder, "nbd", ".sock")
            if len(os.fsencode(self.socket)) > MAX_UNIX_PATH:
                self.socket = self._make_folder() / "nbd.sock"
            if isinstance(self._wanted, NewDisk):
                self.image = self._wanted.make(folder, self._plan.format)
            else:
                self.image = pathlib.Path(self._wanted).absolute()
            self._start()
        except BaseException:
            self._remove()
            raise
        running.append(self)
        return self

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
        return await _aside(self.start)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        await _aside(self.stop)


async def _aside(function: Callable[[], R]) -> R:
    """Call it in a thread, under trio or asyncio; it is waited for even if that is cancelled."""
    if trio.lowlevel.in_trio_run():
        with trio.CancelScope(shield=True):
            return await trio.to_thread.run_sync(function)
    import asyncio

    return await asyncio.shield(asyncio.to_thread(function))

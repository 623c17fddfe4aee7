"""A server for a test as a process of its own: what its users run.

It can be killed, and its cache and engine are its own. What a test cannot do to it is look into it:
faults are those it was started with, switched on and off by `if_file`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING

from nbdserve.errors import NbdserveError
from nbdserve.testing.images import disk_size
from nbdserve.testing.served import Served

if TYPE_CHECKING:
    import pathlib

    from nbdserve.testing.images import NewDisk
    from nbdserve.testing.plan import Plan

__all__ = ["Process"]

STOP_SECONDS = 60.0
"""A server takes 5 s for its clients, and what its disk takes for the last flush."""


class Process(Served):
    """``nbdserve serve`` with what a plan says. `process`: the subprocess, while it is started."""

    process: subprocess.Popen[bytes]

    def __init__(
        self,
        image: str | os.PathLike[str] | NewDisk,
        plan: Plan,
        *,
        folder: pathlib.Path | None = None,
        **options: object,
    ) -> None:
        """`options`: of the command line, by their long names; True is one without a value."""
        super().__init__(image, plan, folder)
        self._options = options
        self._stderr: IO[bytes] | None = None
        self._killed = False

    @property
    def log(self) -> str:
        if self._stderr is None:
            return ""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")

    def _start(self) -> None:
        words = []
        for name, value in self._options.items():
            if value not in (None, False):
                option = "--" + name.replace("_", "-")
                words.append(option if value is True else f"{option}={value}")
        argv = [sys.executable, "-m", "nbdserve", "serve", "-v", f"--socket={self.socket}",
                *words, "--", self._plan.name(str(self.image))]
        self._stderr = tempfile.TemporaryFile(prefix="nbdserve-")  # noqa: SIM115 - until the end
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._stderr
        )
        assert self.process.stdout is not None
        # The first line is the URI; without it the server has ended.
        self.uri = self.process.stdout.readline().decode().strip()
        if not self.uri:
            self.process.wait()
            raise NbdserveError(self._last_words())
        self.size = disk_size(self.image, self._plan.format)

    @property
    def pid(self) -> int:
        """Of the server; its guardian is a child of it."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL: it gets no chance to do anything about it. What it has answered its guardian
        finishes."""
        self.process.kill()
        self.process.wait()
        self._killed = True

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise NbdserveError(f"the server did not end in {STOP_SECONDS:g} s") from None
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()
        if status and not self._killed:
            raise NbdserveError(f"the server ended with status {status}: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.splitlines() or ["it said nothing"]
        return lines[-1].removeprefix("nbdserve: ")

"""A server for a test as a process of its own: what its users run.

It can be killed, and its cache and engine are its own. What a test cannot do to it is look into it:
faults are those it was started with, switched on and off by `if_file`. Its power is cut by killing
it: what it was doing it tells a file, before it does it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Any

from nbdserve.errors import ConfigError, NbdserveError
from nbdserve.powercut.powercut import PowerLost, outcome_of
from nbdserve.testing.greeting import export_size
from nbdserve.testing.images import InMemory, free_path
from nbdserve.testing.power import StreamedLog
from nbdserve.testing.served import Served, running

if TYPE_CHECKING:
    from nbdserve.powercut.powercut import Outcome
    from nbdserve.powercut.writelog import WriteLog

__all__ = ["Process"]

STOP_SECONDS = 60.0
"""A server takes 5 s for its clients, and what its disk takes for the last flush."""


class Process(Served):
    """``nbdserve serve`` with what a plan says. `process`: the subprocess, once it is started."""

    process: subprocess.Popen[bytes]

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - as Served
        super().__init__(*arguments, **settings)
        self._stderr: IO[bytes] | None = None  # while it runs
        self._said = ""
        self._killed = False
        self._streamed: StreamedLog | None = None
        self._whole: WriteLog | None = None

    @property
    def log(self) -> str:
        if self._stderr is None:
            return self._said
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), size, 0).decode(errors="replace")

    def _start(self, folder: pathlib.Path) -> None:
        if isinstance(self._wanted, InMemory):
            self.image = self._wanted.save(folder, self._plan.format)
        plan = self._plan
        if plan.power_cut is not None:
            path = pathlib.Path(plan.write_log or free_path(folder, "writes", ".log"))
            self._streamed = StreamedLog(path.absolute())
            plan = dataclasses.replace(plan, write_log=path)
        argv = [sys.executable, "-m", "nbdserve", "serve", "-v", f"--socket={self.socket}",
                *self._manner.words(), "--", plan.name(str(self.image))]
        self._killed, self._whole = False, None
        self._stderr = tempfile.TemporaryFile(prefix="nbdserve-")  # noqa: SIM115 - the log's
        try:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._stderr
            )
        except BaseException:
            self._stderr.close()
            raise
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise

    def _wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        # The first line is the URI; without it the server has ended.
        self.uri = self.process.stdout.readline().decode().strip()
        if not self.uri:
            self.process.wait()
            raise NbdserveError(self._last_words())
        self.size = export_size(self.socket, self._manner.export)

    @property
    def pid(self) -> int:
        """Of the server; its guardian is a child of it."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL: it gets no chance to do anything about it. What it has answered its guardian
        finishes, and whoever opens the image waits for that."""
        self._killed = True
        self.process.kill()
        self.process.wait()

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise NbdserveError(f"the server did not end in {STOP_SECONDS:g} s") from None
        finally:
            self._end()
            if self._streamed is not None:
                self._whole = self._streamed.read()  # the file may go with its folder
        if status and not self._killed:
            raise NbdserveError(f"the server ended with status {status}: {self._last_words()}")

    def _end(self) -> None:
        """It has ended, or is made to; what is left of it goes."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self._stderr is not None:
            said = self.log
            self._stderr.close()
            self._said, self._stderr = said, None

    def _last_words(self) -> str:
        lines = self.log.splitlines() or ["it said nothing"]
        return lines[-1].removeprefix("nbdserve: ")

    # --- power cuts -----------------------------------------------------------------------------

    @property
    def _log_file(self) -> StreamedLog:
        if self._streamed is None:
            raise ConfigError("for power cuts ask for power_cut='disk' or power_cut='file'")
        return self._streamed

    @property
    def write_log(self) -> WriteLog:
        streamed = self._log_file
        return streamed.read() if self._whole is None else self._whole

    def mark(self, note: str) -> None:
        if self.process.poll() is not None:
            raise PowerLost
        self._log_file.mark(note)

    def _cut(self, seed: int) -> Outcome:
        self._log_file  # noqa: B018 - raises, if there is none
        if self in running:
            self.kill()
            self.stop()
        log = self.write_log
        return outcome_of(log, len(log), seed)

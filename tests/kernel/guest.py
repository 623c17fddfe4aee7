"""A guest with a real kernel: started, told what to run, ended.

Facts (measured on Debian 12, QEMU 7.2): emulation with one thread is reliable and, for this,
faster than with several; without `-cx16` Linux 6.12 crashes in every second run; KVM is not
needed, and where it is itself emulated it hangs, so it is never used. The boot takes 2 s. The
guest sees the host's 127.0.0.1 as 10.0.2.2.

The guest is driven over its second serial port (see `init`). Everything that waits has a deadline,
after which the guest is killed; it dies with this process too (setpriv --pdeathsig).
"""

import base64
import contextlib
import dataclasses
import os
import pathlib
import re
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

import peers
from kernel.initramfs import initramfs

GUEST_TEST = pytest.mark.peer(
    "guest-kernel", "qemu-system-x86_64", "busybox", "setpriv", "nbd-client", "mke2fs", "mkfs.xfs")
"""Marks a test that takes a guest: what that is made of."""

CPUS = 4
"""The NBD driver opens no more queues than there are CPUs, however many connections it has."""

PATIENCE = 300.0
"""Seconds without a word from the guest after which it is given up. Far above what is ever needed,
so that a loaded machine fails no test."""

_PORT = re.compile(r":(\d+)(?:/|$)")


class GuestFailed(AssertionError):
    """The guest or a script in it did not do what it should; the message has what it said."""


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A script that has ended. `output`: stdout and stderr together."""

    status: int
    output: str


class Guest:
    """A running guest; use `started`."""

    def __init__(self, process: "subprocess.Popen[bytes]", console: pathlib.Path) -> None:
        self._process = process
        self._console = console
        self._received = b""
        self.broken = False

    def run(
        self, script: str, *, check: bool = True,
        on_word: Callable[[str], object] = lambda _: None,
    ) -> Done:
        """Run a shell script in the guest to its end; it has the function `attach` (see there).
        `on_word` is called with each line that it writes to descriptor 3, when it does.

        Raises `GuestFailed` if it exits with another status than 0 (unless `check` is false), and,
        with the guest killed, if it says nothing for `PATIENCE` seconds.
        """
        self._send(base64.b64encode(b"set -eu\n. /attach\n" + script.encode()) + b"\n")
        while True:
            word, _, rest = self._line().partition(" ")
            if word == "end":
                break
            on_word(f"{word} {rest}".strip())
        status, _, output = rest.partition(" ")
        done = Done(int(status), base64.b64decode(output).decode(errors="replace"))
        if check and done.status != 0:
            raise GuestFailed(f"exit status {status} of\n{script}\n{done.output}{self._told()}")
        return done

    def wait_until_ready(self) -> None:
        line = self._line()
        if line != "ready":
            raise GuestFailed(f"the guest said {line!r} when it should be ready{self._told()}")

    def kill(self) -> None:
        """Cut its power."""
        self.broken = True
        self._process.kill()
        self._process.wait()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError as error:
            self.broken = True
            raise GuestFailed(f"the guest is gone: {error}{self._told()}") from None

    def _line(self) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            ready = select.select([self._process.stdout], [], [], max(left, 0))[0]
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not data:
                self.kill()
                why = "ended by itself" if ready else "did not answer in time and was killed"
                raise GuestFailed(f"the guest {why}{self._told()}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line.decode(errors="replace").strip("\r")

    def _told(self) -> str:
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return f"\nits console:\n{text[-6000:]}" if text else ""


@contextlib.contextmanager
def started() -> Iterator[Guest]:
    """Boot a guest; it is killed at the end, having nothing to lose."""
    kernel = peers.guest_kernel().resolve()
    archive = initramfs(kernel)
    with tempfile.TemporaryDirectory(prefix="guest-") as folder:
        console = pathlib.Path(folder, "console")
        process = subprocess.Popen(
            _command(kernel / "vmlinuz", archive, console),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        guest = Guest(process, console)
        try:
            guest.wait_until_ready()
            yield guest
        finally:
            guest.kill()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()


def _command(vmlinuz: pathlib.Path, archive: pathlib.Path, console: pathlib.Path) -> list[str]:
    flags = (
        f"-M q35 -accel tcg,thread=single -cpu max,-cx16 -smp {CPUS} -m 512 -nodefaults"
        " -no-user-config -display none -monitor none -no-reboot"
        " -netdev user,id=n0,ipv6=off -device virtio-net-pci,netdev=n0,romfile="
    )
    return [
        "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", *shlex.split(flags),
        "-serial", f"file:{console}", "-serial", "stdio",
        "-kernel", str(vmlinuz), "-initrd", str(archive),
        "-append", "console=ttyS0 quiet loglevel=5 panic=-1",
    ]  # fmt: skip


def port_of(server: peers.Server) -> int:
    """The TCP port of a server that listens on 127.0.0.1."""
    found = _PORT.search(server.uri)
    assert found is not None, server.uri
    return int(found[1])

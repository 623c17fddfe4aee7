"""Programs of others, and our own server as a process, for tests and benchmarks.

Everything here runs real programs: nothing is imported from nbdserve, so what a test proves
with it holds for a user's shell too.  A test says which programs it needs with
`@pytest.mark.peer("qemu-img", ...)` (tests/conftest.py); the functions here take them for
granted and raise `PeerFailed` with the whole command and its output when one fails.

Sockets live in short directories of their own: a unix socket's path holds 107 bytes, which
pytest's tmp_path can exceed.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

# A module of the distribution's own Python, invisible to a virtual environment.
LIBNBD = "python3-libnbd"
SYSTEM_TRIO = "python3-trio"  # and python3-construct
NBDKIT_PYTHON = "nbdkit-python"
STRACE = "strace"
# No programs, but what a machine may be without all the same: containers may forbid the first two,
# and file systems in memory have no use for the third.
IO_URING = "io_uring"
LINUX_AIO = "Linux AIO"
O_DIRECT = "O_DIRECT"
# A kernel for tests/kernel: unpacked, not installed (tools/guest-kernel.sh).
GUEST_KERNEL = "guest-kernel"
KERNELS = pathlib.Path(__file__).parents[1] / "build" / "kernel"
SYSTEM_PYTHON = "/usr/bin/python3"
# nbd-client is in /usr/sbin, which is not on every user's PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

URI = re.compile(r"\bnbds?(?:\+unix)?://\S+")
NBDSERVE = (sys.executable, "-m", "nbdserve")
NBDSERVE_NBDKIT = (*NBDSERVE, "nbdkit")
QCOW2_PLUGIN = pathlib.Path(__file__).parents[1] / "plugins" / "qcow2.py"
GREETING = b"NBDMAGIC"
READY_SECONDS = 15.0  # far above what a start takes, so that a loaded machine fails no test
STOP_SECONDS = 30.0  # an orderly stop may have data to flush
POLL_SECONDS = 0.005

PathLike = str | os.PathLike[str]


class PeerFailed(AssertionError):
    """A program ended otherwise than it should; the message has its command and output."""


def have(program: str) -> bool:
    """Whether a program that `@pytest.mark.peer` may name, or what else it may (`PROBES`), can be
    run here."""
    probe = PROBES.get(program)
    return shutil.which(program, path=SEARCH_PATH) is not None if probe is None else probe()


def _has_libnbd() -> bool:
    probe = [SYSTEM_PYTHON, "-I", "-c", "import nbd"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _has_nbdkit_python() -> bool:
    """nbdkit and its Python plugin."""
    try:
        return subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True,
                              check=False).returncode == 0
    except FileNotFoundError:
        return False


def _has_system_trio() -> bool:
    probe = [SYSTEM_PYTHON, "-I", "-c", "import trio, construct"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _may_trace() -> bool:
    """Installed is not enough: containers may forbid ptrace."""
    if shutil.which(STRACE) is None:
        return False
    probe = [STRACE, "-o", os.devnull, "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _may_use_io_uring() -> bool:
    """By io_uring_setup(2), which has this number on every architecture that Python runs on."""
    number, parameters = 425, ctypes.create_string_buffer(120)
    ring = ctypes.CDLL(None).syscall(number, 1, parameters)
    if ring >= 0:
        os.close(ring)
    return bool(ring >= 0)


def _may_use_linux_aio() -> bool:
    """By io_setup(2) and io_destroy(2)."""
    setup, destroy = (206, 207) if os.uname().machine == "x86_64" else (0, 1)
    libc, context = ctypes.CDLL(None), ctypes.c_ulong(0)
    if libc.syscall(setup, 1, ctypes.byref(context)) != 0:
        return False
    libc.syscall(destroy, context)
    return True


def _has_o_direct() -> bool:
    """Whether temporary files can be read past the page cache.  File systems in memory let new
    kernels open them so, and it means nothing."""
    folder = tempfile.gettempdir()
    kind = run("stat", "--file-system", "--format=%T", folder).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        return False
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError:
            return False
    return True


PROBES: dict[str, Callable[[], bool]] = {
    LIBNBD: _has_libnbd,
    SYSTEM_TRIO: _has_system_trio,
    NBDKIT_PYTHON: _has_nbdkit_python,
    STRACE: _may_trace,
    GUEST_KERNEL: lambda: guest_kernel().joinpath("vmlinuz").exists(),
    IO_URING: _may_use_io_uring,
    LINUX_AIO: _may_use_linux_aio,
    O_DIRECT: _has_o_direct,
}
"""How to find out what is more than a program on the PATH."""


def guest_kernel() -> pathlib.Path:
    """The folder of the guest's kernel; NBDSERVE_KERNEL names another than the default one."""
    return KERNELS / os.environ.get("NBDSERVE_KERNEL", "default")


def run(*command: PathLike, check: bool = True, timeout: float = 120, stdin: str | None = None
        ) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end; stdout and stderr are captured as text.

    Raises `PeerFailed` when it exits with another status than 0 (unless `check` is false) or
    runs longer than `timeout` seconds.
    """
    argv = [os.fspath(word) for word in command]
    program = shutil.which(argv[0], path=SEARCH_PATH) or argv[0]
    try:
        done = subprocess.run(
            [program, *argv[1:]], input=stdin, capture_output=True, text=True, errors="replace",
            timeout=timeout, check=False)
    except subprocess.TimeoutExpired as late:
        raise PeerFailed(f"{shlex.join(argv)}: not done after {timeout} s") from late
    if check and done.returncode != 0:
        raise PeerFailed(_told(argv, done.returncode, done.stdout, done.stderr))
    return done


def qemu_img(*arguments: PathLike) -> str:
    """`qemu-img ...`; returns its stdout."""
    return run("qemu-img", *arguments).stdout


def qemu_io(image: PathLike, *commands: str, options: tuple[str, ...] = ()) -> str:
    """`qemu-io -c COMMAND... IMAGE` (an image or a URI); returns its stdout.

    qemu-io exits with 0 after a pattern that differs, so its words are read too.
    """
    words = [word for command in commands for word in ("-c", command)]
    done = run("qemu-io", *options, *words, image)
    if "Pattern verification failed" in done.stdout:
        raise PeerFailed(_told(["qemu-io", *words, str(image)], 0, done.stdout, done.stderr))
    return done.stdout


def qemu_img_check(image: PathLike, *, format: str = "qcow2") -> None:
    """Raise `PeerFailed` unless `qemu-img check` finds nothing: no corruption and no leak."""
    command = ["qemu-img", "check", "--output=json", "-f", format, os.fspath(image)]
    done = run(*command, check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        report = {"check-errors": 1}
    found = [kind for kind in ("corruptions", "leaks", "check-errors") if report.get(kind)]
    if done.returncode != 0 or found:
        raise PeerFailed(_told(command, done.returncode, done.stdout, done.stderr))


def qemu_img_compare(one: PathLike, other: PathLike) -> None:
    """Raise `PeerFailed` unless both (images or URIs) hold the same bytes and size.

    Where they have holes may differ, so it is not the strict mode that compares them; without
    that a size that differs, by zeroes, is but a warning on stdout.
    """
    command = ["qemu-img", "compare", os.fspath(one), os.fspath(other)]
    done = run(*command)
    if done.stdout != "Images are identical.\n":
        raise PeerFailed(_told(command, 0, done.stdout, done.stderr))


def libnbd(script: str, *arguments: PathLike) -> str:
    """Run a Python script that may `import nbd`, under the system's Python; returns stdout."""
    return run(SYSTEM_PYTHON, "-I", "-c", script, *arguments).stdout


@dataclasses.dataclass(slots=True)
class Server:
    """A server that accepts clients.  `socket_path` is where, if on a unix socket."""

    uri: str
    socket_path: pathlib.Path
    process: "subprocess.Popen[bytes]"
    _stdout: pathlib.Path
    _stderr: pathlib.Path
    _killed: bool = False

    def stdout(self) -> str:
        """What it has written to stdout so far."""
        return self._stdout.read_text(errors="replace")

    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._stderr.read_text(errors="replace")

    def kill(self) -> None:
        """End it by SIGKILL: it gets no chance to do anything about it."""
        self.process.kill()
        self.process.wait()
        self._killed = True

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to stop and wait for its end, unless it has ended already.

        Raises `PeerFailed` unless it exits with 0 within `STOP_SECONDS` and without a traceback,
        or was ended by `kill`.
        """
        if self._killed:
            return
        if self.process.poll() is None:
            self.process.send_signal(signum)
        argv = [str(word) for word in self.process.args]  # type: ignore[union-attr]
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise PeerFailed(
                f"{shlex.join(argv)}: still running {STOP_SECONDS} s after {signum.name}"
            ) from None
        if status != 0 or "Traceback (most recent call last)" in self.stderr():
            raise PeerFailed(_told(argv, status, self.stdout(), self.stderr()))


@contextlib.contextmanager
def served(image: PathLike, *options: str, command: str = "serve", bind: str | None = None,
           program: Sequence[PathLike] = NBDSERVE) -> Iterator[Server]:
    """Our server as a process of its own: on a unix socket, or on a free port of address `bind`;
    `program` is another way to start it.

    Ready means what it means to a user: `serve` has the URI on stdout; `command="qemu-nbd"`,
    which prints nothing, greets a client.  Afterwards it is stopped by SIGTERM; what must
    hold then `Server.stop` says, and it is checked when the body succeeded.
    """
    def ready(server: Server) -> str | None:
        said = URI.search(server.stdout())
        return said and said[0]

    def argv(socket_path: pathlib.Path) -> list[str]:
        where = ["-k", str(socket_path)] if bind is None else ["-b", bind, "-p", "0"]
        words = [*program, command, *where, *options, image]
        return [os.fspath(word) for word in words]

    with _running(argv, ready if command == "serve" else _greets) as server:
        yield server


@contextlib.contextmanager
def qemu_nbd(image: PathLike, *options: str, format: str = "qcow2",
             program: Sequence[str] = ("qemu-nbd",)) -> Iterator[Server]:
    """qemu-nbd on a unix socket, for any number of clients, until it is told to stop."""
    def argv(socket_path: pathlib.Path) -> list[str]:
        return [*program, "-k", str(socket_path), "--persistent", "--shared=0",
                "-f", format, *options, os.fspath(image)]

    with _running(argv, _greets) as server:
        yield server


@contextlib.contextmanager
def nbdkit(
    *arguments: PathLike, program: Sequence[PathLike] = ("nbdkit",)
) -> Iterator[Server]:
    """`nbdkit ARGUMENTS` (options, plugin and its parameters) on a unix socket; `program` is
    another way to start it."""
    def argv(socket_path: pathlib.Path) -> list[str]:
        words = [*program, "--foreground", "--unix", socket_path, *arguments]
        return [os.fspath(word) for word in words]

    with _running(argv, _greets) as server:
        yield server


def _greets(server: Server) -> str | None:
    """Ready as seen from outside, for servers that say nothing: a client gets the greeting.

    That a connection succeeds says less: qemu-nbd listens before it opens the image, and
    accepts afterwards.  A server that gives up meanwhile closes the connection.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(READY_SECONDS)
        try:
            probe.connect(str(server.socket_path))
            greeting = probe.recv(len(GREETING), socket.MSG_WAITALL)
        except OSError:
            return None
    return server.uri if greeting == GREETING else None


@contextlib.contextmanager
def _running(
    make_argv: Callable[[pathlib.Path], list[str]], ready: Callable[[Server], str | None]
) -> Iterator[Server]:
    """Start a server, wait until `ready` gives its URI, stop it after the body."""
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        place = pathlib.Path(folder)
        socket_path = place / "socket"
        argv = make_argv(socket_path)
        # Files, not pipes: nobody reads while the body runs, and a full pipe stops the server.
        with open(place / "stdout", "wb") as stdout, open(place / "stderr", "wb") as stderr:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        server = Server(
            f"nbd+unix:///?socket={socket_path}", socket_path, process,
            place / "stdout", place / "stderr")
        try:
            deadline = time.monotonic() + READY_SECONDS
            while (uri := ready(server)) is None:
                if process.poll() is not None:
                    raise PeerFailed(
                        _told(argv, process.returncode, server.stdout(), server.stderr()))
                if time.monotonic() > deadline:
                    raise PeerFailed(f"{shlex.join(argv)}: not ready after {READY_SECONDS} s")
                time.sleep(POLL_SECONDS)
            server.uri = uri
            yield server
            server.stop()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _told(argv: list[str], status: int, stdout: str, stderr: str) -> str:
    parts = [f"{shlex.join(argv)}: exit status {status}"]
    parts += [f"{name}:\n{text}" for name, text in (("stdout", stdout), ("stderr", stderr)) if text]
    return "\n".join(parts)

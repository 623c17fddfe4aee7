"""The program as its users start it: processes, signals, --fork, the pid file."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

NBDSERVE = [sys.executable, "-m", "nbdserve"]
LONG = 20.0


@pytest.fixture
def folder(monkeypatch):
    """A directory with a short name, holding an image; the current one."""
    made = pathlib.Path(tempfile.mkdtemp(prefix="nbd"))
    monkeypatch.chdir(made)
    (made / "disk").write_bytes(bytes(1 << 20))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def start():
    """Start nbdserve in the background; what still runs at the end is killed."""
    running = []

    def start(*argv):
        process = subprocess.Popen(
            [*NBDSERVE, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process, number=signal.SIGTERM):
    """Stop a server; its exit status and the rest of its stdout and stderr."""
    process.send_signal(number)
    status = process.wait(LONG)  # what it prints fits into the pipes
    return status, process.stdout.read(), process.stderr.read()


def accepts(path) -> bool:
    """Whether somebody listens. The file alone says less: it is there a moment earlier."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def greeted(path) -> bool:
    """Whether a client that connects is greeted as the NBD protocol says."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LONG)
        client.connect(str(path))
        return client.recv(8) == b"NBDMAGIC"


def wait_until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid) -> bool:
    # A daemon whose parent has exited may stay as a zombie where nobody reaps.
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_serve_prints_the_uri_then_how_to_use_it(folder, start):
    server = start("serve", "-f", "raw", "-k", "s", "-x", "my disk", "disk")
    uri = f"nbd+unix:///my%20disk?socket={folder}/s"
    assert server.stdout.readline() == uri + "\n"
    assert greeted(folder / "s")
    status, out, err = finish(server)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"  qemu-img info '{uri}'",
        f"  nbdcopy '{uri}' copy.img",
        f"  nbd-client -unix {folder}/s /dev/nbd0 -N 'my disk'    # as root, after modprobe nbd",
    ]
    assert os.listdir(folder) == ["disk"]


def test_serve_on_tcp(folder, start):
    server = start("serve", "-f", "raw", "-p", "0", "disk")
    uri = server.stdout.readline().rstrip("\n")
    port = re.fullmatch(r"nbd://127\.0\.0\.1:([0-9]+)/", uri)[1]
    with socket.create_connection(("127.0.0.1", int(port)), timeout=LONG) as client:
        assert client.recv(8) == b"NBDMAGIC"
    refused = start("serve", "-f", "raw", "-p", port, "-r", "--export-name=other", "disk")
    out, err = refused.communicate(timeout=LONG)
    assert (refused.returncode, out) == (1, "")
    assert err.count("\n") == 1
    # The image's lock or the port: whichever is asked for first.
    assert port in err or "disk" in err
    status, out, err = finish(server, signal.SIGINT)
    assert (status, err) == (0, "")
    assert f"nbd-client 127.0.0.1 {port} /dev/nbd0 " in out


def test_a_port_in_use_is_named(folder, start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = start("serve", "-f", "raw", "-p", str(port), "disk")
        out, err = server.communicate(timeout=LONG)
    assert (server.returncode, out) == (1, "")
    assert err == f"nbdserve: --port: {port} on 127.0.0.1: Address already in use\n"


def test_qemu_nbd_is_silent_and_ends_on_sigterm(folder, start):
    server = start("qemu-nbd", "-f", "raw", "-x", "", "-k", str(folder / "s"), "disk")
    wait_until(lambda: accepts(folder / "s"))
    assert greeted(folder / "s")
    assert finish(server) == (0, "", "")
    assert not (folder / "s").exists()


def test_a_reader_that_leaves_early_does_not_end_the_server(folder, start):
    read_end, write_end = os.pipe()
    os.close(read_end)
    server = subprocess.Popen(
        [*NBDSERVE, "serve", "-f", "raw", "-k", "s", "disk"],
        stdout=write_end, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write_end)
    with server:
        wait_until(lambda: accepts(folder / "s"))
        assert greeted(folder / "s")
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=LONG)[1] == ""
    assert server.returncode == 0


@pytest.mark.parametrize("command", ["serve", "qemu-nbd"])
def test_fork_returns_when_clients_are_accepted(folder, command):
    # capture_output reads to the end: a daemon that kept the streams would block this.
    done = subprocess.run(
        [*NBDSERVE, command, "--fork", "-f", "raw", "-k", "s", "--pid-file", "p", "disk"],
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    pid = int((folder / "p").read_text())
    try:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("nbd+unix:///?socket=") == (command == "serve")
        assert greeted(folder / "s")
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) == pid
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_running(pid))
    assert os.listdir(folder) == ["disk"]


def test_fork_with_verbose_keeps_stderr(folder):
    with open(folder / "log", "w") as log:
        done = subprocess.run(
            [*NBDSERVE, "serve", "--fork", "-v", "-f", "raw", "-k", "s", "--pid-file", "p", "disk"],
            stdout=subprocess.DEVNULL, stderr=log, timeout=LONG, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    pid = int((folder / "p").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_running(pid))
    assert "nbdserve: stopping: SIGTERM" in (folder / "log").read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["missing"], "missing: No such file or directory"),
        (["-k", "no/s", "disk"], "no/s: No such file or directory"),
        (["-k", "s", "--pid-file", "no/p", "disk"], "no/p: No such file or directory"),
    ],
)
def test_fork_reports_what_went_wrong(folder, argv, said):
    done = subprocess.run(
        [*NBDSERVE, "serve", "--fork", "-f", "raw", *argv],
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(said + "\n")
    assert os.listdir(folder) == ["disk"]


def test_a_stale_socket_of_a_killed_server_is_replaced(folder, start):
    killed = start("serve", "-f", "raw", "-k", "s", "disk")
    killed.stdout.readline()
    killed.kill()
    killed.wait(LONG)
    assert (folder / "s").is_socket()
    server = start("serve", "-f", "raw", "-k", "s", "disk")
    assert server.stdout.readline().startswith("nbd+unix:")
    assert greeted(folder / "s")
    assert finish(server)[0] == 0


def test_create_then_serve(folder, start):
    done = subprocess.run(
        [*NBDSERVE, "create", "new.qcow2", "1G"],
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    said = "Formatting 'new.qcow2', fmt=qcow2 size=1073741824\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    server = start("serve", "-k", "s", "new.qcow2")
    assert server.stdout.readline().startswith("nbd+unix:")
    assert finish(server)[0] == 0


def test_create_says_nothing_when_quiet(folder):
    done = subprocess.run(
        [*NBDSERVE, "create", "-q", "-b", "disk", "-F", "raw", "new.qcow2"],
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "new.qcow2").read_bytes()[:4] == b"QFI\xfb"


def test_create_overwrites_what_nobody_uses_and_nothing_else(folder, start):
    create = [*NBDSERVE, "create", "-q", "disk", "2M"]
    server = start("serve", "-f", "raw", "-k", "s", "disk")
    server.stdout.readline()
    done = subprocess.run(create, capture_output=True, text=True, timeout=LONG, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nbdserve: disk: ")
    assert done.stderr.count("\n") == 1
    assert (folder / "disk").read_bytes() == bytes(1 << 20)
    assert finish(server)[0] == 0
    done = subprocess.run(create, capture_output=True, text=True, timeout=LONG, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (folder / "disk").read_bytes()[:4] == b"QFI\xfb"


# A server that is gone as soon as it is asked to serve, and SIGUSR1 before and after that.
TOO_EARLY_AND_TOO_LATE = """
import os, signal
from nbdserve import server

async def serve(config, *, on_ready, guardian):
    os.kill(os.getpid(), signal.SIGUSR1)

server.serve = serve
from nbdserve.cli.serve import command
command.main(["disk"], standalone_mode=False)
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""


def test_asking_for_statistics_outside_of_serving_kills_nobody(folder):
    done = subprocess.run(
        [sys.executable, "-c", TOO_EARLY_AND_TOO_LATE], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "alive\n", "")

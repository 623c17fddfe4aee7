"""examples/systemd: systemd takes the units, what they start serves and is allowed what it does, a
guardian has time."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time

import pytest

import peers

WRITE = (
    "import nbd, sys; handle = nbd.NBD(); handle.connect_unix(sys.argv[1]);"
    " handle.pwrite(b'x' * 1048576, 1048576)"  # and no flush
)


def lines(unit):
    """key -> value of a unit's file, the last one."""
    text = unit.read_text().replace("\\\n", " ")
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] != "#")


@pytest.fixture
def units(example):
    """The folder, with the path of this installation in place of that of the example."""
    copy = example("systemd")
    unit = copy.folder / "nbdserve@.service"
    program = str(copy.there / "bin" / "nbdserve")
    unit.write_text(unit.read_text().replace("/opt/nbdserve/bin/nbdserve", program))
    return copy


@pytest.mark.peer("systemd-analyze", "nbd-client")
@pytest.mark.parametrize("name", ["nbdserve", "nbd-attach"])
def test_systemd_takes_it(units, name):
    done = units.run("systemd-analyze", "verify", "--man=no", f"./{name}@data.service")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.fixture
def unit(units, tmp_path):
    """The server's unit with its specifiers resolved, its folders, and an image: key -> value."""
    unit = lines(units.folder / "nbdserve@.service")
    for word, value in {"%t": tmp_path, "%S": tmp_path, "%i": "data"}.items():
        unit = {key: text.replace(word, str(value)) for key, text in unit.items()}
    (tmp_path / unit["RuntimeDirectory"]).mkdir(parents=True)
    peers.qemu_img("create", "-f", "qcow2", tmp_path / unit["StateDirectory"] / "data.qcow2", "16M")
    return unit


def allowed(unit):
    """The names of system calls that a set of systemd's has, with those of the sets in it."""
    names, sets = set(), [unit["SystemCallFilter"]]
    while sets:
        listed = peers.run("systemd-analyze", "syscall-filter", "--no-pager", sets.pop()).stdout
        for word in re.findall(r"^ +([@\w-]+)$", listed, re.MULTILINE):
            if word.startswith("@"):
                sets.append(word)
            else:
                names.add(word)
    return names


def wait_for_pid(path):
    """It is written when clients are accepted, and for a moment the file is empty."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            if (line := file.readline()).endswith("\n"):
                return int(line)
        time.sleep(0.01)
    raise AssertionError(f"no process id in {path}")


EVERYTHING = ("write -P 1 0 1M", "write -P 2 -f 1M 64k", "write -z 2M 1M", "discard 0 512k",
              "flush", "read -P 2 1M 64k")


@pytest.mark.peer("strace", "systemd-analyze", "qemu-io")
@pytest.mark.parametrize(("engine", "end"), [
    ("threads", signal.SIGTERM),
    pytest.param("native", signal.SIGKILL, marks=pytest.mark.peer(peers.LINUX_AIO)),
    pytest.param("io_uring", signal.SIGKILL, marks=pytest.mark.peer(peers.IO_URING)),
])
def test_it_is_allowed_what_it_does(units, unit, tmp_path, engine, end):
    log = tmp_path / "strace.log"
    program, *words = shlex.split(unit["ExecStart"])
    argv = ["strace", "-f", "-o", log, program, words[0], f"--aio={engine}", *words[1:]]
    # strace ends when all that it follows have, the guardian too.
    strace = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              env=units.environment)
    server = wait_for_pid(unit["PIDFile"])
    try:
        uri = f"nbd+unix:///?socket={tmp_path}/nbdserve/data/nbd.sock"
        peers.qemu_io(uri, *EVERYTHING, options=("-f", "raw"))
        os.kill(server, signal.SIGUSR1)
    finally:
        os.kill(server, end)
        strace.wait(timeout=30)
    text = log.read_text()
    (guardian,) = re.findall(r'^(\d+) .*"/proc/self/comm"', text, re.MULTILINE)
    assert re.search(rf"^{guardian} \+\+\+ exited with 0 \+\+\+", text, re.MULTILINE)
    called = set(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))
    assert {"io_uring": "io_uring_enter", "native": "io_submit", "threads": "fdatasync"}[
        engine] in called
    assert called - allowed(unit) == set()
    # RestrictAddressFamilies is of this call alone.
    families = set(re.findall(r"\bsocket\((\w+)", text))
    assert families == {unit["RestrictAddressFamilies"]}
    # ProcSubset=pid and ProtectSystem=strict.
    opened = re.findall(r'\bopenat\(AT_FDCWD, "(/[^"]*)", (\S+?)[,)].* = \d+', text)
    assert [path for path, _ in opened if re.match(r"/proc/(?!self/|\d+/)", path)] == []
    written = {path for path, flags in opened if "O_RDONLY" not in flags}
    assert any(path.endswith("data.qcow2") for path in written)
    own = (f"{tmp_path}/", "/proc/self/", "/dev/null")
    assert [path for path in written if not path.startswith(own)] == []


# What systemd sends to what is left of a service whose main process was killed.
SENT = {"control-group": signal.SIGTERM, "mixed": signal.SIGKILL}


@pytest.mark.peer("python3-libnbd", "qemu-io")
@pytest.mark.parametrize("kill_mode", [None, "mixed"], ids=["as it is", "mixed"])
def test_what_was_answered_survives_the_server(units, unit, tmp_path, kill_mode):
    image = tmp_path / unit["StateDirectory"] / "data.qcow2"
    argv = shlex.split(unit["ExecStart"].replace("--cache=none", "--cache=writeback"))
    # Verbose, it keeps its stderr: a pipe would have no end.
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=units.environment, timeout=30)
    with open(unit["PIDFile"]) as file:
        server = int(file.read())
    with open(f"/proc/{server}/task/{server}/children") as file:
        (guardian,) = map(int, file.read().split())
    try:
        peers.libnbd(WRITE, tmp_path / "nbdserve/data/nbd.sock")
    except BaseException:
        os.kill(server, signal.SIGTERM)
        raise
    os.kill(guardian, signal.SIGSTOP)  # it is no faster than systemd
    os.kill(server, signal.SIGKILL)
    os.kill(guardian, SENT[kill_mode or unit["KillMode"]])
    os.kill(guardian, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{guardian}/exe") and time.monotonic() < deadline:
        time.sleep(0.01)
    pattern = "0x78" if kill_mode is None else "0"  # with mixed it is lost
    # Requests of the dead server's ring hold its lock for some time, and nobody waited for them.
    peers.qemu_io(image, f"read -P {pattern} 1M 1M", options=("-r", "-U"))

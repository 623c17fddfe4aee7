"""examples/systemd: systemd takes the units, what they start serves, a guardian has time."""

import os
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


# What systemd sends to what is left of a service whose main process was killed.
SENT = {"control-group": signal.SIGTERM, "mixed": signal.SIGKILL}


@pytest.mark.peer("python3-libnbd", "qemu-io")
@pytest.mark.parametrize("kill_mode", [None, "mixed"], ids=["as it is", "mixed"])
def test_what_was_answered_survives_the_server(units, tmp_path, kill_mode):
    unit = lines(units.folder / "nbdserve@.service")
    for word, value in {"%t": tmp_path, "%S": tmp_path, "%i": "data"}.items():
        unit = {key: text.replace(word, str(value)) for key, text in unit.items()}
    (tmp_path / unit["RuntimeDirectory"]).mkdir(parents=True)
    image = tmp_path / unit["StateDirectory"] / "data.qcow2"
    peers.qemu_img("create", "-f", "qcow2", image, "16M")
    argv = shlex.split(unit["ExecStart"].replace("--cache=none", "--cache=writeback"))
    # Verbose, it keeps its stderr: a pipe would have no end.
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=units.environment, timeout=30)
    with open(unit["PIDFile"]) as file:
        server = int(file.read())
    with open(f"/proc/{server}/task/{server}/children") as file:
        (guardian,) = map(int, file.read().split())
    peers.libnbd(WRITE, tmp_path / "nbdserve/data/nbd.sock")
    os.kill(guardian, signal.SIGSTOP)  # it is no faster than systemd
    os.kill(server, signal.SIGKILL)
    os.kill(guardian, SENT[kill_mode or unit["KillMode"]])
    os.kill(guardian, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{guardian}/exe") and time.monotonic() < deadline:
        time.sleep(0.01)
    pattern = "0x78" if kill_mode is None else "0"  # with mixed it is lost
    peers.qemu_io(image, f"read -P {pattern} 1M 1M", options=("-r",))

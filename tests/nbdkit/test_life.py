"""How nbdkit with our plugin starts, refuses to, ends, and is killed."""

import os
import pathlib
import random
import subprocess

import pytest

import peers
from installed import run_there
from interop.images import KIB, MIB, Recipe, make
from interop.test_kill import IMAGES, SIZE, Load, content, guardian_of, leaks_at_most
from interop.tools import BareClient, wait_until

from .conftest import BY_HAND

pytestmark = pytest.mark.peer("nbdkit", peers.NBDKIT_PYTHON, "qemu-img")
by_hand = pytest.mark.peer(peers.SYSTEM_TRIO)


@pytest.fixture
def image(tmp_path):
    return make(Recipe(4 * MIB, fill=0), tmp_path / "disk.qcow2")


def run_nbdkit(*arguments, program=peers.NBDSERVE_NBDKIT, command="true", env=None):
    argv = [*program, "-U", "-", *map(str, arguments), "--run", command]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=60, check=False, env=env)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parameters", "said"), [
    (("file=none.qcow2",), "none.qcow2: No such file or directory"),
    (("format=vmdk",), "unknown format 'vmdk'"),
    (("cache=some",), "cache: 'some' is none of writeback, "),
    (("cache=none", "cache=none"), "cache: is given twice"),
    (("zork=1",), "zork: the driver qcow2 has no such option"),
    (("aio=native",), "--aio=native needs O_DIRECT"),
    (("offset=5G",), "offset"),
    (("throttle=iops=1",), "--throttle: unknown key 'iops'"),
    (("l2-cache-size=x",), "l2-cache-size"),
    (("cache=none", "cache.direct=off"), "cache.direct=off contradicts cache=none"),
    (("read-only=maybe",), "read-only: 'maybe' is not on or off"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_what_cannot_be_served_is_said_in_one_line(image, parameters, said):
    name = [] if parameters[0].startswith("file=") else [f"file={image}"]
    done = run_nbdkit(*name, *parameters)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr


@by_hand
def test_by_hand_too(tmp_path):
    bad = tmp_path / "bad.qcow2"
    bad.write_bytes(b"QFI\xfb" + bytes(600))
    done = run_nbdkit(*BY_HAND.plugin, f"file={bad}", program=("nbdkit",))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(bad) in done.stderr


def test_an_image_that_somebody_writes_to(image):
    with peers.qemu_nbd(image):
        done = run_nbdkit(image)
    assert done.returncode == 1
    assert "lock" in done.stderr


# --- reading only ---------------------------------------------------------------------------------


@pytest.mark.peer("nbdinfo")
def test_read_only_by_nbdkits_option_the_image_is_not_written(image):
    image.chmod(0o444)
    before = image.stat().st_mtime_ns
    done = run_nbdkit("-r", image, command='nbdinfo --is readonly "$uri"')
    assert done.returncode == 0, done.stderr
    assert image.stat().st_mtime_ns == before


@by_hand
@pytest.mark.peer("nbdinfo")
def test_opened_for_reading_it_can_still_be_read_by_others(image):
    """nbdkit -r without our knowing: nobody is kept out who only reads, too."""
    check = f'nbdinfo --is readonly "$uri" && qemu-img info {image} >/dev/null'
    done = run_nbdkit("-r", *BY_HAND.plugin, f"file={image}", program=("nbdkit",), command=check)
    assert done.returncode == 0, done.stderr


# --- errors at the client -------------------------------------------------------------------------


ERRORS = """
import errno, nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
for call in (lambda: h.pwrite(b"x" * 512, 0), lambda: h.pread(512, 0), h.flush,
             lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        call()
    except nbd.Error as error:
        print(error.errno, end=" ")
    else:
        print("-", end=" ")
"""


@pytest.mark.peer("python3-libnbd")
def test_errors_reach_the_client_by_their_number_and_the_log_in_one_line(image):
    faults = ("ops=write,error=ENOSPC", "ops=read,error=EIO", "ops=flush,error=EIO",
              "ops=write-zeroes,error=EROFS")
    with peers.nbdkit(image, *(f"fault={fault}" for fault in faults),
                      program=peers.NBDSERVE_NBDKIT) as server:
        said = peers.libnbd(ERRORS, server.uri).split()
        assert said == ["ENOSPC", "EIO", "EIO", "EPERM", "-"]  # NBD has no EROFS but EPERM
        lines = [line for line in server.stderr().splitlines() if "(a fault)" in line]
        assert len(lines) == 4, lines
        assert "write of 512 bytes at 0: No space left on device" in lines[0]


@pytest.mark.peer("python3-libnbd")
def test_a_client_that_shall_be_dropped_is_told_to_go_where_nbdkit_cannot_drop_it(image):
    """1.32 has no nbdkit.disconnect. With it the connection ends, which has no errno in libnbd."""
    with peers.nbdkit(image, "fault=ops=read,disconnect=on",
                      program=peers.NBDSERVE_NBDKIT) as server:
        said = peers.libnbd(ERRORS, server.uri).split()
    assert said[:2] in (["-", "ESHUTDOWN"], ["-", "None"], ["-", "ENOTCONN"])


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.peer("qemu-io")
def test_what_nobody_flushed_is_there_after_an_orderly_end(served, image):
    """And nothing is left: no guardian, no lock."""
    with served(image) as server:
        bare = BareClient(server.socket_path)
        bare.ask(bare.request(bare.WRITE, 1, 100 * KIB, b"\x07" * 200 * KIB))
        guardian = guardian_of(server)
        bare.close()
    assert not pathlib.Path(f"/proc/{guardian}").exists()
    peers.qemu_img_check(image)
    peers.qemu_io(image, "read -P 7 100k 200k")


@pytest.mark.parametrize(("cache", "kind"), [
    ("writeback", "overlay"), ("none", "small clusters"), ("writethrough", "plain"),
])
def test_killed_it_loses_nothing_it_acknowledged(tmp_path, cache, kind):
    image = make(IMAGES[kind], tmp_path / "disk.qcow2")
    load = Load(bytearray(content(image, tmp_path)), random.Random(cache).getrandbits(32))
    with peers.nbdkit(image, f"cache={cache}", program=peers.NBDSERVE_NBDKIT) as server:
        bare = BareClient(server.socket_path)
        load.run(bare, 300, server.kill)
        bare.close()
    with peers.nbdkit(image, program=peers.NBDSERVE_NBDKIT):
        pass  # it waits for the guardian
    assert leaks_at_most(image)
    load.check(content(image, tmp_path))
    assert len(load.disk) == SIZE


def test_connections_leave_nothing_behind(image):
    """Threads and their states go with them."""
    with peers.nbdkit("--threads=8", image, program=peers.NBDSERVE_NBDKIT) as server:
        status = pathlib.Path(f"/proc/{server.process.pid}/status")

        def use(times):
            for _ in range(times):
                bare = BareClient(server.socket_path)
                for number in range(8):
                    bare.ask(bare.request(bare.WRITE, number, number * 4096, b"x" * 4096))
                bare.close()

        def field(name):
            line = next(line for line in status.read_text().splitlines() if line.startswith(name))
            return int(line.split()[1])

        use(30)
        wait_until(lambda: field("Threads:") <= 8)
        memory = field("VmRSS:")
        use(250)
        wait_until(lambda: field("Threads:") <= 8)
        # A thread's state takes 5 KiB at least, and each connection has eight.
        assert field("VmRSS:") - memory < 250 * 8 * 2


# --- installed ------------------------------------------------------------------------------------


def test_installed_from_a_wheel(installed, image, tmp_path):
    """No checkout is near: the package holds all that nbdkit is given."""
    done = run_there(
        installed, "nbdserve", "nbdkit", "-U", "-", image, "--run",
        'qemu-io -f raw -c "write -P 4 0 1M" "$uri"', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peers.qemu_io(image, "read -P 4 0 1M")


def test_in_an_activated_environment(installed, image, tmp_path, monkeypatch):
    """Its python3 is the first of PATH, and may be another build than nbdkit's."""
    monkeypatch.setenv("PATH", f"{installed / 'bin'}:{os.environ['PATH']}")
    done = run_there(
        installed, "nbdserve", "nbdkit", "-U", "-", image, "--run", "command -v python",
        cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{installed / 'bin' / 'python'}\n"


def test_dump_plugin_says_what_there_is():
    done = peers.run(*peers.NBDSERVE_NBDKIT, "--dump-plugin")
    assert "python_version=" in done.stdout



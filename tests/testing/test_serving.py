"""Servers for tests: both kinds do what is asked, and go away whatever happens."""

import asyncio
import contextlib
import errno
import pathlib
import stat
import subprocess
import sys
import tempfile
import threading

import pytest
import trio
import trio.lowlevel
from ledger import Device, DeviceError

from nbdserve.errors import ConfigError, ImageError, NbdserveError
from nbdserve.faults import Fault
from nbdserve.testing import (
    InProcess,
    Process,
    fill,
    make_image,
    offsets,
    random,
    read_image,
    serving,
)
from nbdserve.testing.manner import Manner
from nbdserve.testing.plan import Plan
from nbdserve.testing.served import running
from nbdserve.testing.start import Settings

BOTH = pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, tmp_path_factory):
    tmp_path_factory.getbasetemp()  # pytest's own folder is where it always is
    made = tempfile.TemporaryDirectory()  # a short path, for sockets
    temporary = pathlib.Path(made.name)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    threads = set(threading.enumerate())
    yield
    assert running == []
    assert [path for path in temporary.rglob("*") if path.is_socket()] == []
    assert list(temporary.iterdir()) == []
    left = set(threading.enumerate()) - threads
    assert [thread.name for thread in left if thread.name.startswith("nbdserve")] == []
    made.cleanup()


# --- what is served -------------------------------------------------------------------------------


@BOTH
def test_a_disk_of_a_size(process):
    with serving(size="8M", process=process) as server:
        assert isinstance(server, Process if process else InProcess)
        assert server.size == 8 << 20
        assert stat.S_ISSOCK(server.socket.stat().st_mode)
        assert server.uri == f"nbd+unix:///?socket={server.socket}"
        with Device(server.socket) as device:
            assert device.size == 8 << 20
            device.write(0, b"x" * 4096)
            assert device.read(0, 8192) == b"x" * 4096 + bytes(4096)
        socket = server.socket
    assert not socket.exists()


@BOTH
def test_content_over_a_backing_file(process, tmp_path):
    make_image(tmp_path / "base", content={0: fill("128k", 1)}, format="raw")
    with serving(
        backing=tmp_path / "base", backing_format="raw", content={"64k": offsets("4k")},
        process=process, folder=tmp_path,
    ) as server, Device(server.socket) as device:  # fmt: skip
        assert device.size == 128 << 10
        assert device.read(65536 - 8, 24) == b"\1" * 8 + offsets(0).at(65536, 16)
    assert server.image.parent == tmp_path
    assert server.image.exists()


@BOTH
def test_an_image_that_is_there(process, tmp_path, monkeypatch):
    make_image(tmp_path / "disk.raw", "1M", format="raw", content={"64k": b"here"})
    monkeypatch.chdir(tmp_path)
    with serving("disk.raw", format="raw", process=process, offset="64k", export="ä b",
                 read_only=True) as server:  # fmt: skip
        assert server.image == tmp_path / "disk.raw"
        assert server.size == (1 << 20) - 65536
        with Device(server.socket, "ä b") as device:
            assert device.read(0, 4) == b"here"
            with pytest.raises(DeviceError) as caught:
                device.write(0, b"x" * 512)
            assert caught.value.errno == errno.EPERM


@BOTH
def test_what_was_written_is_in_the_image(process, tmp_path):
    path = tmp_path / "disk.qcow2"
    make_image(path, "1M")
    with serving(path, process=process) as server, Device(server.socket) as device:
        device.write(4096, b"kept")
    assert read_image(path)[4096:4100] == b"kept"


@BOTH
def test_the_socket_may_be_the_same_again(process, tmp_path):
    make_image(tmp_path / "disk", "1M")
    for _ in range(2):
        with serving(tmp_path / "disk", socket=tmp_path / "s", process=process) as server:
            assert server.socket == tmp_path / "s"
            Device(server.socket).close()


def test_a_server_may_be_started_again(tmp_path):
    make_image(tmp_path / "disk", "1M")
    server = serving(tmp_path / "disk", folder=tmp_path)
    for _ in range(2):
        with server:
            assert server.read(0, 4) == bytes(4)


@BOTH
def test_a_path_that_is_too_long_for_a_socket(process, tmp_path):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    with serving(size="1M", folder=folder, process=process) as server:
        assert len(str(server.socket)) < 108
        assert server.image.parent == folder
        Device(server.socket).close()


def test_sockets_in_one_folder_have_names_of_their_own(tmp_path):
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(serving(size="1M", folder=tmp_path)) for _ in range(3)
        ]
        assert [server.socket.name for server in servers] == ["nbd0.sock", "nbd1.sock", "nbd2.sock"]


# --- what is refused ------------------------------------------------------------------------------


def test_the_settings_are_those_that_exist():
    import dataclasses

    from nbdserve.testing.images import NewDisk

    names = {field.name for kind in (NewDisk, Plan, Manner) for field in dataclasses.fields(kind)}
    assert Settings.__annotations__.keys() == names - {"fault_nodes"} | {"folder", "socket"}


def test_a_setting_that_there_is_not():
    with pytest.raises(TypeError, match=r"serving\(\) got an unexpected keyword argument 'sise'"):
        serving(sise="1G")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"image": "disk", "size": 5}, "size, content and backing are of an image that is made"),
        ({"image": "disk", "power_cut": "x"}, "power_cut"),
        ({"size": 5, "cache": "x"}, "cache"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(arguments, said):
    with pytest.raises(ConfigError, match=said):
        serving(**arguments)


@BOTH
@pytest.mark.parametrize("before", [True, False], ids=["image", "disk"])
def test_a_start_that_fails_leaves_nothing(process, before, tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(b"no image")
    arguments = {"image": bad} if before else {"size": "1M", "throttle": "iops-total=no"}
    server = serving(process=process, **arguments)
    with pytest.raises((NbdserveError, ImageError)) as caught:
        server.start()
    assert ("bad" if before else "iops-total") in str(caught.value)
    server.stop()


@BOTH
def test_an_image_in_use_is_refused(process, tmp_path):
    make_image(tmp_path / "disk", "1M")
    with serving(tmp_path / "disk"), pytest.raises(NbdserveError, match="in use"):
        serving(tmp_path / "disk", process=process).start()


def test_a_server_that_does_not_start_is_no_process(tmp_path, monkeypatch):
    def no_size(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("nbdserve.testing.process.export_size", no_size)
    server = serving(size="1M", process=True)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert server.process.returncode is not None
    assert "serving" in server.log


# --- how it ends ----------------------------------------------------------------------------------


@BOTH
def test_it_ends_with_a_client_connected(process):
    with serving(size="1M", process=process) as server:
        device = Device(server.socket)
    with pytest.raises(OSError):  # noqa: PT011 - it depends on who was first
        device.read(0, 512)
    device.close()


@BOTH
def test_it_ends_with_requests_that_are_stuck(process):
    stuck = Fault(ops="read", stuck=True)
    with serving(size="1M", faults=[stuck], process=process) as server:
        device = Device(server.socket)
        reader = threading.Thread(target=_ignoring_errors, args=(device.read, 0, 512))
        reader.start()
        if isinstance(server, InProcess):
            server.faults.wait_stuck()
    reader.join()
    device.close()


@BOTH
def test_it_ends_when_the_body_raises(process):
    with pytest.raises(ZeroDivisionError), serving(size="1M", process=process) as server:
        raise ZeroDivisionError
    assert not server.socket.exists()
    server.stop()


def test_a_flush_that_fails_at_the_end_is_told(tmp_path):
    make_image(tmp_path / "disk", "1M")
    server = serving(tmp_path / "disk").start()
    with Device(server.socket) as device:
        device.write(0, b"x" * 512)
    server.file_faults.add(Fault(ops="write+flush", error="EIO"))
    with pytest.raises(OSError, match="Input/output error"):
        server.stop()
    server.stop()


def _ignoring_errors(function, *arguments):
    with contextlib.suppress(OSError):
        function(*arguments)


# --- a process ------------------------------------------------------------------------------------


def test_a_process_that_is_killed(tmp_path):
    make_image(tmp_path / "disk", "1M")
    with serving(tmp_path / "disk", process=True) as server, Device(server.socket) as device:
        device.write(0, b"x" * 512)
        server.kill()
        with serving(tmp_path / "disk") as other:  # waits for what the guardian does
            assert other.read(0, 512) == b"x" * 512
    assert server.process.returncode == -9


def test_a_process_that_ends_badly_is_told():
    server = serving(size="1M", process=True).start()
    server.process.kill()
    server.process.wait()
    with pytest.raises(NbdserveError, match="the server ended with status -9"):
        server.stop()
    assert "serving" in server.log


def test_faults_of_a_process(tmp_path):
    switch = tmp_path / "on"
    faults = [Fault(ops="write", error="ENOSPC", if_file=str(switch))]
    with serving(size="1M", faults=faults, process=True) as server:
        with Device(server.socket) as device:
            device.write(0, b"x" * 512)
            switch.touch()
            with pytest.raises(DeviceError) as caught:
                device.write(0, b"x" * 512)
            assert caught.value.errno == errno.ENOSPC
        assert "fails with ENOSPC" in server.log


# --- what a test can do to one in its process -----------------------------------------------------


def test_the_disk_past_the_protocol():
    with serving(size="1M", content={0: random("8k")}) as server:
        assert server.read(100, 5000) == random(0).at(100, 5000)
        server.write(4096, b"other")
        server.flush()
        with Device(server.socket) as device:
            assert device.read(4096, 5) == b"other"
        for use in (lambda: server.read((1 << 20) - 4, 8), lambda: server.write(-1, b"x")):
            with pytest.raises(ValueError, match="the disk has 1048576"):
                use()


def test_statistics_and_clients():
    with serving(size="1M", export="disk", clients=1) as server:
        device = Device(server.socket, "disk")
        device.read(0, 4096)
        assert server.statistics()["clients"] == 1
        server.disconnect()
        with pytest.raises(OSError):  # noqa: PT011 - it depends on who was first
            device.read(0, 4096)
        with Device(server.socket, "disk") as other:
            other.read(0, 4096)
        device.close()
        assert server.statistics()["accepted"] == 2


def test_faults_come_and_go():
    with serving(size="1M") as server, Device(server.socket) as device:
        device.write(0, b"x" * 512)
        rule = server.faults.add(Fault(ops="read", error="EIO", count=1))
        server.file_faults.add(Fault(ops="write", error="ENOSPC"))
        with pytest.raises(DeviceError) as caught:
            device.read(0, 512)
        assert caught.value.errno == errno.EIO
        assert device.read(0, 512) == b"x" * 512
        with pytest.raises(DeviceError) as caught:
            device.write(65536, b"x" * 512)
        assert caught.value.errno == errno.ENOSPC
        rules = server.faults.statistics()["rules"]
        assert rules == {"0": {"matched": 2, "injected": 1}}
        server.faults.remove(rule)
        with pytest.raises(ValueError, match="not in"):
            server.faults.remove(rule)
        server.file_faults.clear()
        device.write(65536, b"x" * 512)


def test_requests_are_stuck_until_they_are_released():
    with serving(size="1M", faults=[Fault(ops="read", stuck=True)]) as server:
        done = []
        with Device(server.socket) as device:
            reader = threading.Thread(target=lambda: done.append(device.read(0, 4)))
            reader.start()
            server.faults.wait_stuck()
            assert (server.faults.stuck, done) == (1, [])
            assert server.faults.release() == 1
            reader.join()
        assert done == [bytes(4)]
        with pytest.raises(TimeoutError, match=r"0 of 1 requests are stuck after 0\.01 s"):
            server.faults.wait_stuck(timeout=0.01)


def test_a_full_disk():
    with serving(size="1M", room="64k", file_room="1M") as server:
        assert server.faults.room == 64 << 10
        assert server.file_faults.room == 1 << 20
        server.faults.room = 0
        with Device(server.socket) as device, pytest.raises(DeviceError) as caught:
            device.write(0, b"x" * 4096)
        assert caught.value.errno == errno.ENOSPC
        server.faults.room = "64k"  # a cluster
        server.write(0, b"x" * 4096)
        assert server.faults.room == 0
        with pytest.raises(ConfigError, match="'some' is not a size"):
            server.faults.room = "some"


def test_chance_is_the_same_for_the_same_seed():
    def tried(seed):
        fault = Fault(ops="read", error="EIO", probability=0.5)
        disk = serving(size="1M", faults=[fault], seed=seed)
        with disk as server, Device(server.socket) as device:
            return [_fails(device) for _ in range(32)]

    one = tried(1)
    assert one == tried(1)
    assert one != tried(2)
    assert 0 < sum(one) < 32


def _fails(device):
    try:
        device.read(0, 512)
    except DeviceError:
        return True
    return False


# --- asynchronous programs ------------------------------------------------------------------------


async def test_trio_is_not_held_up(tmp_path):
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        async with serving(size="1M", folder=tmp_path) as server:
            stream = await trio.open_unix_socket(server.socket)
            async with stream:
                assert await stream.receive_some(8) == b"NBDMAGIC"
        nursery.cancel_scope.cancel()
    assert len(ticks) > 10


async def test_trio_is_cancelled_while_it_starts():
    with trio.move_on_after(0) as scope:
        async with serving(size="1M") as server:
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not server.socket.exists()


@BOTH
def test_asyncio_is_cancelled_while_it_starts(process):
    began = threading.Event()

    async def body():
        server = serving(size="1M", process=process)
        start = server._start

        def told(folder):
            began.set()
            start(folder)

        server._start = told
        async with server:
            raise AssertionError("the body is not to be reached")

    async def main():
        task = asyncio.create_task(body())
        await asyncio.to_thread(began.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert running == []

    asyncio.run(main())


def test_asyncio():
    async def main():
        async with serving(size="1M", faults=[Fault(ops="read", stuck=True)]) as server:
            with Device(server.socket) as device:
                reading = asyncio.create_task(asyncio.to_thread(device.read, 0, 4))
                await server.faults.until_stuck()
                server.faults.release()
                assert await reading == bytes(4)
        with pytest.raises(ImageError):
            async with serving("/nowhere"):
                pass

    asyncio.run(main())


async def test_many_at_once(tmp_path):
    sockets = set()

    async def one():
        async with serving(size="1M", folder=tmp_path) as server:
            sockets.add(server.socket)

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(one)
    assert len(sockets) == 10


# --- logs -----------------------------------------------------------------------------------------


def test_each_has_its_log():
    with serving(size="1M") as one, serving(size="1M", process=True) as other:
        Device(one.socket).close()
    assert f"serving {one.image} at {one.uri}" in one.log
    assert "connected" in one.log
    assert "faults" not in one.log
    assert str(one.image) not in other.log
    assert f"serving {other.image} at" in other.log
    assert str(other.image) not in one.log


@BOTH
def test_one_that_is_started_is_not_started_again(process, tmp_path):
    server = serving(size="1M", folder=tmp_path, process=process).start()
    socket, before = server.socket, threading.active_count()
    with server as same:
        assert same is server
        assert running == [server]
        assert (server.socket, threading.active_count()) == (socket, before)
    assert running == []


FORKS = """
import os, signal, sys
from nbdserve.testing import serving

with serving(size="1M", process=PROCESS) as server:
    child = os.fork()
    if not child:
        signal.alarm(20)  # if it hangs
        try:
            server.read(0, 1)
        except (RuntimeError, AttributeError) as error:  # one in another process cannot be read
            print(error, flush=True)
        server.stop()
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(server.image.exists(), server.socket.exists())
"""


@BOTH
def test_a_process_that_is_forked_leaves_the_servers_of_its_parent_alone(process):
    source = FORKS.replace("PROCESS", str(process))
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=True
    )
    why, *lines = done.stdout.splitlines()
    assert lines == ["7", "True True"]
    assert process or why.endswith("is of the process this was forked from")

"""The life of a server, with a backend and connections that a test holds in its hand."""

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial

import pytest
import trio
import trio.testing

from nbdserve import server
from nbdserve.config import (
    ExportConfig,
    ImageConfig,
    ListenConfig,
    RateLimit,
    ServeConfig,
    ThrottleLimits,
)
from nbdserve.errors import ConfigError, ImageError
from nbdserve.listeners import open_listeners
from nbdserve.pidfile import pid_file

LONG = 10.0

HOLD_PID_FILE = """
import sys
from nbdserve.pidfile import pid_file
with pid_file(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def folder():
    made = tempfile.mkdtemp(prefix="nbd")
    yield pathlib.Path(made)
    shutil.rmtree(made)


class World:
    """What the fakes saw, and how they shall behave."""

    def __init__(self):
        self.happened = []
        self.shared = []
        self.connections = []
        self.open_error = None
        self.close_error = None
        self.statistics_error = None


class FakeBackend:
    size = 1 << 20
    read_only = False
    filename = "disk.qcow2"
    engines = ()

    def __init__(self, world):
        self.world = world

    def statistics(self):
        if self.world.statistics_error is not None:
            raise self.world.statistics_error
        return {
            "requests": {"rd_operations": 7},
            "left": {"connections": 0},
            "misses": {},
            "nodes": {},
            "closed": "closed" in self.world.happened,
        }

    def drain_begin(self):
        assert not any(connection.asked.is_set() for connection in self.world.connections)
        self.world.happened.append("drained")


class FakeConnection:
    """Speaks lines. "go" reaches transmission, "bug" raises, "hold" has a request in flight that
    ends at shutdown, "hang" one that never does; end of file or "bye" ends the connection."""

    def __init__(self, world, sock, exports, poller, *, budget, log):
        assert sock.gettimeout() == 0
        self.sock, self.exports = trio.socket.from_stdlib_socket(sock), exports
        self.negotiated = False
        self.asked = trio.Event()
        self.reading = None
        world.connections.append(self)

    def statistics(self):
        return {"export": "", "wr_operations": 3} if self.negotiated else {}

    def shutdown(self):
        self.asked.set()
        if self.reading is not None:
            self.reading.cancel()

    async def run(self):
        await self.sock.send(b"hello\n")
        while not self.asked.is_set():
            line = b""
            with trio.CancelScope() as self.reading:
                line = await self.sock.recv(100)
            match line.strip():
                case b"go":
                    self.negotiated = True
                    await self.sock.send(b"ok\n")
                case b"bug":
                    raise RuntimeError("a bug")
                case b"hold":
                    await self.asked.wait()
                    await trio.sleep(0.05)
                    await self.sock.send(b"done\n")
                case b"hang":
                    await trio.sleep_forever()
                case _:
                    return


@pytest.fixture
def world(monkeypatch):
    world = World()

    @contextlib.asynccontextmanager
    async def open_backend(config, shared):
        await trio.lowlevel.checkpoint()
        if world.open_error is not None:
            raise world.open_error
        world.happened.append("opened")
        world.shared.append(shared)
        try:
            world.backend = FakeBackend(world)
            yield world.backend
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
            world.happened.append("closed")
            if world.close_error is not None:
                raise world.close_error

    monkeypatch.setattr(server, "open_backend", open_backend)
    monkeypatch.setattr(server, "Connection", partial(FakeConnection, world))
    return world


def config_for(path, **changes):
    listen = ListenConfig(None, 0, str(path))
    return ServeConfig(ImageConfig("disk.qcow2"), listen=listen, **changes)


@contextlib.asynccontextmanager
async def serving(config):
    """A server that runs in the background; (Ready, event that it ended)."""
    ended = trio.Event()

    async def run(*, task_status):
        await server.serve(config, on_ready=task_status.started)
        ended.set()

    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            ready = await nursery.start(run)
            yield ready, ended
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)


async def dial(path):
    stream = await trio.open_unix_socket(path)
    assert await stream.receive_some(100) == b"hello\n"
    return stream


async def say(stream, line):
    await stream.send_all(line + b"\n")
    return await stream.receive_some(100)


async def test_ready_tells_where_and_what(folder, world):
    config = config_for(folder / "s", export=ExportConfig("my disk"))
    async with serving(config) as (ready, _):
        assert ready.uri == f"nbd+unix:///my%20disk?socket={folder}/s"
        assert (ready.size, ready.read_only) == (1 << 20, False)
        async with await dial(folder / "s"):
            [export] = world.connections[0].exports
            assert export.name == "my disk"


async def test_several_images_share_what_they_share(folder, world):
    others = tuple((ImageConfig(name), ExportConfig(name, "other")) for name in ("two", "three"))
    groups = {"g": ThrottleLimits(iops_total=RateLimit(5))}
    async with serving(config_for(folder / "s", others=others, groups=groups)) as (ready, _):
        assert ready.uri == f"nbd+unix:///?socket={folder}/s"
        others = [f"nbd+unix:///{name}?socket={folder}/s" for name in ("two", "three")]
        assert ready.others == others
        async with await dial(folder / "s"):
            exports = world.connections[0].exports
            assert [export.name for export in exports] == ["", "two", "three"]
            assert [export.description for export in exports] == ["", "other", "other"]
        assert len({id(shared) for shared in world.shared}) == 1
        member = world.shared[0].groups.join_existing("g")
        assert member.group.limits == groups["g"]
    assert world.happened == ["opened"] * 3 + ["drained"] * 3 + ["closed"] * 3


async def test_the_image_is_opened_before_and_closed_before_the_socket_goes(folder, world):
    path = folder / "s"
    seen = []

    class Recorder(list):
        def append(self, what):
            seen.append((what, path.exists()))

    world.happened = Recorder()
    async with serving(config_for(path)):
        pass
    assert seen == [("opened", False), ("drained", True), ("closed", True)]
    assert not path.exists()


async def test_a_refused_image_leaves_no_socket_and_no_pid_file(folder, world):
    world.open_error = ImageError("disk.qcow2: not qcow2")
    config = config_for(folder / "s", pid_file=str(folder / "pid"))
    with pytest.raises(ImageError, match="not qcow2"):
        await server.serve(config, on_ready=lambda ready: pytest.fail("not ready"))
    assert list(folder.iterdir()) == []


async def test_an_error_inside_a_group_arrives_alone(folder, world):
    world.open_error = ExceptionGroup("nursery", [ExceptionGroup("inner", [ImageError("why")])])
    with pytest.raises(ImageError, match="why"):
        await server.serve(config_for(folder / "s"), on_ready=lambda ready: None)


async def test_a_port_in_use_closes_the_image(folder, world):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = ServeConfig(ImageConfig("disk.qcow2"), listen=ListenConfig("127.0.0.1", port))
        with pytest.raises(ConfigError, match=str(port)):
            await server.serve(config, on_ready=lambda ready: pytest.fail("not ready"))
    assert world.happened == ["opened", "closed"]


async def test_what_on_ready_raises_stops_the_server(folder, world):
    def broken(ready):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        await server.serve(config_for(folder / "s"), on_ready=broken)
    assert world.happened == ["opened", "closed"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_stops_in_order(folder, world, number):
    async with (
        serving(config_for(folder / "s")) as (_, ended),
        await dial(folder / "s") as client,
    ):
        os.kill(os.getpid(), number)
        assert await client.receive_some(1) == b""
        await ended.wait()
    assert world.happened == ["opened", "drained", "closed"]
    assert list(folder.iterdir()) == []


def statistics_in(caplog):
    return [
        message
        for name, _, message in caplog.record_tuples
        if name == "nbdserve.statistics"
    ]


async def asked_for_statistics(caplog, nb_lines):
    """Send the signal; the lines that it had logged."""
    caplog.clear()
    os.kill(os.getpid(), signal.SIGUSR1)
    await until(lambda: len(statistics_in(caplog)) >= nb_lines)
    return statistics_in(caplog)


async def until(condition):
    while not condition():  # noqa: ASYNC110 - it is a log that is waited for
        await trio.sleep(0.001)


async def test_sigusr1_logs_the_statistics_and_disturbs_nobody(folder, world, caplog):
    async with (
        serving(config_for(folder / "s")) as (_, ended),
        await dial(folder / "s") as client,
        await dial(folder / "s") as other,
    ):
        assert await say(client, b"go") == b"ok\n"
        for _ in range(3):
            head, *lines = await asked_for_statistics(caplog, 4)
            assert head.startswith("statistics server seconds=")
            assert head.endswith(" clients=2 accepted=2")
            assert lines == [
                'statistics export export="" rd_operations=7',
                'statistics connection client="on the unix socket" export="" wr_operations=3',
                'statistics connection client="on the unix socket"',
            ]
        assert await say(other, b"go") == b"ok\n"
        assert not ended.is_set()
        assert world.happened == ["opened"]
        caplog.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        await ended.wait()
    assert statistics_in(caplog) == []
    assert world.happened == ["opened", "drained", "closed"]


async def test_statistics_and_stop_at_once_both_happen(folder, world, caplog):
    async with serving(config_for(folder / "s")) as (_, ended):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        await ended.wait()
    assert len(statistics_in(caplog)) == 2


async def test_a_verbose_server_logs_them_when_the_image_is_closed(folder, world, caplog):
    async with serving(config_for(folder / "s", verbose=True)):
        pass
    assert [line for line in statistics_in(caplog) if "closed=true" in line]


async def test_a_bug_in_the_statistics_is_no_reason_to_stop(folder, world, caplog):
    world.statistics_error = RuntimeError("a bug")
    async with (
        serving(config_for(folder / "s", verbose=True)) as (_, ended),
        await dial(folder / "s") as client,
    ):
        os.kill(os.getpid(), signal.SIGUSR1)
        await until(lambda: "a bug" in caplog.text)
        assert await say(client, b"go") == b"ok\n"
        assert not ended.is_set()


async def test_asked_while_the_image_is_opened_nothing_happens(folder, world, monkeypatch, caplog):
    inner = server.open_backend

    @contextlib.asynccontextmanager
    async def open_slowly(*config):
        os.kill(os.getpid(), signal.SIGUSR1)
        await trio.testing.wait_all_tasks_blocked()
        async with inner(*config) as backend:
            yield backend

    monkeypatch.setattr(server, "open_backend", open_slowly)
    async with serving(config_for(folder / "s")) as (ready, _):
        assert ready.size == 1 << 20
        assert statistics_in(caplog) == []


async def test_what_is_in_flight_is_finished(folder, world):
    async with (
        serving(config_for(folder / "s")) as (_, ended),
        await dial(folder / "s") as client,
    ):
        await client.send_all(b"hold\n")
        await trio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await client.receive_some(100) == b"done\n"
        await ended.wait()


async def test_a_client_that_never_finishes_is_cut_off_and_signals_change_nothing(
    folder, world, monkeypatch
):
    monkeypatch.setattr(server, "SHUTDOWN_TIMEOUT", 0.3)
    async with (
        serving(config_for(folder / "s")) as (_, ended),
        await dial(folder / "s") as client,
        await dial(folder / "s") as other,
    ):
        await client.send_all(b"hang\n")
        await other.send_all(b"hold\n")
        await trio.sleep(0.05)
        begin = trio.current_time()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep(0.01)
        assert await other.receive_some(100) == b"done\n"
        await ended.wait()
        assert 0.25 < trio.current_time() - begin < 2
        assert await client.receive_some(1) == b""
    assert world.happened == ["opened", "drained", "closed"]


async def test_nobody_is_accepted_during_the_stop(folder, world, monkeypatch):
    monkeypatch.setattr(server, "SHUTDOWN_TIMEOUT", 0.3)
    async with (
        serving(config_for(folder / "s")) as (_, ended),
        await dial(folder / "s") as client,
    ):
        await client.send_all(b"hang\n")
        await trio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep(0.1)
        assert (folder / "s").is_socket()
        with pytest.raises(ConnectionRefusedError):
            await trio.open_unix_socket(folder / "s")
        await ended.wait()


async def test_a_failing_last_flush_is_reported(folder, world):
    world.close_error = OSError(errno.EIO, "Input/output error", "disk.qcow2")
    with pytest.raises(OSError, match="Input/output"):
        await server.serve(
            config_for(folder / "s"), on_ready=lambda _: os.kill(os.getpid(), signal.SIGTERM)
        )
    assert list(folder.iterdir()) == []


async def test_a_bug_in_one_connection_leaves_the_others_alone(folder, world, caplog):
    async with (
        serving(config_for(folder / "s")),
        await dial(folder / "s") as bad,
        await dial(folder / "s") as good,
    ):
        await bad.send_all(b"bug\n")
        assert await bad.receive_some(1) == b""
        assert await say(good, b"go") == b"ok\n"
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "RuntimeError('a bug')" in record.getMessage()


async def test_at_the_limit_the_next_client_waits_until_one_leaves(folder, world):
    async with serving(config_for(folder / "s", max_clients=2)):
        first, second = await dial(folder / "s"), await dial(folder / "s")
        third = await trio.open_unix_socket(folder / "s")
        with trio.move_on_after(0.2) as patience:
            await third.receive_some(100)
        assert patience.cancelled_caught
        assert len(world.connections) == 2
        await first.aclose()
        assert await third.receive_some(100) == b"hello\n"
        await second.aclose()
        await third.aclose()


async def test_two_listeners_share_one_limit(folder, world):
    config = ServeConfig(ImageConfig("disk.qcow2"), listen=ListenConfig(None, 0), max_clients=1)
    async with serving(config) as (ready, _):
        port = ready.where.port
        four = await trio.open_tcp_stream("127.0.0.1", port)
        six = await trio.open_tcp_stream("::1", port)
        await trio.sleep(0.1)
        assert len(world.connections) == 1
        await four.aclose()
        await six.aclose()


async def test_tcp_sockets_do_not_delay(folder, world):
    config = ServeConfig(ImageConfig("disk.qcow2"), listen=ListenConfig("::1", 0))
    async with serving(config) as (ready, _):
        assert ready.uri == f"nbd://[::1]:{ready.where.port}/"
        async with await trio.open_tcp_stream("::1", ready.where.port) as client:
            await client.receive_some(100)
            sock = world.connections[0].sock
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_without_persistent_the_last_client_ends_it(folder, world):
    async with serving(config_for(folder / "s", persistent=False)) as (_, ended):
        first, second = await dial(folder / "s"), await dial(folder / "s")
        for client in (first, second):
            await say(client, b"go")
        await first.aclose()
        await trio.sleep(0.1)
        assert not ended.is_set()
        await second.aclose()
        await ended.wait()


async def test_a_client_that_only_looked_is_not_the_last_one(folder, world):
    async with serving(config_for(folder / "s", persistent=False)) as (_, ended):
        await (await dial(folder / "s")).aclose()
        await trio.sleep(0.1)
        assert not ended.is_set()


async def test_persistent_outlives_its_clients(folder, world):
    async with serving(config_for(folder / "s")) as (_, ended):
        client = await dial(folder / "s")
        await say(client, b"go")
        await client.aclose()
        await trio.sleep(0.1)
        assert not ended.is_set()
        await (await dial(folder / "s")).aclose()


async def test_accept_without_descriptors_does_not_spin_and_recovers(
    folder, world, monkeypatch, caplog
):
    calls = []

    class Exhausted(socket.socket):
        def accept(self):
            calls.append(trio.current_time())
            if len(calls) <= 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def exhausted(where, *, backlog):
        listeners = await open_listeners(where, backlog=backlog)
        listeners.sockets = [Exhausted(fileno=sock.detach()) for sock in listeners.sockets]
        return listeners

    monkeypatch.setattr(server, "open_listeners", exhausted)
    async with serving(config_for(folder / "s")):
        await (await dial(folder / "s")).aclose()
    assert len(calls) == 4
    assert calls[3] - calls[0] >= 3 * server.ACCEPT_PAUSE
    assert caplog.text.count("cannot accept a client: Too many open files") == 1


async def test_the_pid_file_is_there_when_ready_and_gone_at_the_end(folder, world):
    path = folder / "pid"
    async with serving(config_for(folder / "s", pid_file=str(path))):
        assert path.read_text() == f"{os.getpid()}\n"
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_an_old_pid_file_is_overwritten(folder):
    path = folder / "pid"
    path.write_text("99999999999\nold\n")
    with pid_file(str(path)):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_pid_file_that_another_process_holds_is_refused(folder):
    path = folder / "pid"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_PID_FILE, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(ConfigError, match=r"--pid-file: .*another process holds it"),
            pid_file(str(path)),
        ):
            pass
        assert path.read_text() == f"{holder.pid}\n"
        holder.communicate(b"\n", timeout=LONG)
    assert holder.returncode == 0
    assert not path.exists()


async def test_a_pid_file_that_cannot_be_written_is_one_error(folder, world):
    config = config_for(folder / "s", pid_file=str(folder / "no" / "pid"))
    with pytest.raises(ConfigError, match=r"--pid-file: .*No such file"):
        await server.serve(config, on_ready=lambda ready: pytest.fail("not ready"))
    assert world.happened == ["opened", "closed"]
    assert list(folder.iterdir()) == []


# --- in another program ---------------------------------------------------------------------------


async def test_a_body_has_a_server_and_its_end_is_the_end_of_it(folder, world):
    async with server.open_server(config_for(folder / "s")) as running:
        assert running.uris == [f"nbd+unix:///?socket={folder}/s"]
        async with await dial(folder / "s") as stream:
            assert await say(stream, b"go") == b"ok\n"
            assert running.statistics()["clients"] == 1
    assert world.happened == ["opened", "drained", "closed"]
    assert not (folder / "s").exists()


async def test_it_needs_neither_the_main_thread_nor_signals(folder, world):
    async def body():
        async with server.open_server(config_for(folder / "s")):
            return (folder / "s").exists()

    assert await trio.to_thread.run_sync(trio.run, body)


async def test_what_the_body_raises_comes_out_as_it_is(folder, world):
    with pytest.raises(ZeroDivisionError):
        async with server.open_server(config_for(folder / "s")):
            raise ZeroDivisionError
    assert world.happened == ["opened", "closed"]


async def test_a_cancelled_body_closes_the_image(folder, world):
    with trio.CancelScope() as scope:
        async with server.open_server(config_for(folder / "s")):
            scope.cancel()
            await trio.sleep_forever()
    assert world.happened == ["opened", "closed"]


async def test_that_it_has_stopped_is_told(folder, world):
    with trio.fail_after(LONG):
        async with server.open_server(config_for(folder / "s", persistent=False)) as running:
            stream = await dial(folder / "s")
            await say(stream, b"go")
            await stream.aclose()
            await running.stopped.wait()


async def test_disconnecting_drops_those_there_are_and_nobody_else(folder, world):
    with trio.fail_after(LONG):
        async with server.open_server(config_for(folder / "s")) as running:
            async with await dial(folder / "s") as hanging, await dial(folder / "s") as idle:
                await say(idle, b"go")
                await hanging.send_all(b"hang\n")
                running.disconnect()
                for stream in (hanging, idle):
                    assert await stream.receive_some(100) == b""
            async with await dial(folder / "s") as another:
                assert await say(another, b"go") == b"ok\n"
            assert not running.stopped.is_set()

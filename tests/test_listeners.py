"""Sockets that listen, the files they leave and the URIs that name them."""

import errno
import os
import pathlib
import shutil
import socket
import tempfile

import pytest

from nbdserve.config import ListenConfig
from nbdserve.errors import ConfigError
from nbdserve.listeners import MAX_UNIX_PATH, nbd_uri, open_listeners


@pytest.fixture
def folder():
    """A directory whose name is short: a socket's path holds few bytes."""
    made = tempfile.mkdtemp(prefix="nbd")
    yield pathlib.Path(made)
    shutil.rmtree(made)


def connects(path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


@pytest.mark.parametrize(
    ("where", "name", "uri"),
    [
        (ListenConfig("127.0.0.1", 10809), "", "nbd://127.0.0.1:10809/"),
        (ListenConfig("localhost", 1), "disk", "nbd://localhost:1/disk"),
        (ListenConfig("0.0.0.0", 1), "", "nbd://127.0.0.1:1/"),
        (ListenConfig("", 1), "", "nbd://127.0.0.1:1/"),
        (ListenConfig(None, 1), "", "nbd://127.0.0.1:1/"),
        (ListenConfig("::", 1), "", "nbd://[::1]:1/"),
        (ListenConfig("fe80::1%eth0", 1), "", "nbd://[fe80::1%25eth0]:1/"),
        (ListenConfig("h", 1), "hello world", "nbd://h:1/hello%20world"),
        (ListenConfig("h", 1), "/disk", "nbd://h:1//disk"),
        (ListenConfig("h", 1), "a?b#c%é", "nbd://h:1/a%3Fb%23c%25%C3%A9"),
        (ListenConfig(None, 1, "/run/a b&c"), "", "nbd+unix:///?socket=/run/a%20b%26c"),
        (ListenConfig(None, 1, "/run/s+\udcff"), "d", "nbd+unix:///d?socket=/run/s%2B%FF"),
    ],
)
def test_uri(where, name, uri):
    assert nbd_uri(where, name) == uri


def test_the_uri_of_a_relative_socket_works_from_anywhere():
    assert nbd_uri(ListenConfig(None, 1, "s"), "") == f"nbd+unix:///?socket={os.getcwd()}/s"


@pytest.mark.parametrize(
    ("host", "families"),
    [
        ("127.0.0.1", {socket.AF_INET}),
        ("::1", {socket.AF_INET6}),
        ("", {socket.AF_INET, socket.AF_INET6}),
        (None, {socket.AF_INET, socket.AF_INET6}),
        ("0.0.0.0", {socket.AF_INET}),
    ],
)
async def test_tcp_families_share_the_port_the_kernel_chose(host, families):
    listeners = await open_listeners(ListenConfig(host, 0), backlog=5)
    try:
        assert {sock.family for sock in listeners.sockets} == families
        assert {sock.getsockname()[1] for sock in listeners.sockets} == {listeners.where.port}
        assert listeners.where.port != 0
        for family in families:
            host = "127.0.0.1" if family == socket.AF_INET else "::1"
            with socket.create_connection((host, listeners.where.port), timeout=5):
                pass
    finally:
        listeners.close()


async def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} on 127.0.0.1: .*in use") as caught:
            await open_listeners(ListenConfig("127.0.0.1", port), backlog=5)
    assert caught.value.errno == errno.EADDRINUSE


async def test_a_second_address_in_use_leaves_no_socket_on_the_first():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            await open_listeners(ListenConfig(None, port), backlog=5)
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "1.2.3.4.5"])
async def test_an_address_that_is_not_ours_is_named(host):
    with pytest.raises(ConfigError, match=f"--bind: {host}: "):
        await open_listeners(ListenConfig(host, 0), backlog=5)


async def test_unix_socket_is_made_and_removed(folder):
    path = folder / "s"
    listeners = await open_listeners(ListenConfig(None, 0, str(path)), backlog=5)
    assert connects(path)
    listeners.remove()
    assert not path.exists()
    listeners.remove()


async def test_a_relative_socket_is_removed_after_a_change_of_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    listeners = await open_listeners(ListenConfig(None, 0, "s"), backlog=5)
    assert listeners.where.unix_path == str(folder / "s")
    monkeypatch.chdir("/")
    listeners.remove()
    assert not (folder / "s").exists()


async def test_a_stale_socket_is_replaced(folder):
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listeners = await open_listeners(ListenConfig(None, 0, str(path)), backlog=5)
    assert connects(path)
    listeners.remove()


@pytest.mark.parametrize("queue_full", [False, True])
async def test_a_live_socket_is_refused_and_lives_on(folder, queue_full):
    path = folder / "s"
    waiting = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as live, waiting:
        live.bind(str(path))
        live.listen(0 if queue_full else 5)
        if queue_full:
            waiting.connect(str(path))
        with pytest.raises(ConfigError, match=f"--socket: {path}: .*in use") as caught:
            await open_listeners(ListenConfig(None, 0, str(path)), backlog=5)
        assert caught.value.errno == errno.EADDRINUSE
        assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_what_is_not_a_socket_is_never_removed(folder, kind):
    path = folder / "s"
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match=f"--socket: {path}: exists and is not a socket"):
        await open_listeners(ListenConfig(None, 0, str(path)), backlog=5)
    assert path.name in os.listdir(folder)
    assert kind != "file" or path.read_bytes() == b"precious"


async def test_a_file_put_in_the_sockets_place_stays(folder):
    path = folder / "s"
    listeners = await open_listeners(ListenConfig(None, 0, str(path)), backlog=5)
    path.rename(folder / "moved")
    path.write_bytes(b"other")
    listeners.remove()
    assert path.read_bytes() == b"other"


async def test_the_longest_path_and_one_byte_more(folder):
    room = MAX_UNIX_PATH - len(str(folder)) - 1
    listeners = await open_listeners(ListenConfig(None, 0, str(folder / ("x" * room))), backlog=5)
    listeners.remove()
    with pytest.raises(ConfigError, match=r"--socket: .*108 bytes"):
        await open_listeners(ListenConfig(None, 0, str(folder / ("x" * (room + 1)))), backlog=5)


async def test_a_missing_folder_is_named(folder):
    with pytest.raises(ConfigError, match=f"--socket: {folder}/no/s: No such file"):
        await open_listeners(ListenConfig(None, 0, str(folder / "no" / "s")), backlog=5)

"""The guardian: what it is told, when it writes, and who waits for it. That nothing is lost in its
care is shown by killing servers (tests/interop/test_kill.py)."""

import contextlib
import json
import os
import pathlib
import signal
import socket

import pytest
import trio

from fakes import no_descriptor_left
from nbdserve import guardian as guardian_module
from nbdserve import place
from nbdserve.block.redo import PUT, RedoLog, encode
from nbdserve.blockdev import parse_node
from nbdserve.config import CACHE_MODES, ImageConfig
from nbdserve.drivers.file import FileNode
from nbdserve.drivers.locks import PERMISSIONS, ImageLock, Role
from nbdserve.errors import ImageError, LockedError
from nbdserve.formats.qcow2.create import create_image
from nbdserve.graph import open_backend, shared_by_drives
from nbdserve.guardian import Guardian, _Orphan, guardian
from nbdserve.imageopts import parse_image_opts

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left_open():
    with no_descriptor_left():
        yield


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    create_image(str(path), MIB)
    return path


def config(path, **options):
    return ImageConfig(str(path), **{"aio": "threads", **options})


class Other:
    """The other end of a guardian's socket, in this process: what it has been told."""

    def __init__(self):
        ours, self.sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.guardian = Guardian(ours)
        self._ours = ours

    def told(self):
        """(messages, what they brought: the file name of each descriptor)."""
        messages, files = [], []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self.sock, 65536, 3)
                messages.append(json.loads(data))
                files.append([os.readlink(f"/proc/self/fd/{fd}") for fd in fds])
                for fd in fds:
                    os.close(fd)
        return messages, files

    def close(self):
        self._ours.close()
        self.sock.close()


@pytest.fixture
def other(nothing_left_open):
    other = Other()
    yield other
    other.close()


@contextlib.asynccontextmanager
async def opened(other, options):
    with shared_by_drives(guardian=other.guardian) as shared:
        async with open_backend(options, shared) as backend:
            yield backend


async def test_an_image_is_watched_while_it_is_open(image, other):
    async with opened(other, config(image, cache=CACHE_MODES["unsafe"])):
        (message,), (files,) = other.told()
        assert message == {"watch": 1, "filename": str(image), "offset": 0, "no_flush": True}
        assert files[0].startswith("/memfd:nbdserve-redo")
        assert files[1:] == [str(image)]
    assert other.told()[0] == [{"forget": 1}]


async def test_with_its_data_file(tmp_path, other):
    path = tmp_path / "image"
    create_image(str(path), MIB, data_file=str(tmp_path / "data"))
    async with opened(other, config(path)):
        assert other.told()[1][0][1:] == [str(path), str(tmp_path / "data")]


async def test_who_only_reads_is_not_watched(image, tmp_path, other):
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    async with opened(other, config(image, read_only=True)):
        pass
    async with opened(other, config(raw, format="raw")):
        pass
    assert other.told()[0] == []


async def test_an_image_in_a_part_of_a_file(image, tmp_path, other):
    whole = tmp_path / "whole"
    whole.write_bytes(bytes(65536) + image.read_bytes() + bytes(MIB))
    text = f"driver=qcow2,file.driver=raw,file.offset=65536,file.file.filename={whole}"
    image_config = ImageConfig("tree", options=parse_node(parse_image_opts(text)))
    async with opened(other, image_config) as backend:
        assert other.told()[0][0]["offset"] == 65536
        await backend.write(0, b"x" * 512)
    assert other.told()[0] == [{"forget": 1}]


async def test_one_that_is_not_locked_is_not_watched(image, other, caplog):
    """Nobody would wait for the guardian, who would write to what the next server has changed."""
    text = f"driver=qcow2,file.filename={image},file.locking=off"
    async with opened(other, ImageConfig("tree", options=parse_node(parse_image_opts(text)))):
        assert other.told()[0] == []
    assert "no guardian" in caplog.text


@pytest.mark.parametrize("place", ["file", "data-file"])
async def test_one_in_the_disk_of_another_image_is_not_watched(tmp_path, other, place):
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    create_image(str(inner), 4 * MIB)
    data = "" if place == "file" else str(tmp_path / "data")
    create_image(str(outer), MIB, data_file=data or None)
    text = f"driver=qcow2,file.driver=qcow2,file.file.filename={inner}"
    if place == "file":
        async with open_backend(config(inner)) as backend:
            await backend.write(0, outer.read_bytes())
    else:
        text = f"driver=qcow2,file.filename={outer},data-file.driver=qcow2"
        text += f",data-file.file.filename={inner}"
    async with opened(other, ImageConfig("tree", options=parse_node(parse_image_opts(text)))):
        assert [message["filename"] for message in other.told()[0]] == [str(inner)]


async def test_one_that_is_refused_is_forgotten(image, other):
    content = bytearray(image.read_bytes())
    content[79] |= 1  # the dirty bit
    image.write_bytes(content)
    with pytest.raises(ImageError, match="not closed cleanly"):
        async with opened(other, config(image)):
            pass
    assert [next(iter(message)) for message in other.told()[0]] == ["watch", "forget"]


async def test_a_guardian_that_died_is_missed_once(image, other, caplog):
    other.sock.close()
    async with opened(other, config(image)) as backend:
        await backend.write(0, b"x" * 512)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no guardian" in caplog.text


@pytest.mark.parametrize("missing", ["/proc", "memfd"])
async def test_what_cannot_be_watched_is_served_all_the_same(
    image, other, monkeypatch, caplog, missing
):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    if missing == "memfd":
        monkeypatch.setattr(os, "memfd_create", refuse)
    else:
        monkeypatch.setattr(FileNode, "_reopen", refuse)
    async with opened(other, config(image)) as backend:
        await backend.write(0, b"x" * 512)
    assert other.told()[0] == []
    assert "no guardian (Function not implemented)" in caplog.text
    async with open_backend(config(image)):
        pass  # nothing of the locks is left


def test_who_ignores_the_end_of_children_stops_in_order(monkeypatch):
    previous = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with guardian() as ours:
            assert ours is not None
    finally:
        signal.signal(signal.SIGCHLD, previous)


def test_without_processes_the_server_goes_on(monkeypatch, caplog):
    def refuse():
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with guardian() as none:
        assert none is None
    assert "no guardian (Resource temporarily unavailable)" in caplog.text


# --- waiting for it -------------------------------------------------------------------------------


@contextlib.contextmanager
def left_alone(path, *, alive=False):
    """The lock of a guardian whose server is dead, or is not."""
    fds = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for _ in range(2)]
    lock = ImageLock(fds[0], str(path))
    lock.acquire(*PERMISSIONS[Role.FORMAT_RW])
    twin = lock.twin(fds[1])
    if not alive:
        os.close(fds.pop(0))
    try:
        yield twin
    finally:
        for fd in fds:
            os.close(fd)


async def test_who_opens_an_image_in_its_care_waits(image, monkeypatch):
    asked = []
    really = place.is_being_rescued
    with left_alone(image) as twin:

        def is_being_rescued(fd):
            asked.append(really(fd))
            if len(asked) == 3:
                twin.release()
            return asked[-1]

        monkeypatch.setattr(place, "is_being_rescued", is_being_rescued)
        async with open_backend(config(image)):
            assert asked == [True] * 3


async def test_nobody_waits_long_for_a_server_that_lives(image, monkeypatch):
    monkeypatch.setattr(place, "PATIENCE", 0.02)
    with (
        left_alone(image, alive=True),
        trio.fail_after(place.RESCUE_PATIENCE),
        pytest.raises(LockedError, match="in use by"),
    ):
        async with open_backend(config(image)):
            pass


async def test_nobody_waits_for_ever(image, monkeypatch):
    monkeypatch.setattr(place, "PATIENCE", 0.02)
    monkeypatch.setattr(place, "RESCUE_PATIENCE", 0.1)
    with left_alone(image), pytest.raises(LockedError, match="in use by the guardian"):
        async with open_backend(config(image)):
            pass


# --- what it does then ----------------------------------------------------------------------------


def orphan(path, *, flags=os.O_RDWR, no_flush=False, start=0):
    """A file whose server changed eight bytes of a table, and died."""
    log = RedoLog()
    log.append(encode(PUT, 2, 8, 512), 0x1122334455667788)
    found = _Orphan(str(path), start, no_flush, os.dup(log.fd), [os.open(path, flags)])
    log.close()
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xee" * 4096)
    return path


@pytest.mark.parametrize("start", [0, 1024])
def test_it_writes_what_is_left(file, start):
    orphan(file, start=start).rescue()
    content = file.read_bytes()
    at = start + 512
    assert content[at : at + 8] == bytes.fromhex("1122334455667788")
    assert content[:at] + content[at + 8 :] == b"\xee" * 4088


@pytest.mark.parametrize("no_flush", [False, True])
def test_it_flushes_before_and_after_unless_told_not_to(file, no_flush, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("flush"))
    really = os.pwrite

    def pwrite(fd, data, offset):
        calls.append("write")
        return really(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    orphan(file, no_flush=no_flush).rescue()
    assert calls == (["write"] if no_flush else ["flush", "write", "flush"])


def test_it_says_what_it_could_not_do(file, capfd):
    orphan(file, flags=os.O_RDONLY).rescue()
    said = capfd.readouterr().err
    assert said.startswith(f"nbdserve: {file}: the server was killed, and finishing its work")
    assert said.count("\n") == 1
    assert file.read_bytes() == b"\xee" * 4096


def test_it_waits_for_io_of_the_dead(file, monkeypatch):
    """Requests of io_uring outlive their process, and what they write must not come after us."""
    server = os.open(file, os.O_RDWR)
    lock = ImageLock(server, str(file))
    lock.acquire(*PERMISSIONS[Role.FORMAT_RW])
    left = orphan(file)
    lock.twin(left.files[0])
    pauses = []

    def sleep(seconds):
        assert file.read_bytes() == b"\xee" * 4096
        pauses.append(seconds)
        if len(pauses) == 3:
            os.close(server)

    monkeypatch.setattr(guardian_module.time, "sleep", sleep)
    left.rescue()
    assert pauses == [guardian_module.POLL] * 3
    assert file.read_bytes() != b"\xee" * 4096


def test_with_nothing_left_to_do_it_touches_nothing(file, monkeypatch):
    monkeypatch.setattr(os, "fdatasync", lambda fd: pytest.fail("a flush"))
    log = RedoLog()
    found = _Orphan(str(file), 0, False, os.dup(log.fd), [os.open(file, os.O_RDWR)])
    log.close()
    found.rescue()
    assert pathlib.Path(file).read_bytes() == b"\xee" * 4096

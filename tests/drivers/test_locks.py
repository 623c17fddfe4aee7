"""Image locks against QEMU's own tools, both ways round, and against ourselves."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import subprocess
import sys

import pytest

import peers
from nbdserve.drivers import locks
from nbdserve.drivers.locks import PERMISSIONS, ImageLock, Permission, Role
from nbdserve.errors import ImageError, LockedError

NONE = Permission(0)
READ = Permission.CONSISTENT_READ


@contextlib.contextmanager
def locked(path, role=None, *, read_only=False):
    """An ImageLock on a descriptor of its own; with a role it has been acquired."""
    fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        lock = ImageLock(fd, str(path))
        if role is not None:
            lock.acquire(*PERMISSIONS[role])
        yield lock
    finally:
        os.close(fd)


@contextlib.contextmanager
def qemu_nbd(image, *options):
    """qemu-nbd that has its image open: it listens before, and greets only after."""
    format = "raw" if image.suffix == ".raw" else "qcow2"
    with (
        peers.qemu_nbd(image, *options, format=format) as server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(str(server.socket_path))
        assert client.recv(8) == b"NBDMAGIC"
        yield server.process.pid


def bytes_locked(path, pid="self"):
    """The bytes of a file locked through the descriptors of a process, as the kernel tells."""
    found = []
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.path.samefile(link, path):
                found += (link.parent.parent / "fdinfo" / link.name).read_text().splitlines()
    ranges = [line.split()[-2:] for line in found if line.startswith("lock:")]
    return {byte for start, end in ranges for byte in range(int(start), int(end) + 1)}


@pytest.fixture
def raw(tmp_path):
    """A raw image that does not even have the bytes that are locked."""
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(64))
    return path


@pytest.fixture
def images(tmp_path):
    """A directory with one image of every role."""
    create = ("create", "-q", "-f", "qcow2")
    peers.qemu_img(*create, tmp_path / "plain.qcow2", "1M")
    peers.qemu_img("create", "-q", "-f", "raw", tmp_path / "plain.raw", "1M")
    peers.qemu_img(*create, tmp_path / "base.qcow2", "1M")
    peers.qemu_img("create", "-q", "-f", "raw", tmp_path / "base.raw", "1M")
    for overlay, backing in [("over", "base.qcow2"), ("other", "base.qcow2"), ("raw", "base.raw")]:
        kind = backing.partition(".")[2]
        peers.qemu_img(*create, "-b", backing, "-F", kind, tmp_path / f"{overlay}.overlay")
    data_file = f"data_file={tmp_path}/data.raw,data_file_raw=on"
    peers.qemu_img(*create, "-o", data_file, tmp_path / "split.qcow2", "1M")
    return tmp_path


# --- what is locked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (Role.FORMAT_RW, {100, 101, 103, 201, 203}),
        (Role.FORMAT_RO, {100, 201, 203}),
        (Role.RAW_RW, {100, 101, 203}),
        (Role.RAW_RO, {100, 203}),
        (Role.RAW_BACKING, {100}),
        (Role.DATA_FILE_RW, {100, 101, 103, 203}),
        (Role.DATA_FILE_RO, {100, 203}),
    ],
)
def test_bytes_of_each_role(raw, role, expected):
    with locked(raw, role, read_only="RW" not in role.name):
        assert bytes_locked(raw) == expected
    assert raw.stat().st_size == 64


@pytest.mark.peer("qemu-nbd", "qemu-img")
@pytest.mark.parametrize(
    ("role", "served", "options", "file"),
    [
        (Role.FORMAT_RW, "plain.qcow2", (), "plain.qcow2"),
        (Role.FORMAT_RO, "plain.qcow2", ("-r",), "plain.qcow2"),
        (Role.RAW_RW, "plain.raw", (), "plain.raw"),
        (Role.RAW_RO, "plain.raw", ("-r",), "plain.raw"),
        (Role.FORMAT_RW, "over.overlay", (), "over.overlay"),
        (Role.FORMAT_RO, "over.overlay", (), "base.qcow2"),
        (Role.FORMAT_RO, "over.overlay", ("-r",), "base.qcow2"),
        (Role.RAW_BACKING, "raw.overlay", (), "base.raw"),
        (Role.RAW_BACKING, "raw.overlay", ("-r",), "base.raw"),
        (Role.FORMAT_RW, "split.qcow2", (), "split.qcow2"),
        (Role.DATA_FILE_RW, "split.qcow2", (), "data.raw"),
        (Role.DATA_FILE_RO, "split.qcow2", ("-r",), "data.raw"),
    ],
)
def test_qemu_nbd_locks_the_same_bytes(images, role, served, options, file):
    with qemu_nbd(images / served, *options) as pid:
        theirs = bytes_locked(images / file, pid)
    with locked(images / file, role):
        assert bytes_locked(images / file) == theirs


def test_acquiring_again_changes_the_locks(raw):
    with locked(raw) as lock:
        for role in [Role.RAW_RO, Role.FORMAT_RW, Role.FORMAT_RO, Role.RAW_BACKING]:
            permissions, shared = PERMISSIONS[role]
            lock.acquire(permissions, shared)
            used = {100 + i for i in range(4) if permissions >> i & 1}
            unshared = {200 + i for i in range(4) if not shared >> i & 1}
            assert bytes_locked(raw) == used | unshared
        lock.acquire(NONE, Permission.ALL)
        assert bytes_locked(raw) == set()


def test_release(raw):
    with locked(raw, Role.FORMAT_RW) as lock, locked(raw) as other:
        lock.release()
        lock.release()
        assert bytes_locked(raw) == set()
        other.acquire(*PERMISSIONS[Role.FORMAT_RW])


def test_closing_another_descriptor_of_the_file_keeps_the_locks(raw):
    with locked(raw, Role.FORMAT_RW):
        os.close(os.open(raw, os.O_RDONLY))
        assert bytes_locked(raw) == {100, 101, 103, 201, 203}


# --- who excludes whom ---------------------------------------------------------------------------

FIRST_AND_SECOND = [
    (Role.FORMAT_RW, Role.FORMAT_RW, '"write"'),
    (Role.FORMAT_RW, Role.FORMAT_RO, 'shared "write"'),
    (Role.FORMAT_RO, Role.FORMAT_RW, '"write"'),
    (Role.FORMAT_RO, Role.FORMAT_RO, None),
    (Role.RAW_RW, Role.RAW_RW, None),
    (Role.RAW_RW, Role.RAW_RO, None),
    (Role.RAW_RW, Role.FORMAT_RO, 'shared "write"'),
    (Role.RAW_RO, Role.FORMAT_RW, '"resize"'),
    (Role.RAW_BACKING, Role.RAW_RW, None),
    (Role.FORMAT_RW, Role.RAW_RO, 'shared "resize"'),
]


@pytest.mark.parametrize(("first", "second", "refused"), FIRST_AND_SECOND)
def test_exclusion_among_ourselves(raw, first, second, refused):
    with locked(raw, first), locked(raw) as lock:
        before = bytes_locked(raw)
        if refused is None:
            lock.acquire(*PERMISSIONS[second])
            return
        with pytest.raises(LockedError) as caught:
            lock.acquire(*PERMISSIONS[second])
        assert str(caught.value).startswith(f"{raw}: in use by this process itself (pid ")
        assert str(caught.value).endswith(f"({refused} lock refused)")
        assert caught.value.errno == errno.EAGAIN
        assert bytes_locked(raw) == before


def test_a_failed_change_keeps_what_was_held(raw):
    with locked(raw, Role.FORMAT_RO), locked(raw, Role.FORMAT_RO) as lock:
        with pytest.raises(LockedError):
            lock.acquire(*PERMISSIONS[Role.FORMAT_RW])
        assert bytes_locked(raw) == {100, 201, 203}
        # The lock still counts, and giving up more still works.
        with locked(raw) as third, pytest.raises(LockedError):
            third.acquire(*PERMISSIONS[Role.FORMAT_RW])
        lock.acquire(READ, Permission.ALL)


def test_force_share_beside_a_writer(raw):
    with locked(raw, Role.FORMAT_RW) as lock, locked(raw) as forced:
        forced.acquire(READ, Permission.ALL)
        assert bytes_locked(raw) == {100, 101, 103, 201, 203}
        lock.acquire(*PERMISSIONS[Role.FORMAT_RO])
        forced.acquire(*PERMISSIONS[Role.FORMAT_RO])


def test_giving_up_permissions_succeeds_whatever_others_did(raw):
    with locked(raw, Role.FORMAT_RW) as lock, open(raw, "rb") as rude:
        # Takes "write is not shared" without asking whether somebody writes.
        locks._set_lock(rude.fileno(), 201, fcntl.F_RDLCK)
        lock.acquire(*PERMISSIONS[Role.RAW_RW])
        with pytest.raises(LockedError):
            lock.acquire(*PERMISSIONS[Role.FORMAT_RW])
        lock.acquire(*PERMISSIONS[Role.RAW_RO])


@pytest.mark.peer("qemu-nbd", "qemu-img")
@pytest.mark.parametrize(
    ("file", "options", "role", "refused"),
    [
        ("plain.qcow2", (), Role.FORMAT_RW, "nobody else may write to it"),
        ("plain.qcow2", (), Role.FORMAT_RO, "it may be written to meanwhile"),
        ("plain.qcow2", ("-r",), Role.FORMAT_RW, "nobody else may write to it"),
        ("plain.qcow2", ("-r",), Role.FORMAT_RO, None),
        ("plain.raw", (), Role.RAW_RW, None),
        ("plain.raw", (), Role.FORMAT_RW, "nobody else may resize it"),
    ],
)
def test_qemu_nbd_first(images, file, options, role, refused):
    image = images / file
    with qemu_nbd(image, *options) as pid, locked(image) as lock:
        if refused is None:
            lock.acquire(*PERMISSIONS[role])
            return
        with pytest.raises(LockedError) as caught:
            lock.acquire(*PERMISSIONS[role])
        holder = f"{image}: in use by qemu-nbd (pid {pid}): {refused} ("
        assert str(caught.value).startswith(holder)
        assert bytes_locked(image) == set()
        lock.acquire(READ, Permission.ALL)


@pytest.mark.peer("qemu-io", "qemu-img")
@pytest.mark.parametrize(
    ("file", "role", "options", "refused"),
    [
        ("plain.qcow2", Role.FORMAT_RW, (), 'Failed to get "write" lock'),
        ("plain.qcow2", Role.FORMAT_RW, ("-r",), 'Failed to get shared "write" lock'),
        ("plain.qcow2", Role.FORMAT_RW, ("-r", "-U"), None),
        ("plain.qcow2", Role.FORMAT_RO, (), 'Failed to get "write" lock'),
        ("plain.qcow2", Role.FORMAT_RO, ("-r",), None),
        ("plain.raw", Role.RAW_RW, (), None),
        ("plain.raw", Role.FORMAT_RO, (), 'Failed to get "write" lock'),
        ("plain.raw", Role.RAW_BACKING, (), None),
    ],
)
def test_we_first_then_qemu_io(images, file, role, options, refused):
    image = images / file
    words = [*options, "-f", image.suffix[1:], "-c", "read 0 512", image]
    with locked(image, role):
        done = peers.run("qemu-io", *words, check=False)
    assert (done.returncode == 0) == (refused is None), done.stderr
    assert refused is None or refused in done.stderr
    # It was the lock that refused, and it is gone.
    assert peers.run("qemu-io", *words).returncode == 0


@pytest.mark.peer("qemu-img")
def test_we_first_then_qemu_img(images):
    image = images / "plain.qcow2"
    with locked(image, Role.FORMAT_RW):
        done = peers.run("qemu-img", "check", image, check=False)
        assert 'Failed to get shared "write" lock' in done.stderr
        peers.qemu_img("info", "-U", image)
    peers.qemu_img("check", image)


@pytest.mark.peer("qemu-nbd", "qemu-img")
def test_a_backing_file_is_shared_by_all_who_only_read_it(images):
    base = images / "base.qcow2"
    with (
        qemu_nbd(images / "over.overlay") as pid,
        locked(images / "other.overlay", Role.FORMAT_RW),
        locked(base, Role.FORMAT_RO, read_only=True),
        locked(base) as writer,
        pytest.raises(LockedError) as caught,
    ):
        writer.acquire(*PERMISSIONS[Role.FORMAT_RW])
    assert f"qemu-nbd (pid {pid})" in str(caught.value)
    assert f"this process itself (pid {os.getpid()})" in str(caught.value)


# --- naming the holder ---------------------------------------------------------------------------


@contextlib.contextmanager
def holders(*programs, fds):
    """Processes that inherit descriptors: with them the open file description and its locks."""
    running = [
        subprocess.Popen([program, "60"], pass_fds=fds, executable=program)
        for program in programs
    ]
    try:
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def refusal(path):
    with locked(path) as lock, pytest.raises(LockedError) as caught:
        lock.acquire(*PERMISSIONS[Role.FORMAT_RW])
    return str(caught.value)


def test_several_holders(raw):
    with contextlib.ExitStack() as stack:
        with locked(raw, Role.FORMAT_RO) as lock:
            pids = stack.enter_context(holders("/bin/sleep", "/bin/sleep", fds=[lock._fd]))
        # Ours is closed; the description, and with it the lock, lives on in the children.
        message = refusal(raw)
    assert f"in use by sleep (pid {min(pids)}) and sleep (pid {max(pids)}): " in message
    with locked(raw, Role.FORMAT_RW):
        pass


def test_many_holders_are_counted(raw):
    with locked(raw, Role.FORMAT_RO) as lock, holders(*["/bin/sleep"] * 4, fds=[lock._fd]):
        assert " and 2 more: nobody else" in refusal(raw)


def test_a_holder_with_two_descriptors_is_named_once(raw):
    with contextlib.ExitStack() as stack:
        with locked(raw, Role.FORMAT_RO) as lock, open(os.dup(lock._fd), "rb") as twin:
            fds = [lock._fd, twin.fileno()]
            (pid,) = stack.enter_context(holders("/bin/sleep", fds=fds))
        assert f"in use by sleep (pid {pid}): " in refusal(raw)


def test_who_has_the_file_open_without_a_lock_is_not_named(raw):
    with (
        open(raw, "rb") as bystander,
        holders("/bin/sleep", fds=[bystander.fileno()]),
        locked(raw, Role.FORMAT_RO),
    ):
        assert f"in use by this process itself (pid {os.getpid()}): " in refusal(raw)


def test_a_holder_whose_name_would_break_the_line(raw, tmp_path):
    odd = tmp_path / "a\n\x1b[31m"
    odd.symlink_to("/bin/sleep")
    with contextlib.ExitStack() as stack:
        with locked(raw, Role.FORMAT_RO) as lock:
            (pid,) = stack.enter_context(holders(str(odd), fds=[lock._fd]))
        assert f"in use by a??[31m (pid {pid}): " in refusal(raw)


@pytest.mark.parametrize("call", ["listdir", "stat"])
def test_without_proc_the_refusal_stays(raw, monkeypatch, call):
    def denied(path):
        raise PermissionError(errno.EACCES, "denied", path)

    with locked(raw, Role.FORMAT_RW), locked(raw) as lock:
        monkeypatch.setattr(os, call, denied)
        with pytest.raises(LockedError, match="in use by another process: nobody else may write"):
            lock.acquire(*PERMISSIONS[Role.FORMAT_RW])


@pytest.mark.parametrize("with_fdinfo", [True, False])
def test_a_foreign_exclusive_lock(raw, monkeypatch, with_fdinfo):
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX);"
        " print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, raw], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        if not with_fdinfo:
            # A POSIX lock has an owner whom the kernel names in its answer.
            monkeypatch.setattr(locks, "_numbers", lambda directory: [])
        with locked(raw) as lock, pytest.raises(LockedError) as caught:
            lock.acquire(*PERMISSIONS[Role.FORMAT_RO])
        process.stdin.close()
    assert str(caught.value).endswith(f"(pid {process.pid}): it is locked exclusively")


# --- where locks cannot be had -------------------------------------------------------------------


@pytest.fixture
def kernel_without_ofd_locks(monkeypatch):
    def unknown(fd, byte):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(locks, "_test_lock", unknown)
    locks.ofd_locks_available.cache_clear()
    yield
    locks.ofd_locks_available.cache_clear()


@contextlib.contextmanager
def guarded(path, role=Role.FORMAT_RW):
    """(the lock of a server, its descriptor, that of its guardian)."""
    with locked(path, role) as lock:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        twin = lock.twin(fd)
        try:
            yield lock, twin, fd
        finally:
            os.close(fd)


def test_a_twin_keeps_the_image_locked(raw):
    with guarded(raw) as (lock, twin, _fd), locked(raw) as other:
        lock.release()
        with pytest.raises(LockedError, match="in use by"):
            other.acquire(*PERMISSIONS[Role.FORMAT_RW])
        twin.release()
        other.acquire(*PERMISSIONS[Role.FORMAT_RW])


def test_the_server_of_a_guardian_is_alive_until_its_description_is_gone(raw):
    with guarded(raw) as (lock, _twin, fd), locked(raw) as other:
        assert locks.server_is_alive(fd)
        assert not locks.is_being_rescued(other._fd)
        lock.release()
        assert not locks.server_is_alive(fd)
        assert locks.is_being_rescued(other._fd)


def test_without_a_guardian_nothing_is_being_rescued(raw):
    with locked(raw, Role.FORMAT_RW), locked(raw) as other:
        assert not locks.is_being_rescued(other._fd)


def test_a_server_is_named_and_not_its_guardian(raw):
    with guarded(raw), locked(raw) as other, pytest.raises(LockedError) as caught:
        other.acquire(*PERMISSIONS[Role.FORMAT_RW])
    assert "this process itself" in str(caught.value)
    assert "guardian" not in str(caught.value)


def test_a_guardian_is_named_when_it_is_alone(raw):
    with guarded(raw) as (lock, _twin, _fd), locked(raw) as other:
        lock.release()
        with pytest.raises(LockedError, match=rf"the guardian \(pid {os.getpid()}\) of a server"):
            other.acquire(*PERMISSIONS[Role.FORMAT_RW])


def test_there_is_no_twin_of_who_holds_nothing(raw):
    with locked(raw) as lock, locked(raw) as other:
        with pytest.raises(ImageError, match="not locked"):
            lock.twin(other._fd)
        assert bytes_locked(raw) == set()


def test_a_twin_that_is_refused_leaves_nothing(raw, monkeypatch):
    really = locks._set_lock

    def refusing(fd, byte, kind):
        if byte == locks.GUARDIAN_BYTE and kind != fcntl.F_UNLCK:
            raise OSError(errno.ENOLCK, "no")
        really(fd, byte, kind)

    with locked(raw, Role.FORMAT_RW) as lock, locked(raw) as other:
        before = bytes_locked(raw)
        monkeypatch.setattr(locks, "_set_lock", refusing)
        with pytest.raises(ImageError, match="cannot lock"):
            lock.twin(other._fd)
        lock.release()
        assert bytes_locked(raw) == set() != before


@pytest.mark.usefixtures("kernel_without_ofd_locks")
def test_a_kernel_without_ofd_locks_gets_none(raw):
    assert not locks.ofd_locks_available()
    with locked(raw, Role.FORMAT_RW) as lock:
        assert bytes_locked(raw) == set()
        lock.release()


def test_this_kernel_has_ofd_locks():
    assert locks.ofd_locks_available()


@pytest.mark.parametrize("failing", [fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK])
def test_a_file_system_that_refuses_is_an_error(raw, monkeypatch, failing):
    assert locks.ofd_locks_available()
    really = fcntl.fcntl

    def some_nfs(fd, command, argument):
        if command == failing and argument[:2] != fcntl.F_UNLCK.to_bytes(2, sys.byteorder):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        return really(fd, command, argument)

    with locked(raw) as lock:
        monkeypatch.setattr(fcntl, "fcntl", some_nfs)
        with pytest.raises(ImageError) as caught:
            lock.acquire(*PERMISSIONS[Role.FORMAT_RW])
        assert not isinstance(caught.value, LockedError)
        assert caught.value.errno == errno.ENOLCK
        assert str(caught.value).startswith(f"{raw}: cannot lock: No locks available (")
        assert bytes_locked(raw) == set()

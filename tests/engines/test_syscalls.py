"""The system calls on real files: ext4 or whatever tmp_path is on, tmpfs, and a loop device."""

import contextlib
import ctypes
import errno
import fcntl
import os
import subprocess
import sys

import pytest

from facilities import folder_in_memory, loop_device
from nbdserve.engines import syscalls

KiB = 1024
MiB = 1024 * KiB


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR):
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def fd(tmp_path):
    """A file of 1 MiB, no byte of it zero, on disk."""
    path = tmp_path / "file"
    path.write_bytes(b"\xa5" * MiB)
    with opened(path) as fd:
        os.fsync(fd)
        yield fd


@pytest.fixture
def tmpfs_fd():
    """The same on tmpfs, which cannot do ZERO_RANGE."""
    with folder_in_memory() as folder, open(folder / "file", "w+b") as file:
        file.write(b"\xa5" * MiB)
        file.flush()
        yield file.fileno()


@pytest.fixture
def loop_fd(tmp_path):
    """A loop device of 1 MiB, no byte of it zero."""
    path = tmp_path / "disk"
    path.write_bytes(b"\xa5" * MiB)
    with loop_device(path) as device, opened(device) as fd:
        yield fd


def content(fd, start, end):
    return set(os.pread(fd, end - start, start))


def size(fd):
    return os.fstat(fd).st_size


def allocated(fd):
    return os.fstat(fd).st_blocks * 512


# --- fallocate on regular files ------------------------------------------------------------------


def test_punch_hole_leaves_a_hole_and_the_size(fd):
    syscalls.punch_hole(fd, 256 * KiB, 128 * KiB)
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 256 * KiB
    assert os.lseek(fd, 256 * KiB, os.SEEK_DATA) == 384 * KiB
    assert content(fd, 256 * KiB, 384 * KiB) == {0}
    assert content(fd, 0, 256 * KiB) == content(fd, 384 * KiB, MiB) == {0xA5}
    syscalls.punch_hole(fd, MiB, MiB)
    assert size(fd) == MiB


@pytest.mark.parametrize("offset", [512 * KiB + 1, 2**40 + 3])
def test_offsets_arrive_whole(fd, offset):
    os.ftruncate(fd, 2**40 + 8)
    os.pwrite(fd, b"\xff" * 5, offset)
    syscalls.punch_hole(fd, offset + 1, 3)
    assert os.pread(fd, 5, offset) == b"\xff\0\0\0\xff"


def test_fallocate_mode_0_allocates_and_grows(fd):
    syscalls.fallocate(fd, 0, MiB, MiB)
    assert size(fd) == 2 * MiB
    assert allocated(fd) >= 2 * MiB


def test_keep_size(fd):
    syscalls.fallocate(fd, syscalls.FALLOC_FL_KEEP_SIZE, MiB, MiB)
    assert size(fd) == MiB
    assert allocated(fd) >= 2 * MiB


@pytest.mark.parametrize("file", ["fd", "tmpfs_fd"])
def test_zero_range_that_may_unmap_gives_the_space_back(request, file):
    fd = request.getfixturevalue(file)
    syscalls.zero_range(fd, 64 * KiB, 512 * KiB, True, False)
    assert content(fd, 64 * KiB, 576 * KiB) == {0}
    assert content(fd, 0, 64 * KiB) == content(fd, 576 * KiB, MiB) == {0xA5}
    assert allocated(fd) <= 512 * KiB + 64 * KiB


@pytest.mark.parametrize("file", ["fd", "tmpfs_fd"])
def test_zero_range_that_may_not_unmap_keeps_the_space(request, file):
    fd = request.getfixturevalue(file)
    syscalls.zero_range(fd, 64 * KiB, 512 * KiB, False, False)
    assert content(fd, 64 * KiB, 576 * KiB) == {0}
    assert content(fd, 0, 64 * KiB) == content(fd, 576 * KiB, MiB) == {0xA5}
    assert allocated(fd) >= MiB


@pytest.mark.parametrize("file", ["fd", "tmpfs_fd"])
@pytest.mark.parametrize("may_unmap", [True, False])
def test_zero_range_past_the_end_moves_the_end(request, file, may_unmap):
    fd = request.getfixturevalue(file)
    syscalls.zero_range(fd, MiB - 4 * KiB, 64 * KiB + 1, may_unmap, False)
    assert size(fd) == MiB + 60 * KiB + 1
    assert content(fd, MiB - 4 * KiB, size(fd)) == {0}
    syscalls.zero_range(fd, 0, 4 * KiB, may_unmap, False)
    assert size(fd) == MiB + 60 * KiB + 1


def test_discard_range_of_a_file_is_a_hole(fd):
    syscalls.discard_range(fd, 256 * KiB, 128 * KiB, False)
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 256 * KiB
    assert size(fd) == MiB


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (-1, 4096), (0, -4096)], ids=["empty", "before 0", "negative"]
)
@pytest.mark.parametrize("may_unmap", [True, False])
def test_impossible_ranges_are_einval(fd, offset, length, may_unmap):
    for call in (
        lambda: syscalls.fallocate(fd, 0, offset, length),
        lambda: syscalls.punch_hole(fd, offset, length),
        lambda: syscalls.zero_range(fd, offset, length, may_unmap, False),
        lambda: syscalls.discard_range(fd, offset, length, False),
    ):
        with pytest.raises(OSError, match="Invalid argument") as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert content(fd, 0, MiB) == {0xA5}


def test_a_read_only_descriptor_is_ebadf(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with (
        opened(tmp_path / "file", os.O_RDONLY) as fd,
        pytest.raises(OSError, match="Bad file descriptor") as caught,
    ):
        syscalls.punch_hole(fd, 0, 1)
    assert caught.value.errno == errno.EBADF


def test_what_cannot_be_allocated_is_eopnotsupp():
    # The kernel says ENODEV to a character device, ESPIPE to a pipe.
    with opened(os.devnull) as fd, pytest.raises(OSError, match="not supported") as caught:
        syscalls.fallocate(fd, 0, 0, 1)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_other_errors_do_not_make_zero_range_try_on(fd, monkeypatch):
    modes = []

    def full(fd, mode, offset, length):
        modes.append(mode)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(syscalls, "fallocate", full)
    with pytest.raises(OSError, match="full"):
        syscalls.zero_range(fd, 0, 4096, True, False)
    assert modes == [syscalls.FALLOC_FL_PUNCH_HOLE | syscalls.FALLOC_FL_KEEP_SIZE]


def test_an_interrupted_call_is_repeated(fd, monkeypatch):
    answers = [errno.EINTR, errno.EINTR, 0]

    class Library:
        @staticmethod
        def fallocate(*args):
            ctypes.set_errno(answers.pop(0))
            return -1 if ctypes.get_errno() else 0

    monkeypatch.setattr(syscalls, "_c_library", Library)
    syscalls.fallocate(fd, 0, 0, 1)
    assert answers == []


def test_an_interrupted_ioctl_is_repeated(monkeypatch):
    answers = [InterruptedError(errno.EINTR, "interrupted"), b"\0\0\0\x01\0\0\0\0"]

    def ioctl(fd, request, argument):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert syscalls.block_device_size(3) == 2**24
    assert answers == []


def test_ctypes_is_not_loaded_by_the_import():
    code = "import sys, nbdserve.engines.syscalls; sys.exit('ctypes' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- file systems --------------------------------------------------------------------------------


def test_is_memory_file_system(tmpfs_fd):
    assert syscalls.is_memory_file_system(tmpfs_fd)
    with opened("/proc/self/status", os.O_RDONLY) as fd:
        assert not syscalls.is_memory_file_system(fd)


def test_is_memory_file_system_of_a_closed_descriptor():
    with pytest.raises(OSError, match="Bad file descriptor"):
        syscalls.is_memory_file_system(-1)


# --- block devices -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        syscalls.block_device_size,
        syscalls.logical_block_size,
        lambda fd: syscalls.block_discard(fd, 0, 4096),
        lambda fd: syscalls.block_zero_out(fd, 0, 4096),
    ],
    ids=["size", "block size", "discard", "zero out"],
)
def test_block_device_calls_refuse_a_file_with_eopnotsupp(fd, call):
    with pytest.raises(OSError, match="not supported") as caught:
        call(fd)
    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.peer("losetup")
def test_sizes_of_a_device(loop_fd):
    assert syscalls.block_device_size(loop_fd) == MiB
    assert syscalls.logical_block_size(loop_fd) == 512


@pytest.mark.peer("losetup")
@pytest.mark.parametrize("may_unmap", [True, False])
def test_zero_range_of_a_device(loop_fd, may_unmap):
    assert content(loop_fd, 0, MiB) == {0xA5}
    syscalls.zero_range(loop_fd, 64 * KiB, 512 * KiB, may_unmap, True)
    # Not only on the medium: what the page cache held before must be gone too.
    assert content(loop_fd, 64 * KiB, 576 * KiB) == {0}
    assert content(loop_fd, 0, 64 * KiB) == content(loop_fd, 576 * KiB, MiB) == {0xA5}


@pytest.mark.peer("losetup")
def test_discard_range_of_a_device(loop_fd, tmp_path):
    syscalls.discard_range(loop_fd, 256 * KiB, 128 * KiB, True)
    with opened(tmp_path / "disk") as fd:
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 256 * KiB
        assert content(fd, 384 * KiB, MiB) == {0xA5}


@pytest.mark.peer("losetup")
@pytest.mark.parametrize(
    "call",
    [
        syscalls.block_discard,
        syscalls.block_zero_out,
        lambda fd, *range_: syscalls.zero_range(fd, *range_, True, True),
    ],
    ids=["discard", "zero out", "zero range"],
)
@pytest.mark.parametrize(("offset", "length"), [(100, 512), (MiB, 4096)], ids=["unaligned", "end"])
def test_ranges_a_device_cannot_do_are_einval(loop_fd, call, offset, length):
    with pytest.raises(OSError, match="Invalid argument") as caught:
        call(loop_fd, offset, length)
    assert caught.value.errno == errno.EINVAL
    assert content(loop_fd, 0, MiB) == {0xA5}

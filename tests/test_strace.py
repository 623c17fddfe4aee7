"""Logs of strace: what they say, and that they say it in time."""

import pathlib
import subprocess
import sys

import pytest

from strace import Access, Kind, Log, accesses, parse

OPENED = '7 openat(AT_FDCWD</>, "disk", O_RDWR|O_DIRECT|O_CLOEXEC) = 5</disk>\n'


def of(lines):
    return accesses(parse(OPENED + lines), "/disk", "/log.ring")


@pytest.mark.parametrize(
    ("line", "access"),
    [
        ('pwrite64(5</disk>, "a, b) = 1"..., 4096, 512) = 4096', Access(Kind.WRITE, 512, 4096)),
        ('pwritev(5</disk>, [{iov_base="a", iov_len=1}], 1, 7) = 1', Access(Kind.WRITE, 7, 1)),
        ("pwritev2(5</disk>, [{...}], 1, 7, 0) = 1", Access(Kind.WRITE, 7, 1)),
        ("pwritev2(5</disk>, [{...}], 1, 7, RWF_DSYNC) = 1", Access(Kind.WRITE, 7, 1, dsync=True)),
        ("fdatasync(5</disk>)         = 0", Access(Kind.SYNC)),
        ("fallocate(5</disk>, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 1, 2) = 0",
         Access(Kind.PUNCH, 1, 2)),
        ("fallocate(5</disk>, FALLOC_FL_ZERO_RANGE, 1, 2) = 0", Access(Kind.ZERO, 1, 2)),
        ("fallocate(5</disk>, 0, 1, 2) = 0", Access(Kind.ALLOCATE, 1, 2)),
        ("ftruncate(5</disk>, 99) = 0", Access(Kind.LENGTH, 99)),
    ],
)  # fmt: skip
def test_a_call_is_an_access(line, access):
    assert of(f"7 {line}\n") == [access._replace(direct=True, begin=1, end=1)]


@pytest.mark.parametrize(
    "line",
    [
        'pwrite64(6</other>, "a", 1, 0) = 1',
        'pwrite64(5</disk>, "a", 1, 0) = -1 ENOSPC (No space left on device)',
        'write(1<pipe:[3]>, "x", 1) = 1',
        "fcntl(5</disk>, F_GETFL) = 0x8002 (flags O_RDWR|O_LARGEFILE)",
        "--- SIGTERM {si_signo=SIGTERM} ---",
        "+++ exited with 0 +++",
        "fdatasync(5</disk> <unfinished ...>",
    ],
)
def test_what_is_none(line):
    assert of(f"7 {line}\n") == []
    assert of("7 fdatasync(5</dis") == []  # is still being written


@pytest.mark.parametrize(
    "line",
    [
        'write(5</disk>, "a", 1) = 1',
        "sync() = 0",
        "sendfile(9</other>, 5</disk>, NULL, 10) = 10",
        "io_uring_enter(8<anon_inode:[io_uring]>, 1, 0, 0, NULL, 8) = 1",
        "what is this",
    ],
)
def test_what_nobody_understands_is_an_error(line):
    with pytest.raises(ValueError, match=r"nobody knows|not a line"):
        of(f"7 {line}\n")


def test_a_descriptor_changes_and_is_duplicated():
    found = of(
        "7 fcntl(5</disk>, F_DUPFD_CLOEXEC, 0) = 6</disk>\n"
        "7 fcntl(5</disk>, F_SETFL, O_RDWR) = 0\n"
        '7 pwrite64(5</disk>, "a", 1, 0) = 1\n'
        '7 pwrite64(6</disk>, "a", 1, 0) = 1\n'
    )
    assert [access.direct for access in found] == [False, True]


def test_a_sync_has_its_place_where_it_began_and_a_write_where_it_ended():
    found = of(
        "7 fdatasync(5</disk> <unfinished ...>\n"
        '8 pwrite64(5</disk>, "a" <unfinished ...>\n'
        "7 <... fdatasync resumed>) = 0\n"
        "9 fdatasync(5</disk>) = 0\n"
        "8 <... pwrite64 resumed>, 1, 0) = 1\n"
    )
    assert [access.kind for access in found] == [Kind.SYNC, Kind.SYNC, Kind.WRITE]


def test_requests_of_linux_aio():
    found = of(
        "7 io_submit(0x7f, 2, [{aio_data=0x1, aio_lio_opcode=IOCB_CMD_PWRITE,"
        ' aio_fildes=5</disk>, aio_buf="data", aio_nbytes=4, aio_offset=512}, {aio_data=0x2,'
        " aio_lio_opcode=IOCB_CMD_FDSYNC, aio_fildes=5</disk>}]) = 2\n"
        "7 io_getevents(0x7f, 0, 128, [{data=0x2, obj=0x55, res=0, res2=0}, {data=0x1, obj=0x56,"
        " res=4, res2=0}], {tv_sec=0, tv_nsec=0}) = 2\n"
    )
    assert found == [Access(Kind.SYNC, 0, 0, True, False, 1, 2),
                     Access(Kind.WRITE, 512, 4, True, False, 1, 2)]  # fmt: skip


def test_a_durable_request_of_linux_aio():
    found = of(
        "7 io_submit(0x7f, 1, [{aio_data=0x1, aio_rw_flags=RWF_DSYNC,"
        " aio_lio_opcode=IOCB_CMD_PWRITE, aio_fildes=5</disk>, aio_buf=\"data\", aio_nbytes=4,"
        " aio_offset=512}]) = 1\n"
        "7 io_getevents(0x7f, 0, 128, [{data=0x1, obj=0x56, res=4, res2=0}], NULL) = 1\n"
    )
    assert found == [Access(Kind.WRITE, 512, 4, True, True, 1, 2)]


def test_requests_in_a_ring():
    found = of(
        "7 io_uring_enter(8<anon_inode:[io_uring]>, 2, 0, 0, NULL, 8) = 2\n"
        '7 write(9</log.ring>, "submit 1 23 5 512 2\\n", 20) = 20\n'
        '7 write(9</log.ring>, "submit 2 3 5 0 1\\n", 17) = 17\n'
        '7 write(9</log.ring>, "complete 1 4\\n", 13) = 13\n'
        '7 write(9</log.ring>, "complete 2 -5\\n", 14) = 14\n'
    )
    assert found == [Access(Kind.WRITE, 512, 4, True, True, 2, 4)]


# Writes from threads that take turns, a sync of each, and an answer only afterwards.
WRITER = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR)
def job(number):
    os.pwrite(fd, b"x", number)
    os.fdatasync(fd)
for number in range(int(sys.argv[2])):
    sys.stdin.read(1)
    thread = threading.Thread(target=job, args=[number])
    thread.start()
    thread.join()
    os.write(1, b"!")
"""
ROUNDS = 200


@pytest.mark.peer("strace")
def test_what_was_done_is_in_the_log_before_the_answer(tmp_path: pathlib.Path):
    (tmp_path / "disk").touch()
    log = Log(tmp_path / "log.strace")
    argv = [*log.command(), sys.executable, "-c", WRITER, tmp_path / "disk", str(ROUNDS)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:
        for number in range(ROUNDS):
            child.stdin.write(b"?")
            assert child.stdout.read(1) == b"!"
            text = log.path.read_text()
            assert f'"x", 1, {number}) = 1\n' in text
            assert text.count("fdatasync") >= number + 1
            if number % 20 == 0:
                kinds = [access.kind for access in log.accesses(tmp_path / "disk")]
                assert kinds == [Kind.WRITE, Kind.SYNC] * (number + 1)
    assert child.returncode == 0

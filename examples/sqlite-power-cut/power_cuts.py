"""Does it survive power cuts? An SQLite database in a file system on a disk that loses power.

The file system is ext2 in a qcow2 image, mounted by fuse2fs on what nbdfuse has from nbdserve: so
an fsync of SQLite's goes all the way down and is a flush of the disk. A program enters orders. Each
that it has committed is noted with the disk; then the disk tells what it may hold had the power
been cut at any moment: all that was flushed, and of all else any part. On each of these disks the
file system is repaired, the database opened, and every order noted by then must be in it.

Needs nbdserve, Linux with FUSE, and of Debian libnbd-bin, fuse2fs and e2fsprogs. Ends with 0 if
nothing was lost, with 1 if something was.
"""

import argparse
import contextlib
import os
import pathlib
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from subprocess import DEVNULL, PIPE

import orders

from nbdserve.testing import Outcome, serving

SIZE = 8 << 20
BROKEN = 4  # of e2fsck's status: errors that it could not repair


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--synchronous", default="FULL", choices=["OFF", "NORMAL", "FULL", "EXTRA"])
    parser.add_argument("--journal", default="PERSIST", choices=["PERSIST", "TRUNCATE", "DELETE"])
    parser.add_argument("--cache", default="writeback", help="of the disk: unsafe ignores flushes")
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        number = 0
        for number, outcome in enumerate(work_once(folder, arguments), start=1):
            what = lost(outcome, folder)
            if what:
                print(f"cut {number}: {what} (moment {outcome.moment}, seed {outcome.seed})")
                return 1
        print(f"{number} cuts, nothing lost")
        return 0


def work_once(folder: pathlib.Path, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Let the program work; what the disk may hold after a power cut meanwhile."""
    blank = folder / "blank.img"
    with blank.open("wb") as file:
        file.truncate(SIZE)
    # Without a journal: fuse2fs says that it does not write to one.
    run("mke2fs", "-q", "-t", "ext2", "-b", "1024", blank)
    # The program is a process of its own, not only because real ones are: the disk is served by a
    # thread of this one, which must not wait for the disk while it holds Python's lock.
    program = [sys.executable, orders.__file__, folder / "root" / "orders.db"]
    program += [arguments.synchronous, arguments.journal]
    with (
        serving(content=blank.read_bytes(), cache=arguments.cache, power_cut="disk") as disk,
        mounted(disk.uri, folder / "disk", folder / "root"),
        subprocess.Popen(program, stdin=PIPE, stdout=PIPE, text=True) as process,
    ):
        for number in range(1, arguments.orders + 1):
            print(number, file=process.stdin, flush=True)
            if process.stdout.readline() != f"{number}\n":
                sys.exit("the program failed")
            disk.mark(f"order {number}")
        return disk.all_cuts(arguments.cuts, arguments.seed)


@contextlib.contextmanager
def mounted(uri: str, plain: pathlib.Path, root: pathlib.Path) -> Iterator[None]:
    """The disk as a plain file, and the file system in that."""
    plain.touch()
    root.mkdir()
    with (
        running("nbdfuse", plain, uri, until=lambda: plain.stat().st_size),
        running("fuse2fs", "-f", "-o", "fakeroot", plain, root, until=root.is_mount),
    ):
        yield


@contextlib.contextmanager
def running(*command: object, until: Callable[[], object]) -> Iterator[None]:
    """A program that mounts something until it is told to end."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said)
        try:
            while not until():
                if process.poll() is not None:
                    said.seek(0)
                    sys.exit(f"{command[0]}: {said.read().decode()}")
                time.sleep(0.005)
            yield
        finally:
            process.terminate()
            process.wait()


def lost(outcome: Outcome, folder: pathlib.Path) -> str | None:
    """What is missing after a power cut, if anything is."""
    image = folder / "after.img"
    outcome.save(image)
    if run("e2fsck", "-f", "-y", image, check=False).returncode >= BROKEN:
        return "the file system is beyond repair"
    with tempfile.TemporaryDirectory(dir=folder) as found:
        run("debugfs", "-R", f"rdump / {found}", image)
        try:
            return missing(pathlib.Path(found, "orders.db"), len(outcome.marks))
        except sqlite3.DatabaseError as error:
            return f"the database is damaged: {error}"


def missing(path: pathlib.Path, committed: int) -> str | None:
    if not committed:
        return None  # not even the tables need be there
    database = orders.connect(f"{path}")
    with contextlib.closing(database):  # it undoes what the journal says was under way
        (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            return f"the database is damaged: {verdict}"
        numbers = [number for (number,) in database.execute("SELECT number FROM orders")]
        (total,) = database.execute("SELECT orders FROM total").fetchone()
    if numbers[:committed] != list(range(1, committed + 1)):
        return f"{committed} orders were committed, and {len(numbers)} are there"
    if total != len(numbers):
        return f"half a transaction: {len(numbers)} orders, and a total of {total}"
    return None


def run(*command: str | pathlib.Path, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])  # not all users have these
    return subprocess.run(
        command, check=check, stdout=DEVNULL, stderr=DEVNULL, env={**os.environ, "PATH": path}
    )


if __name__ == "__main__":
    sys.exit(main())

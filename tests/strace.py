"""What a server does to a file, as strace sees it: the calls that change or sync it, in order.

`Log.command()` is put before a server's command line. The server stays the child of who started
it (-D), so signals and exit status are its own. `Log.accesses` reads the log so far.

Reading it when an answer has come is free of races: strace writes and flushes the line of a call
while the thread that made it is still stopped at its end, so whatever that thread does afterwards
(hand over to another thread, send the answer) comes later. tests/test_strace.py tries that.

Two calls in flight together have no order of their own. What counts here is what a sync covers:
a sync has its place where it began, everything else where it ended. So whatever stands before a
sync is covered by it.

Requests of Linux AIO are decoded by strace. Those in an io_uring are in memory that it does not
see; ring_trace.py writes them down, and whether it wrote down all is checked here.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterable, Iterator

__all__ = ["Access", "Call", "Kind", "Log", "accesses", "parse"]

# What opens a descriptor or changes its O_DIRECT; what changes a file; what makes it durable.
# Ways that nobody takes today are here so that none can be taken unseen.
TRACED = (
    "openat", "fcntl",
    "write", "writev", "pwrite64", "pwritev", "pwritev2", "fallocate", "ftruncate",
    "copy_file_range", "sendfile", "splice",
    "fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync",
    "io_submit", "io_getevents", "io_pgetevents", "io_uring_enter",
)  # fmt: skip

# They need not name the file.
_OF_ALL_FILES = frozenset({"sync", "syncfs", "msync"})

# Far more than a line of ring_trace.py, and less than the data of a request.
STRING_SIZE = 100

_LINE = re.compile(r"(?P<thread>\d+) +(?P<text>.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(?P<rest>.*)")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+|\?)(?P<told>.*)")
_UNFINISHED = " <unfinished ...>"

_IOCB = re.compile(
    r"aio_data=(?P<tag>\w+), (aio_rw_flags=(?P<flags>\S+), )?"
    r"aio_lio_opcode=IOCB_CMD_(?P<name>\w+), aio_fildes=(?P<fd>\d+)"
    r"(?P<rest>.*?)(?=\{aio_data|$)"
)
_IOCB_OFFSET = re.compile(r"aio_offset=(\d+)")
_EVENT = re.compile(r"\{data=(\w+), .*?res=(-?\d+)")


class Call(NamedTuple):
    """A system call that did not fail. `told`: what strace adds to the result, like the path of a
    new descriptor. `begin` and `end` are line numbers of the log."""

    name: str
    arguments: str
    result: int
    told: str
    begin: int
    end: int

    @property
    def fd(self) -> int:
        """The first argument, if that is a descriptor; -1 if not."""
        number, opened, _ = self.arguments.partition("<")
        return int(number) if opened and number.isdigit() else -1


class Kind(enum.Enum):
    """What was done to the file."""

    READ = "read"
    WRITE = "write"
    SYNC = "sync"
    PUNCH = "punch"
    ZERO = "zero"
    ALLOCATE = "allocate"
    LENGTH = "length"


_FALLOCATE = {
    "0": Kind.ALLOCATE,
    "FALLOC_FL_ZERO_RANGE": Kind.ZERO,
    "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE": Kind.PUNCH,
}
_IOCB_KINDS = {
    "PREAD": Kind.READ, "PREADV": Kind.READ, "PWRITE": Kind.WRITE, "PWRITEV": Kind.WRITE,
    "FSYNC": Kind.SYNC, "FDSYNC": Kind.SYNC,
}  # fmt: skip
# enum io_uring_op
_SQE_KINDS = {
    1: Kind.READ, 22: Kind.READ, 2: Kind.WRITE, 23: Kind.WRITE, 3: Kind.SYNC,
}  # fmt: skip
_RWF_DSYNC = 2


class Access(NamedTuple):
    """One access to the file; a range in bytes where it has one. `direct`: through a descriptor
    with O_DIRECT; `dsync`: durable when done. `begin` and `end` are lines of the log."""

    kind: Kind
    offset: int = 0
    length: int = 0
    direct: bool = False
    dsync: bool = False
    begin: int = 0
    end: int = 0

    @property
    def place(self) -> int:
        """Where it stands among others; see above."""
        return self.begin if self.kind is Kind.SYNC else self.end


class Log:
    """The log of a command that is about to be started."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.ring = path.with_suffix(".ring")  # where ring_trace.py, if it is used, is to write

    def command(self) -> list[str]:
        """What to put before the command."""
        return [
            "strace", "-D", "-f", "-y", "-s", str(STRING_SIZE), "-o", str(self.path),
            "-e", "trace=" + ",".join(TRACED),
        ]  # fmt: skip

    def nb_lines(self) -> int:
        """How many lines it has now."""
        return self.path.read_bytes().count(b"\n")

    def calls(self) -> list[Call]:
        """All that is in the log now."""
        return list(parse(self.path.read_text(errors="replace")))

    def accesses(self, image: pathlib.Path) -> list[Access]:
        """What was done to a file, by place; `image` is its absolute path."""
        return accesses(self.calls(), str(image), str(self.ring))


def parse(text: str) -> Iterator[Call]:
    """The calls of a log that ended without an error, by their end; a line that is not complete is
    left out. Raises ValueError for a line that is none of strace's."""
    unfinished: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines()):
        entry = _LINE.fullmatch(line)
        if entry is None:
            raise ValueError(f"not a line of strace: {line!r}")
        thread, said, begin = entry["thread"], entry["text"], number
        if said.startswith(("+++ ", "--- ")):  # an exit, a signal
            continue
        if said.endswith(_UNFINISHED):
            unfinished[thread] = said.removesuffix(_UNFINISHED), number
            continue
        resumed = _RESUMED.fullmatch(said)
        if resumed is not None:
            start, begin = unfinished.pop(thread)
            said = start + resumed["rest"]
        call = _CALL.fullmatch(said)
        if call is None:
            raise ValueError(f"not a line of strace: {line!r}")
        if call["result"].isdigit():
            yield Call(
                call["name"], call["arguments"], int(call["result"]), call["told"], begin, number
            )


def accesses(calls: Iterable[Call], image: str, ring: str = "") -> list[Access]:
    """What calls do to a file, by place; `ring` is the path of ring_trace.py's log.

    Raises ValueError for a call that changes the file in a way unknown here, and where the kernel
    took requests from a ring that nobody has written down.
    """
    reader = _Reader(image, ring)
    for call in calls:
        reader.read(call)
    if reader.unseen:
        raise ValueError(f"{reader.unseen} requests in a ring, and nobody knows what they were")
    return sorted(reader.found, key=lambda access: access.place)


class _Reader:
    """Follows the image's descriptors, and requests in flight, through a log."""

    def __init__(self, image: str, ring: str) -> None:
        self.found: list[Access] = []
        self.unseen = 0  # requests that the kernel took from a ring, less those written down
        self._image = f"<{image}>"
        self._ring = f"<{ring}>"
        self._direct: dict[int, bool] = {}  # descriptor -> whether it has O_DIRECT
        self._in_flight: dict[int, tuple[int, Access]] = {}  # tag -> descriptor, access

    def read(self, call: Call) -> None:
        """The next call of the log."""
        match call.name:
            case "openat" | "fcntl":
                self._descriptor(call)
            case "io_submit":
                for iocb in _IOCB.finditer(call.arguments):
                    offset = _IOCB_OFFSET.search(iocb["rest"])
                    access = Access(
                        _IOCB_KINDS[iocb["name"]], int(offset[1]) if offset else 0,
                        dsync="RWF_DSYNC" in (iocb["flags"] or ""), begin=call.begin,
                    )  # fmt: skip
                    self._in_flight[int(iocb["tag"], 16)] = int(iocb["fd"]), access
            case "io_getevents":
                for tag, result in _EVENT.findall(call.arguments):
                    self._complete(int(tag, 16), int(result), call.end)
            case "io_uring_enter":
                self.unseen += call.result
            case "write" if self._ring in call.arguments:
                _, line, _ = call.arguments.split('"')
                self._ring_line(call, *line.removesuffix("\\n").split())
            case _ if self._image in call.arguments or call.name in _OF_ALL_FILES:
                self._add(call.fd, _access(call))

    def _descriptor(self, call: Call) -> None:
        direct = "O_DIRECT" in call.arguments
        if self._image in call.told:  # opened, or duplicated
            self._direct[call.result] = self._direct.get(call.fd, direct)
        elif ", F_SETFL, " in call.arguments and self._image in call.arguments:
            self._direct[call.fd] = direct

    def _ring_line(self, call: Call, what: str, tag: str, *numbers: str) -> None:
        """See ring_trace.py."""
        if what == "complete":
            self._complete(int(tag), int(numbers[0]), call.end)
            return
        self.unseen -= 1
        opcode, fd, offset, flags = map(int, numbers)
        access = Access(
            _SQE_KINDS[opcode], offset, dsync=bool(flags & _RWF_DSYNC), begin=call.begin
        )
        self._in_flight[int(tag)] = fd, access

    def _complete(self, tag: int, result: int, end: int) -> None:
        fd, access = self._in_flight.pop(tag)
        if result >= 0:
            self._add(fd, access._replace(length=result, end=end))

    def _add(self, fd: int, access: Access) -> None:
        if fd in self._direct and access.kind is not Kind.READ:
            self.found.append(access._replace(direct=self._direct[fd]))


def _access(call: Call) -> Access:
    """What a call does to the descriptor that it names."""
    *_, one, two, last = ["", "", *call.arguments.split(", ")]
    access = Access(Kind.WRITE, begin=call.begin, end=call.end)
    match call.name:
        case "pwrite64" | "pwritev":
            return access._replace(offset=int(last), length=call.result)
        case "pwritev2":
            return access._replace(offset=int(two), length=call.result, dsync="DSYNC" in last)
        case "fdatasync" | "fsync":
            return access._replace(kind=Kind.SYNC)
        case "ftruncate":
            return access._replace(kind=Kind.LENGTH, offset=int(last))
        case "fallocate":
            return access._replace(kind=_FALLOCATE[one], offset=int(two), length=int(last))
    raise ValueError(f"{call.name}({call.arguments}): nobody knows what that does to the file")

"""Who is measured: name -> how its process is started on a disk.

All serve over a unix socket, to any number of clients, with the host's page cache and a write
cache (cache=writeback, every one's default or said so).  A family is what a target is against:
in each round the faster server of a family is the opponent.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import peers
from bench.cases import CASES
from bench.images import Image

OURS = "nbdserve"

Start = Callable[[Image, Sequence[str]], contextlib.AbstractContextManager[peers.Server]]


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    """`raw_only`: it knows no qcow2 and gets a raw copy of the same bytes.

    `cases`: the names of the cases it takes part in.
    """

    family: str
    start: Start
    raw_only: bool = False
    cases: frozenset[str] = frozenset(CASES)


def _nbdserve(image: Image, options: Sequence[str]) -> contextlib.AbstractContextManager[
        peers.Server]:
    return peers.served(image.path, "-f", image.format, "--cache=writeback", *options)


def _qemu(aio: str) -> Start:
    def start(image: Image, _: Sequence[str]) -> contextlib.AbstractContextManager[peers.Server]:
        return peers.qemu_nbd(
            image.path, "--cache=writeback", f"--aio={aio}", format=image.format)
    return start


def _nbdkit(image: Image, _: Sequence[str]) -> contextlib.AbstractContextManager[peers.Server]:
    return peers.nbdkit("file", str(image.path))


SERVERS = {
    OURS: Contestant(OURS, _nbdserve),
    "qemu-threads": Contestant("qemu", _qemu("threads")),
    "qemu-io_uring": Contestant("qemu", _qemu("io_uring")),
    "nbdkit": Contestant(
        "nbdkit", _nbdkit, raw_only=True, cases=frozenset({"randread-32"})),
}

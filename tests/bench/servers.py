"""Who is measured: name -> how its process is started on a disk.

All serve over a unix socket, to any number of clients, in the cache mode of the case.  A family
is what a target is against: in each round the faster server of a family is the opponent.

`device` is no server: the same fio job, on a file beside the images.  It says what the disk
gave in that minute, which bounds everybody where the page cache is out of the way.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import peers
from bench.cases import CASES, Case, Disk, Fio
from bench.images import Copy, Image

OURS = "nbdserve"

# Where the client finds the disk: a URI, or a file without any server.
Where = str | pathlib.Path
# On an image, in a cache mode, with further options for our server.
Start = Callable[[Image, str, Sequence[str]], contextlib.AbstractContextManager[Where]]


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    """`copy`: the image it gets, its own format or a raw one.

    `cases`: the names of the cases it takes part in.
    """

    family: str
    start: Start
    copy: Copy = Copy.QCOW2
    cases: frozenset[str] = frozenset(CASES)


@contextlib.contextmanager
def _nbdserve(image: Image, cache: str, options: Sequence[str]) -> Iterator[Where]:
    with peers.served(image.path, "-f", image.format, f"--cache={cache}", *options) as server:
        yield server.uri


def _qemu(aio: str) -> Start:
    @contextlib.contextmanager
    def start(image: Image, cache: str, _: Sequence[str]) -> Iterator[Where]:
        with peers.qemu_nbd(
                image.path, f"--cache={cache}", f"--aio={aio}", format=image.format) as server:
            yield server.uri
    return start


@contextlib.contextmanager
def _nbdkit(image: Image, _cache: str, _options: Sequence[str]) -> Iterator[Where]:
    with peers.nbdkit("file", str(image.path)) as server:
        yield server.uri


@contextlib.contextmanager
def _nbdkit_qcow2(image: Image, cache: str, _options: Sequence[str]) -> Iterator[Where]:
    """Our block stack, nbdkit's front end."""
    with peers.nbdkit(image.path, f"format={image.format}", f"cache={cache}",
                      program=peers.NBDSERVE_NBDKIT) as server:
        yield server.uri


def _device(image: Image, _cache: str, _options: Sequence[str]
            ) -> contextlib.AbstractContextManager[Where]:
    return contextlib.nullcontext(image.path)


def _cases(chosen: Callable[[Case], bool]) -> frozenset[str]:
    return frozenset(name for name, case in CASES.items() if chosen(case))


def _waits_for_the_disk(case: Case) -> bool:
    return case.disk is Disk.UNCACHED or (isinstance(case.client, Fio) and case.client.flush)


# Its file plugin has no cache modes; the raw copy is for reading only.
NBDKIT_READS = frozenset({"randread-1", "randread-32", "seqread"})
NBDKIT_CASES = NBDKIT_READS | {"randwrite-32", "seqwrite", "none-read-32"}

SERVERS = {
    OURS: Contestant(OURS, _nbdserve),
    "qemu-threads": Contestant("qemu", _qemu("threads")),
    "qemu-io_uring": Contestant("qemu", _qemu("io_uring")),
    # Linux AIO needs O_DIRECT.
    "qemu-native": Contestant(
        "qemu", _qemu("native"), cases=_cases(lambda case: case.cache == "none")),
    "nbdkit": Contestant("nbdkit", _nbdkit, Copy.RAW, cases=NBDKIT_READS),
    "nbdkit-qcow2": Contestant("nbdkit-qcow2", _nbdkit_qcow2, cases=NBDKIT_CASES),
    "device": Contestant("device", _device, Copy.DEVICE, cases=_cases(_waits_for_the_disk)),
}

"""The engine matrix: `served`, our server with each engine, with the page cache and without it.

A test that moves data takes this fixture in place of `peers.served`, and so has a variant for each
legal pair.  Tests of options, refusals and life cycles start the server by themselves, once: there
it makes no difference what moves the data, or they say it.

`--matrix` runs all variants (`-k io_uring-none` picks a pair).  That takes long, so without it
every test runs with threads and the page cache, which are to be had everywhere, and the others
take turns: each pair runs each test function, and each of its cases runs with one further pair.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import pytest

import peers
from peers import PathLike, Server


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """Starts our server with an engine, and with O_DIRECT or without."""

    aio: str
    direct: bool
    folder: pathlib.Path
    """Where the test has its images."""

    @contextlib.contextmanager
    def __call__(
        self, image: PathLike, *options: str, write_cache: bool = True, command: str = "serve",
        bind: str | None = None,
    ) -> Iterator[Server]:
        """As `peers.served`; without the write cache every write is durable when answered."""
        if not self.direct and self.aio != "threads":
            # What the page cache has is read at once, whatever the engine.
            forget_cached(self.folder)
        with peers.served(
            image, *self.options(write_cache), *options, command=command, bind=bind
        ) as server:
            yield server

    def options(self, write_cache: bool = True) -> tuple[str, str]:
        """For our command line and for qemu-nbd's."""
        return f"--aio={self.aio}", f"--cache={CACHE[self.direct, write_cache]}"


CACHE = {
    (False, True): "writeback", (True, True): "none",
    (False, False): "writethrough", (True, False): "directsync",
}
DIRECT = pytest.mark.peer(peers.O_DIRECT)
URING = pytest.mark.peer(peers.IO_URING)
AIO = pytest.mark.peer(peers.LINUX_AIO)


@pytest.fixture(params=[
    pytest.param(("threads", False), id="threads-writeback"),
    pytest.param(("io_uring", False), id="io_uring-writeback", marks=URING),
    pytest.param(("threads", True), id="threads-none", marks=DIRECT),
    pytest.param(("io_uring", True), id="io_uring-none", marks=[URING, DIRECT]),
    pytest.param(("native", True), id="native-none", marks=[AIO, DIRECT]),
])
def served(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Engine:
    return Engine(*request.param, tmp_path)


HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--matrix"):
        return
    later = {
        item
        for variants in by_function_and_engine(items)
        for turn, cases in enumerate(variants[1:])
        for number, item in enumerate(cases)
        if not has_turn(turn, len(variants) - 1, number, len(cases))
    }
    if later:
        config.hook.pytest_deselected(items=[item for item in items if item in later])
        items[:] = [item for item in items if item not in later]


def by_function_and_engine(items: list[pytest.Item]) -> list[list[list[pytest.Item]]]:
    """For each test function that takes `served`, for each engine, its cases."""
    functions: dict[object, dict[int, list[pytest.Item]]] = {}
    for item in items:
        if item.path.parent == HERE and "served" in getattr(item, "fixturenames", ()):
            variants = functions.setdefault(item.function, {})
            variants.setdefault(item.callspec.indices["served"], []).append(item)
    return [list(variants.values()) for variants in functions.values()]


def has_turn(turn: int, nb_turns: int, case: int, nb_cases: int) -> bool:
    """Whether it is a case's turn: each case has one, and each turn a case."""
    return case % nb_turns == turn or (nb_cases < nb_turns and turn % nb_cases == case)


def forget_cached(folder: pathlib.Path) -> None:
    """Have the kernel drop what it caches of the files in a folder."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)  # only what is clean can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

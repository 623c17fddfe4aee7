"""`served`, as in tests/interop/conftest.py, but that nbdkit serves: tests from there that say
nothing of our server's own command line are run here too (test_matrix.py).

Two variants, which differ in all that they can: nbdkit started by hand with the system's Python and
its trio, and by `nbdserve nbdkit` with ours; with the page cache and without it.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import pytest

import peers
from peers import PathLike, Server

CACHE = {
    (False, True): "writeback", (True, True): "none",
    (False, False): "writethrough", (True, False): "directsync",
}


@dataclasses.dataclass(frozen=True, slots=True)
class BehindNbdkit:
    """Starts nbdkit with our plugin. Options of `serve` become parameters."""

    program: tuple[PathLike, ...]
    plugin: tuple[PathLike, ...]
    direct: bool
    filters: tuple[str, ...] = ()

    @contextlib.contextmanager
    def __call__(
        self, image: PathLike, *options: str, write_cache: bool = True
    ) -> Iterator[Server]:
        words = iter(options)
        parameters = [
            f"format={next(words)}" if word == "-f" else word.removeprefix("--") for word in words
        ]
        with peers.nbdkit(
            *(f"--filter={name}" for name in self.filters), *self.plugin, f"file={image}",
            f"cache={CACHE[self.direct, write_cache]}", *parameters, program=self.program,
        ) as server:
            yield server


BY_HAND = BehindNbdkit(("nbdkit",), ("python", peers.QCOW2_PLUGIN), direct=False)
BY_US = BehindNbdkit(peers.NBDSERVE_NBDKIT, (), direct=True)


@pytest.fixture(params=[
    pytest.param(BY_HAND, id="by-hand-writeback", marks=pytest.mark.peer(peers.SYSTEM_TRIO)),
    pytest.param(BY_US, id="by-us-none", marks=pytest.mark.peer(peers.O_DIRECT)),
])
def served(request: pytest.FixtureRequest) -> BehindNbdkit:
    return request.param


MATRIX = pathlib.Path(__file__).with_name("test_matrix.py")

FEW = 2
"""Cases of a test, of each variant, that are run without --matrix."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the long lists of cases some will do: our server runs them all."""
    counts: dict[tuple[object, object], int] = {}
    dropped = []
    for item in items:
        if item.path != MATRIX or not isinstance(item, pytest.Function):
            continue
        item.add_marker(pytest.mark.peer("nbdkit", peers.NBDKIT_PYTHON))
        callspec = getattr(item, "callspec", None)
        variant = item.function, callspec and callspec.indices.get("served")
        counts[variant] = number = counts.get(variant, -1) + 1
        if number >= FEW and not config.getoption("--matrix"):
            dropped.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]

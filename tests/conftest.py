"""What every test may rely on: `@pytest.mark.peer`, `@pytest.mark.clock`, `@pytest.mark.long`.

A test that needs a program of others names it: `@pytest.mark.peer("qemu-img", "fio")`.  Where
one is missing the test is skipped and the summary says which and why; with CI=true it fails
(facilities.py, which has what else a machine may be without).

A test that measures time says so: `@pytest.mark.clock`.  Where several processes run tests of
this checkout (`-n`), it runs while no other does.

One that takes long, and whose essence a shorter one has, is `@pytest.mark.long`: it is run with
`--matrix` only.

Tests that share what is dear to set up are run by one process (`TOGETHER`).
"""

import contextlib
import fcntl
import os
import pathlib
import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

import peers
from facilities import lacking
from installed import environment
from nbdserve.engines.engine import Engine
from nbdserve.engines.start import start_engine

# How long an example takes is the machine's affair.
settings.register_profile("no deadline", settings(), deadline=None)
settings.load_profile("no deadline")

IDLE_SECONDS = 60.0  # far above what any request takes, so that a loaded machine fails no test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true",
                     help="run every test of the engine matrix with every engine and cache mode"
                     " (tests/interop/conftest.py), and the tests that are marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    later = [item for item in items if item.get_closest_marker("long") is not None]
    if later and not config.getoption("--matrix"):
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in later]


# One guest; each server is observed once; one environment is made.
TOGETHER = (
    "tests/kernel/",
    "tests/interop/test_cache_modes.py::",
    "tests/testing/test_project.py::",
)

# A project of its own, run by tests/testing/test_project.py.
collect_ignore = ["project"]


class _Scheduling(LoadScopeScheduling):
    """A test at a time, but what is `TOGETHER` to one process, and first, as it takes longest."""

    def _split_scope(self, nodeid: str) -> str:
        return next((start for start in TOGETHER if nodeid.startswith(start)), nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _Scheduling | None:
    """In place of `--dist=loadgroup`'s own: with pytest 9.2 xdist 3.8 knows no groups, as it puts
    them into an attribute that pytest no longer reads."""
    return _Scheduling(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = {name for marker in item.iter_markers("peer") for name in marker.args}
    missing = sorted(name for name in wanted if not peers.have(name))
    if not missing:
        return
    lacking(f"not here, or not allowed: {', '.join(missing)} (tools/peers.sh installs programs)")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with _among_other_processes(alone=item.get_closest_marker("clock") is not None):
        return (yield)


@pytest.fixture(params=[
    "threads",
    pytest.param("io_uring", marks=pytest.mark.peer(peers.IO_URING)),
    pytest.param("native", marks=pytest.mark.peer(peers.LINUX_AIO)),
])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Each engine in turn, for files that are open with O_DIRECT; idle when the test is over."""
    engine = start_engine(request.param, direct=True)
    assert engine.name == request.param  # io_uring may become threads
    yield engine
    with trio.fail_after(IDLE_SECONDS):
        await engine.idle()
    engine.close()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of an environment that has nbdserve from a wheel (installed.py)."""
    mine = tmp_path_factory.getbasetemp()
    return environment(mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine)


@pytest.fixture(scope="session", autouse=True)
def nested_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A pytest that a test runs has its temporary folders elsewhere. At its end it would remove
    what earlier runs of ours left, gigabytes, which took longer than the test may."""
    tmp_path_factory.getbasetemp()  # ours stay where they are
    with (
        tempfile.TemporaryDirectory(prefix="nested-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("PYTEST_DEBUG_TEMPROOT", folder)
        yield


@contextlib.contextmanager
def _among_other_processes(*, alone: bool) -> Iterator[None]:
    """Two locks, as between readers and a writer: one is held while a test runs, shared or alone,
    and the other while waiting for it, so that nobody overtakes who waits to be alone."""
    with open(__file__) as gate, open(peers.__file__) as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield

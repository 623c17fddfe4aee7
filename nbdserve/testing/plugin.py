"""Fixtures for pytest: `nbd_server` and `qcow2_image`. Installed by the entry point ``pytest11``.

They are synchronous, and so is what they give: tests may be too, or be run by pytest-trio,
pytest-asyncio or anyio. Law: importing this costs next to nothing, for it is imported in each run
of pytest of whoever has nbdserve installed; nbdserve itself is imported when a fixture is used.

A report of a failed test has, for each server that the test had or that another fixture or test
still has, a section with what that server logged.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Generator, Iterator

    from nbdserve.testing.factory import ImageFactory, ServerFactory

SERVERS = pytest.StashKey["ServerFactory"]()


@pytest.fixture
def nbd_server(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[ServerFactory]:
    """Makes servers: ``nbd_server(size="1G")``, with all arguments of nbdserve.testing.serving.

    Each is started when it is returned, its socket and image are in tmp_path, and it is stopped
    after the test.
    """
    from nbdserve.testing.factory import ServerFactory

    servers = ServerFactory(tmp_path)
    request.node.stash[SERVERS] = servers
    yield servers
    servers.stop()


@pytest.fixture
def qcow2_image(tmp_path: pathlib.Path) -> ImageFactory:
    """Makes qcow2 images in tmp_path: ``qcow2_image("1G", content={0: random("1M")})``, with all
    arguments of nbdserve.testing.make_image; `name`: the file's."""
    from nbdserve.testing.factory import ImageFactory

    return ImageFactory(tmp_path)


# The old kind of wrapper, as an older pytest of somebody who never uses this loads it as well.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    if report.failed:
        report.sections += _sections(item)
    if call.when == "teardown" and SERVERS in item.stash:
        del item.stash[SERVERS]  # pytest keeps items to its end; a server has disks and logs


def _sections(item: pytest.Item) -> list[tuple[str, str]]:
    own = item.stash.get(SERVERS, None)
    servers = [] if own is None else own.started
    served = sys.modules.get("nbdserve.testing.served")
    if served is not None:
        servers = [*servers, *(other for other in served.running if other not in servers)]
    return [(f"log of the nbdserve at {server.socket}", server.log) for server in servers]

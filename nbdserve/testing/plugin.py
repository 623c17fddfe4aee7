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
    import os
    import pathlib
    from collections.abc import Callable, Generator, Iterator

    from nbdserve.testing.served import Served

SERVERS = pytest.StashKey[list["Served"]]()


@pytest.fixture
def nbd_server(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path
) -> Iterator[Callable[..., Served]]:
    """Makes servers: ``nbd_server(size="1G")``, with all arguments of nbdserve.testing.serving.

    Each is started when it is returned, its socket and image are in tmp_path, and it is stopped
    after the test.
    """
    from nbdserve.testing.start import serving

    started: list[Served] = []
    request.node.stash[SERVERS] = started

    def start(
        image: str | os.PathLike[str] | None = None,
        **arguments: Any,  # noqa: ANN401 - those of `serving`
    ) -> Served:
        server = serving(image, folder=tmp_path, **arguments)
        started.append(server)
        return server.start()

    yield start
    errors = []
    for server in reversed(started):
        try:
            server.stop()
        except Exception as error:  # the others are to stop as well
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ExceptionGroup("servers that did not stop as they should", errors)


@pytest.fixture
def qcow2_image(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Makes qcow2 images in tmp_path: ``qcow2_image("1G", content={0: random("1M")})``, with all
    arguments of nbdserve.testing.make_image; `name`: the file's."""
    from nbdserve.testing.images import free_path, make_image

    def make(
        size: int | str | None = None,
        *,
        name: str | None = None,
        **arguments: Any,  # noqa: ANN401 - those of `make_image`
    ) -> pathlib.Path:
        path = tmp_path / name if name else free_path(tmp_path, "image", ".qcow2")
        make_image(path, size, **arguments)
        return path

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += _sections(item)
    return report


def _sections(item: pytest.Item) -> list[tuple[str, str]]:
    servers = item.stash.get(SERVERS, [])
    served = sys.modules.get("nbdserve.testing.served")
    if served is not None:
        servers = [*servers, *(other for other in served.running if other not in servers)]
    return [(f"log of the nbdserve at {server.socket}", server.log) for server in servers]

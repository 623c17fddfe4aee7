"""The examples as their readers run them: a copy of the folder, and nbdserve from a wheel."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

import peers
from installed import REPOSITORY, clean_environment, environment

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

EXAMPLES = REPOSITORY / "examples"


@dataclasses.dataclass(frozen=True)
class Example:
    """`folder`: the copy of it; `there`: the environment that it runs in."""

    folder: pathlib.Path
    there: pathlib.Path

    def run(
        self, *command: str | os.PathLike[str], timeout: float = 120, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A program of that environment, or any other; `more` is in its own environment."""
        return subprocess.run(
            self.argv(*command), cwd=self.folder, env={**self.environment, **more},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def start(self, *command: str | os.PathLike[str], **more: str) -> subprocess.Popen[str]:
        """As `run`, and it goes on. It is the test's to end."""
        return subprocess.Popen(
            self.argv(*command), cwd=self.folder, env={**self.environment, **more},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def argv(self, *command: str | os.PathLike[str]) -> list[str]:
        name, *words = map(os.fspath, command)
        if "/" in name:
            return [name, *words]
        found = shutil.which(name, path=self.environment["PATH"])
        assert found is not None, name
        return [found, *words]

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.there / "bin"), peers.SEARCH_PATH])
        return {**clean_environment(), "PATH": path}


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    base = tmp_path_factory.getbasetemp()
    return environment(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture
def example(there: pathlib.Path, tmp_path: pathlib.Path) -> Callable[[str], Example]:
    """``example("qemu-img")``: a copy of examples/qemu-img."""

    def copy(name: str) -> Example:
        folder = tmp_path / name
        ignore = shutil.ignore_patterns("__pycache__", ".pytest_cache", "*.egg-info", "build")
        shutil.copytree(EXAMPLES / name, folder, ignore=ignore)
        return Example(folder, there)

    return copy


def end(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
    """Tell a program to end, and wait; what it said on stderr."""
    process.send_signal(number)
    return process.communicate(timeout=30)[1]

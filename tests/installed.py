"""An environment that has nbdserve as its users do: a wheel of it, installed with pip.

Made once for all processes of a run of the tests, which is some seconds; it is theirs to read and
not to install into, but for what each of them names at first. Nothing in it knows where this
repository is.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys

__all__ = ["clean_environment", "environment", "run_there"]

REPOSITORY = pathlib.Path(__file__).parent.parent
SOURCES = ("nbdserve", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PROJECT = REPOSITORY / "tests" / "project"
OTHERS = ("pytest", "pytest-xdist", "pytest-trio", "pytest-asyncio", "anyio")


def environment(shared: pathlib.Path) -> pathlib.Path:
    """The folder of a virtual environment in `shared`, a folder that all processes have in common:
    with nbdserve, the project of tests/project and what its tests need."""
    folder = shared / "installed"
    with open(shared / "installed.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "is-whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, shared / "sources")
            (folder / "is-whole").touch()
    return folder


def run_there(
    folder: pathlib.Path, *command: str | os.PathLike[str], cwd: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    """A program of that environment, with nothing of ours in its own."""
    return subprocess.run(
        [folder / "bin" / command[0], *command[1:]],
        cwd=cwd, env=clean_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def clean_environment() -> dict[str, str]:
    """Ours, without what has to do with how these tests are run, but for where temporary folders
    are (conftest.py)."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "PYTEST_DEBUG_TEMPROOT"
        or not name.startswith(("PYTHON", "PYTEST", "COVERAGE", "VIRTUAL_ENV"))
    }


def _make(folder: pathlib.Path, sources: pathlib.Path) -> None:
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, sources / name, ignore=ignore)
        else:
            shutil.copy(source, sources)
    shutil.copytree(PROJECT, sources / "project", ignore=ignore)
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", f"--python={folder}", "install", "--quiet",
           "--disable-pip-version-check", "--no-input"]
    wheels = folder / "wheels"
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
         f"--wheel-dir={wheels}", sources, sources / "project")
    _run(*pip, *wheels.glob("*.whl"), *OTHERS)
    shutil.rmtree(sources)


def _run(*command: str | os.PathLike[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

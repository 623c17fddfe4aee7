"""What a machine may be without: engines, devices and file systems of a certain kind.

Who needs one asks for it here, in the test or a fixture. Where it is not to be had the test is
skipped and the summary says why; with CI=true it fails, because a run that skips must not look like
a run that passed. Programs of others are asked for by `@pytest.mark.peer` (conftest.py).
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import NoReturn

import pytest

import peers

MEMORY = pathlib.Path("/dev/shm")


def lacking(reason: str) -> NoReturn:
    """This machine does not have what a test needs."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}; CI=true, so this is a failure", pytrace=False)
    pytest.skip(reason)


@contextlib.contextmanager
def folder_in_memory() -> Iterator[pathlib.Path]:
    """A folder of a tmpfs, which has neither O_DIRECT nor RWF_NOWAIT nor FALLOC_FL_ZERO_RANGE."""
    if not os.access(MEMORY, os.W_OK):
        lacking(f"{MEMORY} is not here or not writable")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield pathlib.Path(folder)


@contextlib.contextmanager
def small_file_system(size: int) -> Iterator[pathlib.Path]:
    """An empty file system with room for `size` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        mounted = peers.run("mount", *options, check=False)
        if mounted.returncode != 0:
            lacking(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
        try:
            yield pathlib.Path(folder)
        finally:
            peers.run("umount", "--lazy", folder)


@contextlib.contextmanager
def loop_device(path: peers.PathLike, *, sector: int = 512) -> Iterator[str]:
    """The name of a block device whose content is a file, with sectors of that many bytes."""
    if not peers.have("losetup"):
        lacking("losetup is not here (tools/peers.sh installs it)")
    options = ("--sector-size", str(sector), "--show", "--find", path)
    made = peers.run("losetup", *options, check=False)
    if made.returncode != 0:
        lacking(f"a loop device cannot be made here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        peers.run("losetup", "--detach", device)

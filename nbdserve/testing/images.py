"""Image files for tests: made in milliseconds, with content that is known.

What is in an image is given as {offset: bytes or a pattern}, and written by the block stack itself.
Nothing is synced: such an image need not survive the machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from typing import TYPE_CHECKING

from nbdserve.config import CACHE_MODES, ImageConfig
from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2.create import create_image
from nbdserve.graph import open_backend
from nbdserve.testing.hosted import run_in_thread
from nbdserve.testing.patterns import Pattern, size_of

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping

    from nbdserve.block.backend import BlockBackend
    from nbdserve.powercut.content import Content

    Placed = Mapping[int | str, bytes | Pattern]

__all__ = ["InMemory", "NewDisk", "free_path", "make_image", "read_image"]

PIECE = 1 << 20


def make_image(
    path: str | os.PathLike[str],
    size: int | str | None = None,
    *,
    format: str = "qcow2",
    content: Placed | bytes | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str = "qcow2",
    **options: object,
) -> None:
    """Make a file an image of `size`; that of the backing file, or of the content, if not given.

    `content`: bytes for the start of the disk, or what is where. `options`: those of
    NewImageOptions, such as cluster_size.

    :raises ConfigError, ImageError: as nbdserve create and serve.
    """
    pieces = {0: content} if isinstance(content, bytes) else dict(content or {})
    placed = {size_of(offset): piece for offset, piece in pieces.items()}
    if size is None and backing is not None:
        size = _disk_size(backing, backing_format)
    elif size is None:
        if not placed:
            raise ConfigError("an image needs a size, content or a backing file")
        size = max(offset + _length(piece) for offset, piece in placed.items())
    path = os.fspath(path)
    for offset, piece in placed.items():
        if offset + _length(piece) > size_of(size):
            raise ConfigError(f"content: {_length(piece)} bytes at {offset} are beyond the end")
    if format == "raw":
        if backing is not None or options:
            raise ConfigError("a raw image has neither a backing file nor options")
        with open(path, "wb") as file:
            file.truncate(size_of(size))
    elif format == "qcow2":
        if backing is not None:
            options |= {"backing_file": os.path.abspath(backing), "backing_format": backing_format}
        create_image(path, size_of(size), sync=False, **options)
    else:
        raise ConfigError(f"format: {format!r} is neither qcow2 nor raw")
    if placed:
        run_in_thread(_fill, ImageConfig(path, format, cache=CACHE_MODES["unsafe"]), placed)


def read_image(path: str | os.PathLike[str], *, format: str = "qcow2") -> bytes:
    """The whole disk of an image that nobody serves."""
    return run_in_thread(_read, ImageConfig(os.fspath(path), format, read_only=True))


_given: set[pathlib.Path] = set()
_giving = threading.Lock()


def free_path(folder: pathlib.Path, name: str, end: str) -> pathlib.Path:
    """name, a number and an end: the first such path that is not there, nor was given before."""
    paths = (folder.absolute() / f"{name}{number}{end}" for number in itertools.count())
    with _giving:
        found = next(path for path in paths if path not in _given and not path.exists())
        _given.add(found)
    return found


@dataclasses.dataclass(frozen=True)
class NewDisk:
    """An image to be made: the arguments of `make_image`."""

    size: int | str | None = None
    content: Placed | bytes | None = None
    backing: str | os.PathLike[str] | None = None
    backing_format: str = "qcow2"

    def make(self, folder: pathlib.Path, format: str) -> pathlib.Path:
        """Make it in a folder; where it is."""
        path = free_path(folder, "disk", f".{format}")
        make_image(
            path,
            self.size,
            format=format,
            content=self.content,
            backing=self.backing,
            backing_format=self.backing_format,
        )
        return path


@dataclasses.dataclass(frozen=True)
class InMemory:
    """What is served without a file, and what it is called."""

    content: Content
    filename: str

    def save(self, folder: pathlib.Path, format: str) -> pathlib.Path:
        """Make it a file in a folder; where it is."""
        path = free_path(folder, "outcome", f".{format}")
        self.content.save(path)
        return path


def _length(piece: bytes | Pattern) -> int:
    return piece.length if isinstance(piece, Pattern) else len(piece)


def _disk_size(path: str | os.PathLike[str], format: str) -> int:
    """The size of an image's disk in bytes, whoever has it open."""
    config = ImageConfig(os.fspath(path), format, read_only=True, force_share=True)
    return run_in_thread(_size, config)


async def _size(config: ImageConfig) -> int:
    async with open_backend(config) as backend:
        return backend.size


async def _read(config: ImageConfig) -> bytes:
    async with open_backend(config) as backend:
        content = memoryview(bytearray(backend.size))
        for start in range(0, len(content), PIECE):
            await backend.read(start, content[start : start + PIECE])
        return bytes(content)


async def _fill(config: ImageConfig, placed: Mapping[int, bytes | Pattern]) -> None:
    async with open_backend(config) as backend:
        for offset, piece in placed.items():
            await _put(backend, offset, piece)


async def _put(backend: BlockBackend, offset: int, piece: bytes | Pattern) -> None:
    length = _length(piece)
    if isinstance(piece, Pattern) and piece.is_zero:
        await backend.write_zeroes(offset, length, may_unmap=False)
        return
    for start in range(0, length, PIECE):
        stop = min(length, start + PIECE)
        if isinstance(piece, Pattern):
            data = piece.at(offset + start, stop - start)
        else:
            data = piece[start:stop]
        await backend.write(offset + start, data)

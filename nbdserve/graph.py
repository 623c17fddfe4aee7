"""From a configuration to an open tree of nodes, and back.

The only module that knows every driver and format. It decides which file is opened by what, in
which role, with which lock; opens from the leaves up; and closes from the root down, each node
flushed before what it stands on is closed.

A backing file named in an image is opened read-only and shared, as QEMU does it. Its name may be
relative to the overlay. A data file is opened as its image is, for reading only or not. Its name is
a plain path, relative to the working directory, which is neither probed nor taken for a protocol's;
that is QEMU's reading too.

A chain that comes back to a file it already holds is refused: such an
image would never finish opening, or never finish reading.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from nbdserve.block.backend import BlockBackend
from nbdserve.block.buffers import BufferPool
from nbdserve.block.epoch import Epochs
from nbdserve.block.throttled import ThrottledBackend
from nbdserve.drivers.locks import PERMISSIONS, ImageLock, Role
from nbdserve.drivers.open import open_file
from nbdserve.engines.start import start_engine
from nbdserve.errors import ConfigError, ImageError, NbdserveError
from nbdserve.filters.throttle_group import ThrottleGroups, ThrottleMember
from nbdserve.formats.probe import PROBE_SIZE, RAW_PROBED_WARNING, probe_format
from nbdserve.formats.qcow2.node import Qcow2Node, open_qcow2, read_header
from nbdserve.formats.raw import RawNode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from nbdserve.block.node import Node
    from nbdserve.config import ImageConfig
    from nbdserve.drivers.file import FileNode
    from nbdserve.engines.engine import Engine
    from nbdserve.formats.qcow2.header import Header

__all__ = ["FORMATS", "locked_for_creation", "open_backend"]

log = logging.getLogger("nbdserve.graph")

FORMATS = ("qcow2", "raw")

# QEMU has no limit and fails on its stack at some thousands.
MAX_CHAIN = 200

# A colon before any slash: what stands before it names a protocol driver (path_has_protocol). The
# name behind "file:" is taken as it is, not relative to the overlay.
PROTOCOL = re.compile("(?P<name>[^/:]*):")


@asynccontextmanager
async def open_backend(
    config: ImageConfig, groups: ThrottleGroups | None = None
) -> AsyncIterator[BlockBackend]:
    """The image of a configuration, open for the body.

    `groups`: the throttle groups that backends share, for a throttle that names one.

    Leaving flushes and closes it. Raises ImageError, ConfigError, OSError; an image that is
    refused has not been written to. What the body raises comes in an exception group, as from any
    nursery.
    """
    engine = start_engine(config.aio, direct=config.cache.direct)
    opener = _Opener(config, engine)
    try:
        root = await opener.open_root()
        # What is still running when the body is left, requests and the nodes' own tasks, is cut
        # off before nodes close.
        with _membership(config, groups) as throttle:
            async with trio.open_nursery() as nursery:
                for node in opener.opened:
                    if isinstance(node, Qcow2Node) and not node.read_only:
                        nursery.start_soon(node.settle)
                yield _new_backend(root, opener, nursery, throttle, config, engine)
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            try:
                await engine.idle()  # reads that were submitted, which no task waits for
                await opener.close()
            finally:
                engine.close()


def _new_backend(
    root: Node,
    opener: _Opener,
    nursery: trio.Nursery,
    throttle: ThrottleMember | None,
    config: ImageConfig,
    engine: Engine,
) -> BlockBackend:
    new: Callable[..., BlockBackend] = BlockBackend
    if throttle is not None:
        new = partial(ThrottledBackend, throttle=throttle)
    return new(
        root,
        opener.epochs,
        nursery,
        write_cache=config.cache.writeback,
        detect_zeroes=config.detect_zeroes,
        discard=config.discard == "unmap",
        engines=[engine],
        direct=config.cache.direct,
        buffers=opener.buffers,
    )


@contextmanager
def _membership(
    config: ImageConfig, groups: ThrottleGroups | None
) -> Iterator[ThrottleMember | None]:
    """A place in the throttle group of a configuration, for the body; None without a throttle."""
    if config.throttle is None:
        yield None
        return
    name = config.throttle.group
    # Without a name it is a group of one, called after the image.
    if groups is None or name is None:
        groups = ThrottleGroups()
    member = groups.join(name or config.filename, config.throttle.limits)
    try:
        yield member
    finally:
        member.leave()


@contextmanager
def locked_for_creation(filename: str) -> Iterator[None]:
    """Hold the lock of one who is about to replace an existing image.

    Raises LockedError if anybody uses it, ImageError if it cannot be opened.
    """
    try:
        fd = os.open(filename, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ImageError(f"{filename}: {error.strerror}", error.errno) from None
    try:
        ImageLock(fd, filename).acquire(*PERMISSIONS[Role.CREATE])
        yield
    finally:
        os.close(fd)  # releases the lock


class _Opener:
    """Opens nodes and remembers them in order, so that they can be closed in reverse."""

    def __init__(self, config: ImageConfig, engine: Engine) -> None:
        self.epochs = Epochs()
        self.buffers = BufferPool()
        self.opened: list[Node] = []
        self._config = config
        self._engine = engine
        self._overlay_named = False

    async def open_root(self) -> Node:
        """Open what the configuration names. Raises ImageError, ConfigError."""
        config = self._config
        root = await self._open_image(config.filename, config.format, config.read_only, [])
        if not config.offset:
            return root
        if config.offset > root.size:
            raise ConfigError(
                f"--offset: {config.offset} is beyond the end of {config.filename}"
                f" ({root.size} bytes)"
            )
        window = RawNode(root, offset=config.offset)
        self.opened.append(window)
        return window

    async def _open_image(
        self, filename: str, image_format: str | None, read_only: bool, chain: list[FileNode]
    ) -> Node:
        """Open one image with its backing files; `chain`: the files above it."""
        try:
            return await self._open_nodes(filename, image_format, read_only, chain)
        except OSError as error:
            raise ImageError(f"{filename}: {error.strerror}", error.errno) from None

    async def _open_nodes(
        self, filename: str, image_format: str | None, read_only: bool, chain: list[FileNode]
    ) -> Node:
        file = self._open_file(filename, read_only)
        self._check_loop(file, chain)
        guessed = image_format is None
        if image_format is None:
            first = bytearray(min(PROBE_SIZE, file.size))
            await file.read(0, memoryview(first))
            image_format = probe_format(bytes(first), filename)
        if image_format == "qcow2":
            return await self._open_qcow2(file, read_only, chain)
        if image_format == "raw":
            return self._open_raw(file, guessed, is_backing=bool(chain))
        raise ImageError(
            f"{filename}: unknown format {image_format!r}; known are {', '.join(FORMATS)}"
        )

    def _open_file(self, filename: str, read_only: bool) -> FileNode:
        """A file, not locked yet."""
        file = open_file(
            filename,
            self._engine,
            read_only=read_only,
            no_flush=self._config.cache.no_flush,
            discard=self._config.discard == "unmap" and not read_only,
            direct=self.buffers if self._config.cache.direct else None,
        )
        self.opened.append(file)
        return file

    def _open_raw(self, file: FileNode, guessed: bool, *, is_backing: bool) -> Node:
        role = Role.RAW_RO if file.read_only else Role.RAW_RW
        file.lock(*PERMISSIONS[Role.RAW_BACKING if is_backing else role])
        if guessed and not file.read_only:
            log.warning(RAW_PROBED_WARNING.format(filename=file.filename))
        node = RawNode(file, guarded=guessed and not file.read_only)
        self.opened.append(node)
        return node

    async def _open_qcow2(self, file: FileNode, read_only: bool, chain: list[FileNode]) -> Node:
        file.lock(*PERMISSIONS[Role.FORMAT_RO if read_only else Role.FORMAT_RW])
        header = await read_header(file)
        data_file = self._open_data_file(header, file)
        backing = None
        if header.backing_file is not None:
            backing = await self._open_backing(
                header.backing_file, header.backing_format, [*chain, file]
            )
        node = await open_qcow2(
            file,
            backing,
            header,
            self._engine,
            self.epochs,
            data_file=data_file,
            read_only=read_only,
            no_flush=self._config.cache.no_flush,
        )
        self.opened.append(node)
        return node

    def _open_data_file(self, header: Header, image: FileNode) -> FileNode | None:
        """The file that an image names as that of its data, if it has one (qcow2_do_open)."""
        if not header.has_data_file or header.data_file is None:
            return None
        try:
            file = self._open_file(header.data_file, image.read_only)
            if os.path.sameopenfile(file.fd, image.fd):
                raise ImageError(f"{file.filename}: is the image itself")
            role = Role.DATA_FILE_RO if image.read_only else Role.DATA_FILE_RW
            file.lock(*PERMISSIONS[role])
        except NbdserveError as error:
            self._overlay_named = True
            raise type(error)(f"{image.filename}: data file {error}", error.errno) from None
        return file

    async def _open_backing(
        self, name: str, image_format: str | None, chain: list[FileNode]
    ) -> Node:
        overlay = chain[-1].filename
        protocol = PROTOCOL.match(name)
        if protocol is None:
            filename = os.path.join(os.path.dirname(overlay), name)
        elif protocol["name"] == "file":
            filename = name[protocol.end() :]
        else:
            raise ImageError(f"{overlay}: the backing file {name!r} is not a plain file name")
        if len(chain) > MAX_CHAIN:
            raise ImageError(f"{overlay}: the backing chain is longer than {MAX_CHAIN} images")
        try:
            return await self._open_image(filename, image_format, True, chain)
        except NbdserveError as error:
            # The image that names the bad one is told, and not all those above it too.
            if self._overlay_named:
                raise
            self._overlay_named = True
            raise type(error)(f"{overlay}: backing file {error}", error.errno) from None

    def _check_loop(self, file: FileNode, chain: list[FileNode]) -> None:
        for above in chain:
            if os.path.sameopenfile(above.fd, file.fd):
                raise ImageError(f"{file.filename}: the backing chain is a loop")

    async def close(self) -> None:
        """Close all, the root first. The first error is raised after everything was closed."""
        first_error: Exception | None = None
        while self.opened:
            try:
                await self.opened.pop().close()
            except Exception as error:  # a bug in one node shall not leave the others open
                first_error = first_error or error
        if first_error is not None:
            raise first_error



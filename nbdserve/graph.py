"""From a configuration to an open drive, and back.

opener.py opens the tree of nodes; here is what stands around it: the engines, throttle groups and
node names that all drives of a process share, and the backend on top. A drive is closed from the
root down, each node flushed before what it stands on is closed.
"""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from nbdserve.block.backend import BlockBackend
from nbdserve.block.throttled import ThrottledBackend
from nbdserve.config import CACHE_AUTO, CACHE_MODES
from nbdserve.drivers.locks import PERMISSIONS, ImageLock, Role
from nbdserve.engines.start import Engines
from nbdserve.errors import ImageError, NoDirectIOError
from nbdserve.filters.throttle_group import ThrottleGroups, ThrottleMember
from nbdserve.formats.qcow2.node import Qcow2Node
from nbdserve.inherit import root_settings
from nbdserve.nodenames import NodeNames
from nbdserve.opener import Opener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from nbdserve.block.node import Node
    from nbdserve.config import ImageConfig, ThrottleLimits
    from nbdserve.guardian import Guardian

log = logging.getLogger("nbdserve.graph")

__all__ = ["Shared", "locked_for_creation", "open_backend", "shared_by_drives"]


class Shared:
    """What the drives of a process have in common. Needs a running trio; `close` it after them."""

    def __init__(
        self,
        groups: Mapping[str, ThrottleLimits] | None = None,
        guardian: Guardian | None = None,
    ) -> None:
        """`groups`: throttle groups by name, for throttles and throttle nodes to refer to.
        `guardian`: who finishes the work of this process if it is killed."""
        self.engines = Engines()
        self.guardian = guardian
        self.groups = ThrottleGroups(groups)
        self.names = NodeNames()

    def close(self) -> None:
        """No drive is open any more."""
        self.engines.close()


@contextmanager
def shared_by_drives(
    groups: Mapping[str, ThrottleLimits] | None = None, guardian: Guardian | None = None
) -> Iterator[Shared]:
    """`Shared`, for the body."""
    shared = Shared(groups, guardian)
    try:
        yield shared
    finally:
        shared.close()


@asynccontextmanager
async def open_backend(
    config: ImageConfig, shared: Shared | None = None
) -> AsyncIterator[BlockBackend]:
    """The image of a configuration, open for the body.

    `shared`: with other drives; without it this one has all for itself.

    Leaving flushes and closes it. Raises ImageError, ConfigError, OSError; an image that is
    refused has not been written to. What the body raises comes in an exception group, as from any
    nursery.
    """
    if shared is None:
        with shared_by_drives() as alone:
            async with open_backend(config, alone) as backend:
                yield backend
        return
    config, opener, root = await _open_tree(config, shared)
    settings = root_settings(config.tree, config.flags)
    try:
        if config.offset:
            root = opener.window(root, config.offset)
        if config.faults:
            root = opener.faulty(root, config.faults)
        # What is still running when the body is left, requests and the nodes' own tasks, is cut
        # off before nodes close.
        with _membership(config, shared.groups) as throttle:
            async with trio.open_nursery() as nursery:
                for node in opener.opened:
                    if isinstance(node, Qcow2Node) and not node.read_only:
                        nursery.start_soon(node.settle)
                new: Callable[..., BlockBackend] = BlockBackend
                if throttle is not None:
                    new = partial(ThrottledBackend, throttle=throttle)
                yield new(
                    root,
                    opener.epochs,
                    nursery,
                    write_cache=config.cache.writeback,
                    detect_zeroes=settings.detect_zeroes,
                    discard=settings.discard == "unmap",
                    engines=opener.engines,
                    direct=opener.is_direct,
                    buffers=opener.buffers,
                )
                nursery.cancel_scope.cancel()
    finally:
        for node in opener.opened:
            node.drain_begin()  # closing writes, too
        with trio.CancelScope(shield=True):
            for engine in opener.engines:
                await engine.idle()  # reads that were submitted, which no task waits for
            await opener.close()


async def _open_tree(config: ImageConfig, shared: Shared) -> tuple[ImageConfig, Opener, Node]:
    """The tree of nodes, and the configuration with the cache mode that --cache=auto came to.

    That is found out by opening the tree with O_DIRECT: backing files count too, and only the
    images say what they are.
    """
    is_auto = config.cache is CACHE_AUTO
    if is_auto and config.aio is None and shared.engines.get(None, direct=True).name != "io_uring":
        return await _open_tree(_decided(config, "writeback", "io_uring is not to be had"), shared)
    opener = Opener(
        shared.engines, shared.groups, shared.names, config.references, shared.guardian
    )
    try:
        root = await opener.open_root(config.tree, root_settings(config.tree, config.flags))
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await opener.close()
        if is_auto and isinstance(error, NoDirectIOError):
            why = str(error).partition(";")[0]
            return await _open_tree(_decided(config, "writeback", why), shared)
        raise
    if is_auto:
        config = _decided(config, "none", "its files can be opened with O_DIRECT")
    return config, opener, root


def _decided(config: ImageConfig, mode: str, why: str) -> ImageConfig:
    # At this level because the user has asked to be told.
    log.warning("%s: --cache=auto: %s, as %s", config.filename, mode, why)
    return replace(config, cache=CACHE_MODES[mode])


@contextmanager
def _membership(config: ImageConfig, groups: ThrottleGroups) -> Iterator[ThrottleMember | None]:
    """A place in the throttle group of a configuration, for the body; None without a throttle."""
    if config.throttle is None:
        yield None
        return
    name = config.throttle.group
    if name is None:  # a group of one, called after the image
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

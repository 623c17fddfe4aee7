"""Trio in a thread of its own, which opens images and holds them open.

nbdkit has one process and starts threads as it likes; `Loop` is made after its fork. Images are
opened, served by their asynchronous ways and closed in its thread; `Turn` says who may call the
synchronous ways. Law: whoever waits for the loop gets an answer, whatever happens there.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from nbdserve.graph import open_backend, shared_by_drives
from nbdserve.nbdkit.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from nbdserve.block.backend import BlockBackend
    from nbdserve.config import ImageConfig, ThrottleLimits
    from nbdserve.graph import Shared
    from nbdserve.guardian import Guardian

__all__ = ["Image", "Loop", "Waiter"]

T = TypeVar("T")


class Waiter:
    """One thread's wait for something that is done in another."""

    __slots__ = ("_lock", "error", "result")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.error: BaseException | None = None
        self.result: Any = None

    def done(self, error: BaseException | None, result: object = None) -> None:
        """It is done."""
        self.error = error
        self.result = result
        self._lock.release()

    def wait(self) -> Any:  # noqa: ANN401 - whatever was done
        """Its result. Raises its error."""
        self._lock.acquire()
        if self.error is not None:
            raise self.error
        return self.result


class Image:
    """An image that the loop holds open. `statistics`: of the drive, as they were when it was
    closed."""

    def __init__(self, backend: BlockBackend) -> None:
        self.backend = backend
        self.statistics: dict[str, object] = {}
        self.wanted = trio.Event()  # that it be closed
        self.closed = Waiter()


class Loop:
    """`start` it, `open` images, `call` what is asynchronous, `close` them, `stop` it."""

    def __init__(
        self,
        groups: Mapping[str, ThrottleLimits] | None = None,
        guardian: Guardian | None = None,
    ) -> None:
        """As `graph.Shared`."""
        self.turn = Turn()
        self._groups = groups
        self._guardian = guardian
        self._thread = threading.Thread(target=self._run, name="nbdserve-trio", daemon=True)
        self._started = Waiter()
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._shared: Shared

    def start(self) -> None:
        """Raises RuntimeError, OSError."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """All images are closed."""
        self._token.run_sync_soon(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            trio.run(self._main, instruments=[self.turn])
        except BaseException as error:  # before it started: afterwards no task raises
            self._started.done(error)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stopping = trio.Event()
        with shared_by_drives(self._groups, self._guardian) as self._shared:
            async with trio.open_nursery() as self._nursery:
                self._started.done(None)
                await self._stopping.wait()

    # --- images --------------------------------------------------------------------------------

    def open(self, config: ImageConfig) -> Image:
        """Raises NbdserveError, OSError."""
        opened = Waiter()
        self._soon(opened, self._nursery_start, self._hold, config, opened)
        image: Image = opened.wait()
        return image

    def close(self, image: Image) -> None:
        """Flush and close it. Raises OSError."""
        self._soon(image.closed, image.wanted.set)
        image.closed.wait()

    def _nursery_start(self, *call: Any) -> None:  # noqa: ANN401 - a function and its arguments
        self._nursery.start_soon(*call)

    async def _hold(self, config: ImageConfig, opened: Waiter) -> None:
        image = None
        try:
            async with open_backend(config, self._shared) as backend:
                image = Image(backend)
                opened.done(None, image)
                await image.wanted.wait()
                image.statistics = backend.statistics()
        except Exception as error:
            # From within the body there is none: it only waits.
            (image.closed if image else opened).done(error)
        else:
            image.closed.done(None)

    # --- requests ------------------------------------------------------------------------------

    def call(
        self, backend: BlockBackend, function: Callable[..., Awaitable[T]], *args: object
    ) -> T:
        """Run a coroutine of the block stack in trio's thread; its result. Raises what it raises,
        an error that is not OSError as one."""
        waiter = Waiter()
        self._soon(waiter, backend.nursery.start_soon, self._answer, waiter, function, args)
        result: T = waiter.wait()
        return result

    def _soon(self, waiter: Waiter, function: Callable[..., object], *args: object) -> None:
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError:
            waiter.done(OSError(errno.ESHUTDOWN, "the image is closed"))

    async def _answer(
        self, waiter: Waiter, function: Callable[..., Awaitable[T]], args: tuple[object, ...]
    ) -> None:
        try:
            result = await function(*args)
        except OSError as error:
            waiter.done(error)
        except Exception as error:  # a bug of ours
            waiter.done(OSError(errno.EIO, f"internal error: {error!r}"))
        except BaseException:
            waiter.done(OSError(errno.ESHUTDOWN, "the image is being closed"))
            raise
        else:
            waiter.done(None, result)

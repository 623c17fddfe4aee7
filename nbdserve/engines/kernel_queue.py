"""What io_uring and Linux AIO share: requests that the kernel itself keeps, and their completions.

A subclass says how requests are handed over (`_prepare`, `_hand_over`) and how completions are
fetched (`_completions`). Here is everything between: numbering, the bound on what the kernel holds,
the continuation of short transfers, plugs, the end.

Law of memory: `_pending` holds each request with its buffers until its completion was fetched. Law
of the bound: at most `depth` requests are with the kernel, so its queues cannot overflow; the
others wait in `_backlog`, first come, first served.

What is no read, write or sync runs in a thread (`run`), through an engine of that kind.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import trio

from nbdserve.engines.engine import EngineStatistics
from nbdserve.engines.memory import address_of
from nbdserve.engines.threads import ThreadsEngine
from nbdserve.engines.transfer import IOV_MAX, fill_past_end, rest_of

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from nbdserve.engines.engine import Buffer, Done

__all__ = ["FSYNC", "GROUP", "READ", "WRITE", "WRITEV", "KernelQueue", "Request"]

T = TypeVar("T")

# What a request is; subclasses have the kernel's number for each.
READ, WRITE, WRITEV, FSYNC = range(4)

# The kernel may take these back, and means: ask again.
_AGAIN = frozenset({errno.EAGAIN, errno.EINTR, errno.EBUSY})


# How many requests are handed over together, and how many completions are answered together. All
# of a batch would cost the least, but then the disk waits while we prepare, and the client while we
# answer: with 4 KiB reads past the page cache, 32 deep, that cost a sixth.
GROUP = 8


class Request:
    """`length` is in bytes; `count` is what the kernel is told: bytes, of a WRITEV its buffers."""

    __slots__ = ("address", "count", "data", "done", "fd", "flags", "kind", "length", "offset",
                 "progress", "vector")  # fmt: skip

    def __init__(
        self,
        kind: int,
        fd: int,
        address: int,
        length: int,
        offset: int,
        flags: int,
        done: Done,
        data: Sequence[Buffer] = (),
    ) -> None:
        self.kind = kind
        self.fd = fd
        self.address = address
        self.length = self.count = length
        self.offset = offset
        self.flags = flags
        self.done = done
        self.progress = False
        self.data = data
        self.vector: ctypes.Array[ctypes.c_size_t] | None = None


class _Plug:
    """One for all times, as a batch of requests should not pay for it."""

    def __init__(self, queue: KernelQueue) -> None:
        self._queue = queue

    def __enter__(self) -> None:
        self._queue._plugged = True

    def __exit__(self, *_error: object) -> None:
        self._queue._plugged = False
        if self._queue._prepared:
            self._queue._kick()


class KernelQueue(ABC):
    """The common part; see engines/engine.py for what the public methods mean."""

    name: str

    def __init__(self, depth: int) -> None:
        """`depth`: the most requests that the kernel is given at a time."""
        self._depth = depth
        self._pending: dict[int, Request] = {}  # tag -> prepared, or with the kernel
        self._prepared: list[int] = []  # tags not handed over yet, in order
        self._backlog: deque[Request] = deque()
        self._next_tag = 0
        self._plugged = False
        self._plug = _Plug(self)
        self._jobs = 0
        self._batches = 0
        self._in_flight = 0
        self._all_done = trio.lowlevel.ParkingLot()
        self._token = trio.lowlevel.current_trio_token()
        self._threads = ThreadsEngine()
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._detached = trio.Event()
        self._detached.set()
        self._waiting = trio.CancelScope()
        self._closed = False

    @abstractmethod
    def _prepare(self, tag: int, request: Request) -> None:
        """Write the request down for the next `_hand_over`."""

    @abstractmethod
    def _hand_over(self, nb_requests: int) -> int:
        """Give the kernel what was prepared: how many it took, or -errno."""

    @abstractmethod
    def _completions(self) -> list[tuple[int, int]]:
        """(tag, result or -errno) of what is done."""

    @abstractmethod
    def _withdraw(self, error: int) -> int:
        """How many of those prepared, from the oldest on, fail with an error of `_hand_over`."""

    # --- submission ----------------------------------------------------------------------------

    def submit_read(self, fd: int, buffer: memoryview, offset: int, done: Done) -> None:
        request = Request(READ, fd, address_of(buffer), len(buffer), offset, 0, done, (buffer,))
        self._add(request)

    def submit_write(
        self, fd: int, data: Sequence[Buffer], offset: int, done: Done, *, dsync: bool = False
    ) -> None:
        request = Request(WRITE, fd, 0, 0, offset, os.RWF_DSYNC if dsync else 0, done)
        _point_to(request, data)
        self._add(request)

    def submit_fsync(self, fd: int, done: Done) -> None:
        self._add(Request(FSYNC, fd, 0, 0, 0, 0, done))

    async def run(self, function: Callable[..., T], *args: object) -> T:
        return await self._threads.run(function, *args)

    def plug(self) -> AbstractContextManager[None]:
        return self._plug

    def _add(self, request: Request) -> None:
        self._enqueue(request)
        self._jobs += 1
        self._in_flight += 1
        if not self._plugged or len(self._prepared) >= GROUP:
            self._kick()

    def _enqueue(self, request: Request) -> None:
        if len(self._pending) >= self._depth:
            self._backlog.append(request)
            return
        self._next_tag = tag = self._next_tag + 1
        self._prepare(tag, request)  # first: if it raises, nothing is counted as handed over
        self._pending[tag] = request
        self._prepared.append(tag)

    def _refill(self) -> None:
        while self._backlog and len(self._pending) < self._depth:
            self._enqueue(self._backlog.popleft())

    def _kick(self) -> None:
        """Hand over what is prepared. What the kernel refuses for now waits for a completion."""
        while self._prepared:
            self._batches += 1
            taken = self._hand_over(len(self._prepared))
            if taken > 0:
                del self._prepared[:taken]
            elif taken == -errno.EINTR:
                continue
            elif -taken in _AGAIN and len(self._pending) > len(self._prepared):
                return
            else:
                self._refuse(-taken or errno.EAGAIN)

    def _refuse(self, error: int) -> None:
        number = self._withdraw(error)
        refused = [self._pending.pop(tag) for tag in self._prepared[:number]]
        del self._prepared[:number]
        for request in refused:  # not from inside the submission
            self._token.run_sync_soon(self._finish, request, error)
        self._refill()  # there may be no completion to do it

    # --- completion ----------------------------------------------------------------------------

    def reap(self) -> bool:
        completions = self._completions()
        if not completions:
            return False
        pop = self._pending.pop
        for tag, result in completions:
            request = pop(tag)
            if result == request.length:
                self._in_flight -= 1
                request.done(None)
            else:
                self._incomplete(request, result)
        self._refill()
        if self._prepared and not self._plugged:
            self._kick()
        if not self._in_flight:
            self._all_done.unpark_all()
        return True

    def _incomplete(self, request: Request, result: int) -> None:
        """Failed, or short: then go on, or fill up past the end of the file."""
        if -result in _AGAIN:
            self._enqueue(request)
        elif result > 0:
            request.progress = True
            request.offset += result
            _point_to(request, rest_of(request.data, result))
            self._enqueue(request)
        elif request.kind != READ:
            self._finish(request, -result or errno.ENOSPC)
        elif result == 0 or (result == -errno.EINVAL and request.progress):
            # At an end of file that is not aligned O_DIRECT cannot go on: EINVAL.
            (rest,) = request.data
            try:
                fill_past_end(request.fd, memoryview(rest), request.offset)
            except OSError as error:
                self._end(request, error)
            else:
                self._end(request, None)
        else:
            self._finish(request, -result)

    def _finish(self, request: Request, error: int) -> None:
        self._end(request, OSError(error, os.strerror(error)) if error else None)

    def _end(self, request: Request, error: OSError | None) -> None:
        self._in_flight -= 1
        request.done(error)
        if not self._in_flight:
            self._all_done.unpark_all()

    # --- life ----------------------------------------------------------------------------------

    def attach(self) -> None:
        self._detached = trio.Event()
        self._waiting.cancel()

    def detach(self) -> None:
        self._detached.set()

    async def _watch(self) -> None:
        """Reap while nobody else does."""
        while not self._closed:
            await self._detached.wait()
            with trio.CancelScope() as self._waiting, suppress(trio.ClosedResourceError):
                if self._closed or not self._detached.is_set():
                    continue
                while self.reap():  # it leaves some if there are many
                    pass
                await trio.lowlevel.wait_readable(self.eventfd)
                if self._closed:  # after the eventfd woke us: its number may be another file's
                    return
                with suppress(BlockingIOError):
                    os.eventfd_read(self.eventfd)

    async def idle(self) -> None:
        while self._in_flight:
            await self._all_done.park()
        await self._threads.idle()

    def close(self) -> None:
        self._closed = True
        self._detached.set()
        trio.lowlevel.notify_closing(self.eventfd)
        os.close(self.eventfd)
        self._threads.close()

    def statistics(self) -> EngineStatistics:
        threads = self._threads.statistics()
        return EngineStatistics(
            self._jobs + threads.jobs,
            self._batches + threads.batches,
            threads.threads,
            self._in_flight + threads.in_flight,
        )


def _point_to(request: Request, data: Sequence[Buffer]) -> None:
    """The request is about this data. A vector longer than the kernel takes is cut: it is
    continued like any short write."""
    request.data = data
    request.length = sum(map(len, data))
    if len(data) == 1:
        if request.kind == WRITEV:
            request.kind = WRITE
        request.address = address_of(data[0])
        request.count = request.length
    else:
        import ctypes

        numbers = [number for piece in data[:IOV_MAX] for number in (address_of(piece), len(piece))]
        request.kind = WRITEV
        request.vector = (ctypes.c_size_t * len(numbers))(*numbers)
        request.address = ctypes.addressof(request.vector)
        request.count = len(numbers) // 2

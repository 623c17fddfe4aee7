"""What an I/O engine is: one protocol that `threads`, `io_uring` and `native` fit.

Law: a submission returns at once and its completion `done(error)` comes later, in the trio thread,
never from inside the submission. `done` may not raise. Until then descriptor and buffers are the
engine's. Transfers complete whole: an engine goes on after a short one, and what a read wants past
the end of the file is zeroes. The order of requests in flight is the kernel's.

Completions are reaped by whoever is there: a poller that called `attach` asks `reap` in each of
its rounds and sleeps on `eventfd`; otherwise the engine sees to it itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    Buffer = bytes | bytearray | memoryview
    Done = Callable[[OSError | None], None]

__all__ = ["Engine", "EngineStatistics", "completion"]

T = TypeVar("T")


class EngineStatistics(NamedTuple):
    """jobs: requests and calls taken; batches: hand-overs (to threads, to the kernel); threads:
    started; in_flight: not yet completed."""

    jobs: int
    batches: int
    threads: int
    in_flight: int


class Engine(Protocol):
    """How reads, writes and syncs of files reach the kernel. Offsets and lengths in bytes."""

    name: str
    @property
    def eventfd(self) -> int | None:
        """Becomes readable with a completion; None: the trio thread is woken in another way."""

    def plug(self) -> AbstractContextManager[None]:
        """Hand over all that the body submits together, at its end; plugs do not nest."""

    def submit_read(self, fd: int, buffer: memoryview, offset: int, done: Done) -> None:
        """Fill a writable buffer that is not empty."""

    def submit_write(
        self, fd: int, data: Sequence[Buffer], offset: int, done: Done, *, dsync: bool = False
    ) -> None:
        """Write buffers, none of them empty, one after the other; `dsync`: durable when done."""

    def submit_fsync(self, fd: int, done: Done) -> None:
        """fdatasync."""

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """Run a function that blocks in a thread; see ThreadsEngine.run."""

    def reap(self) -> bool:
        """Call completions that are at hand, not always all; whether there were any."""

    def attach(self) -> None:
        """From now on somebody else calls `reap`."""

    def detach(self) -> None:
        """Nobody else does any more."""

    async def idle(self) -> None:
        """Wait until everything has completed."""

    def close(self) -> None:
        """Nothing may be in flight."""

    def statistics(self) -> EngineStatistics:
        """Counters since the engine was started."""


async def completion(submit: Callable[[Done], None]) -> None:
    """Submit, and wait for the completion; raises its error.

    Cancellation is only seen before: the kernel cannot be called back, and the buffer is not ours
    to reuse until it is done.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()

    def done(error: OSError | None) -> None:
        trio.lowlevel.reschedule(
            task, outcome.Value(None) if error is None else outcome.Error(error)
        )

    submit(done)
    await trio.lowlevel.wait_task_rescheduled(lambda _raise_cancel: trio.lowlevel.Abort.FAILED)

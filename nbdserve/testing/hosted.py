"""An asynchronous context manager of trio, held open in a thread of its own.

So that tests need not be trio's: whoever starts it may be synchronous, in asyncio, or in another
trio. Law: what the manager gave is touched in its thread alone, through `call`. The thread is a
daemon, so that a program that forgets to stop it can end.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Hosted", "run_in_thread"]

T = TypeVar("T")
R = TypeVar("R")


class Hosted(Generic[T]):
    """`start` it, `call` functions in its thread, `stop` it."""

    def __init__(
        self,
        manager: contextlib.AbstractAsyncContextManager[T],
        name: str,
        first: Callable[[int], object] = lambda ident: None,
    ) -> None:
        """`first`: called in the thread before all else, with what the thread is to logging."""
        self._manager = manager
        self._first = first
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._entered: Future[T] = Future()
        self._ended: Future[None] = Future()

    def start(self) -> T:
        """Enter the manager; what it gave. Raises what entering raises."""
        self._thread.start()
        return self._entered.result()

    def call(self, function: Callable[..., R], *args: object) -> R:
        """A synchronous function's result, between two steps of the tasks there. Raises what it
        raises; or, if the manager has ended by itself, what that raised, else RuntimeError; that,
        too, in a process that was forked from the thread's."""
        if threading.current_thread() is self._thread:
            return function(*args)
        done: Future[R] = Future()

        def call() -> None:
            try:
                done.set_result(function(*args))
            except BaseException as error:
                done.set_exception(error)

        if not self._thread.is_alive():
            raise self._why_not()
        try:
            self._token.run_sync_soon(call)
        except trio.RunFinishedError:
            raise self._why_not() from None
        while True:
            try:
                return done.result(timeout=0.1)
            except TimeoutError:  # once in the queue it is called, unless the loop was at its end
                if self._ended.done() and not done.done():
                    raise self._why_not() from None

    def _why_not(self) -> RuntimeError:
        """Why there is nobody to call. Raises what the manager raised at its end."""
        self._thread.join()
        if not self._ended.done():  # it would be, had the thread ended here
            return RuntimeError(f"{self._thread.name} is of the process this was forked from")
        self._ended.result()
        return RuntimeError(f"{self._thread.name} has ended")

    def run(self, function: Callable[..., Awaitable[R]], *args: object) -> R:
        """An asynchronous function's result; as `call`, but not from the thread itself."""
        done: Future[R] = Future()

        async def task() -> None:
            try:
                done.set_result(await function(*args))
            except trio.Cancelled:
                done.set_exception(RuntimeError(f"{self._thread.name} has ended"))
                raise
            except BaseException as error:
                done.set_exception(error)

        self.call(lambda: self._nursery.start_soon(task))
        return done.result()

    def stop(self) -> None:
        """Leave the manager and end the thread; raises what leaving raises. Once is enough."""
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._leave.set)
        self._thread.join()
        self._ended.result()

    def _run(self) -> None:
        self._first(threading.get_ident())
        try:
            trio.run(self._main)
        except BaseException as error:
            if self._entered.done():
                self._ended.set_exception(error)
            else:
                self._ended.set_result(None)
                self._entered.set_exception(error)
        else:
            self._ended.set_result(None)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._leave = trio.Event()
        async with self._manager as value, trio.open_nursery() as self._nursery:
            self._entered.set_result(value)
            await self._leave.wait()
            self._nursery.cancel_scope.cancel()


def run_in_thread(function: Callable[..., Awaitable[R]], *args: object) -> R:
    """The result of an asynchronous function of trio, wherever the caller is."""
    done: Future[R] = Future()

    def run() -> None:
        try:
            done.set_result(trio.run(function, *args))
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, name="nbdserve", daemon=True)
    thread.start()
    thread.join()
    return done.result()

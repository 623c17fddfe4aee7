"""Waiting for a synchronous function without holding up an event loop, trio's or asyncio's."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["aside"]

R = TypeVar("R")


async def aside(function: Callable[[], R]) -> R:
    """Call it in a thread. It is waited for even if the caller is cancelled: then asyncio raises
    CancelledError afterwards, and trio at the next checkpoint."""
    if trio.lowlevel.in_trio_run():
        with trio.CancelScope(shield=True):
            return await trio.to_thread.run_sync(function)
    import asyncio  # slow to import, and here it is already

    task = asyncio.ensure_future(asyncio.to_thread(function))
    cancelled: BaseException | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # is not left unseen
        raise cancelled
    return task.result()

"""Requests that are held up: for a time, or until somebody lets them go.

There is no task and no timer of its own. Who waits for a file to be gone looks for it himself: one
of those who wait for the same file does, and wakes the others. So it costs a look each 20 ms while
somebody is stuck, and nothing else.

Law: all but the waiting itself is synchronous, in trio's thread. A wait that is cancelled leaves
nothing behind. Draining, nothing is held up any more.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Holding"]

LOOK_EACH = 0.02
"""Seconds between two looks for a file."""


class _Held:
    """A request that is held up. `event`: to look again, or to go."""

    __slots__ = ("event", "file", "gone", "is_stuck", "owner")

    def __init__(self, owner: object, *, file: str | None = None, is_stuck: bool = False) -> None:
        self.owner = owner
        self.file = file
        self.is_stuck = is_stuck
        self.gone = False
        self.event = trio.Event()

    def let_go(self) -> None:
        self.gone = True
        self.event.set()


class Holding:
    """Requests that are held up, each for the sake of an owner. `exists`: whether there is a
    file."""

    def __init__(self, exists: Callable[[str], bool] = os.path.exists) -> None:
        self._exists = exists
        self._held: dict[_Held, None] = {}  # a set in order of age
        self._lookouts: dict[str, _Held] = {}
        self._draining = False
        self._more_stuck = trio.Event()

    @property
    def stuck(self) -> int:
        """How many are held until they are let go."""
        return sum(held.is_stuck and not held.gone for held in self._held)

    async def wait_stuck(self, number: int) -> None:
        """Return once at least so many are stuck."""
        while self.stuck < number:
            await self._more_stuck.wait()

    async def sleep(self, owner: object, seconds: float) -> None:
        """Hold up for a time."""
        if self._draining:
            return
        held = _Held(owner)
        self._held[held] = None
        try:
            with trio.move_on_after(seconds):
                await held.event.wait()
        finally:
            del self._held[held]

    async def hold(self, owner: object, while_file: str | None) -> None:
        """Hold up until it is let go, or there is no file of that name."""
        if self._draining:
            return
        held = _Held(owner, file=while_file, is_stuck=True)
        self._held[held] = None
        self._more_stuck.set()
        self._more_stuck = trio.Event()
        try:
            while not held.gone:
                if while_file is not None and self._lookouts.setdefault(while_file, held) is held:
                    await self._look_out(held, while_file)
                else:
                    await held.event.wait()
                    held.event = trio.Event()
        finally:
            del self._held[held]
            if while_file is not None and self._lookouts.get(while_file) is held:
                self._replace_lookout(while_file)

    async def _look_out(self, held: _Held, path: str) -> None:
        while not held.gone:
            if not self._exists(path):
                _let_go(other for other in self._held if other.file == path)
            with trio.move_on_after(LOOK_EACH):
                await held.event.wait()

    def _replace_lookout(self, path: str) -> None:
        del self._lookouts[path]
        successor = next((held for held in self._held if held.file == path), None)
        if successor is not None:
            successor.event.set()

    def release(self) -> int:
        """Let all go that are stuck; returns how many."""
        return _let_go(held for held in self._held if held.is_stuck)

    def let_go(self, owner: object) -> None:
        """Let all go that are held up for the sake of one."""
        _let_go(held for held in self._held if held.owner is owner)

    def drain_begin(self) -> None:
        """Let all go, and hold nothing up from now on."""
        self._draining = True
        _let_go(self._held)


def _let_go(many: Iterable[_Held]) -> int:
    """Those of them that were not let go yet; returns how many."""
    waiting = [held for held in many if not held.gone]
    for held in waiting:
        held.let_go()
    return len(waiting)

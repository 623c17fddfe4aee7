"""Which writes of a file may run at the same time: `WriteGate`.

A write that covers only part of a block reads the block, changes it and writes it back. Whoever
writes into that block meanwhile would be undone; so such a write is *serialising*: it waits for
every earlier write that overlaps it, and later ones that overlap it wait for it (as QEMU's
tracked requests). Writes of whole blocks do not wait for each other.

Law: first come, first served among those that overlap. An entry waits for earlier ones only, so
there is no deadlock. Callbacks, no tasks: the hot path enters and leaves without an await, and
while nothing is serialising that is one dictionary entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GateStatistics", "WriteGate"]


class GateStatistics(NamedTuple):
    """Writes that are in flight or waiting, and of these those that wait for their turn."""

    entered: int
    waiting: int


class _Waiting:
    """One that waits: for the entries of `earlier`, then it goes."""

    __slots__ = ("earlier", "go")

    def __init__(self, earlier: set[int], go: Callable[[], None]) -> None:
        self.earlier = earlier
        self.go = go


class WriteGate:
    """Ranges [start, end) of writes in flight, in bytes."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[int, int, bool]] = {}  # in flight or waiting, oldest first
        self._waiting: dict[int, _Waiting] = {}
        self._serialising = 0
        self._next = 0

    def enter(
        self, start: int, end: int, go: Callable[[], None], *, serialising: bool = False
    ) -> int:
        """Call `go` when it is the write's turn, now or from a later `leave`. Returns the token
        that `leave` wants after the write. `go` may raise if called now, and then has not entered;
        it may not if called later."""
        token = self._next
        self._next = token + 1
        earlier: set[int] = set()
        if serialising or self._serialising:
            earlier = {
                number
                for number, (low, high, alone) in self._entries.items()
                if low < end and start < high and (serialising or alone)
            }
        self._entries[token] = (start, end, serialising)
        self._serialising += serialising
        if earlier:
            self._waiting[token] = _Waiting(earlier, go)
            return token
        try:
            go()
        except BaseException:
            self.leave(token)
            raise
        return token

    def enter_nowait(self, start: int, end: int) -> int | None:
        """Enter with a write of whole blocks if nobody can be in its way, as nearly always; the
        token, or None."""
        if self._serialising:
            return None
        token = self._next
        self._next = token + 1
        self._entries[token] = (start, end, False)
        return token

    def leave(self, token: int) -> None:
        """The write is done, or failed, or its turn is no longer waited for."""
        self._serialising -= self._entries.pop(token)[2]
        self._waiting.pop(token, None)
        if not self._waiting:
            return
        for waiting in self._waiting.values():
            waiting.earlier.discard(token)
        free = [number for number, waiting in self._waiting.items() if not waiting.earlier]
        # All are taken out first: one that fails at once leaves from within its `go`.
        for waiting in [self._waiting.pop(number) for number in free]:
            waiting.go()

    def statistics(self) -> GateStatistics:
        """As it is now."""
        return GateStatistics(len(self._entries), len(self._waiting))

"""Which requests may still use a host cluster that was just unlinked.

A request that awaits between resolving a range and finishing its I/O *enters* the current epoch
and *leaves* it when done. Whoever unlinks a cluster *advances* the epoch and keeps the tag that
this returns; once `oldest()` has passed the tag, no request that could have resolved onto the
cluster is left. Requests that resolve and finish without an await need not enter: nothing can be
unlinked under them. One `Epochs` is shared by all nodes of a tree, because runs are flattened.
"""

from __future__ import annotations

__all__ = ["Epochs"]


class Epochs:
    """Counts requests by the epoch they started in."""

    def __init__(self) -> None:
        self._current = 0
        self._active: dict[int, int] = {}  # epoch -> requests; insertion order is age

    def enter(self) -> int:
        """A request starts; give the returned token to `leave`."""
        epoch = self._current
        self._active[epoch] = self._active.get(epoch, 0) + 1
        return epoch

    def leave(self, epoch: int) -> None:
        """The request that `enter` returned `epoch` to is done."""
        left = self._active[epoch] - 1
        if left:
            self._active[epoch] = left
        else:
            del self._active[epoch]

    def advance(self) -> int:
        """Close the current epoch and return it as the tag of what was unlinked up to now."""
        tag = self._current
        self._current += 1
        return tag

    def oldest(self) -> int:
        """The oldest epoch with a request in flight; the current one if there is none."""
        return next(iter(self._active), self._current)

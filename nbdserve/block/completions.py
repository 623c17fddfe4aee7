"""What the poller of a front end needs of an I/O engine, and no more of it.

Submissions made in one round of the poller go to the kernel together at its end (`plug`), and
completions are called from the next (`reap`). So the front end knows no engine, and an engine no
front end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["Completions"]


class Completions(Protocol):
    """See nbdserve/engines/engine.py."""

    @property
    def eventfd(self) -> int | None:
        """Becomes readable with a completion; None: the trio thread is woken in another way."""

    def plug(self) -> AbstractContextManager[None]:
        """Hand over all that the body submits together, at its end; plugs do not nest."""

    def reap(self) -> bool:
        """Call the completions that are at hand; whether there were any. May not raise."""

    def attach(self) -> None:
        """From now on the caller calls `reap`."""

    def detach(self) -> None:
        """It does so no longer."""

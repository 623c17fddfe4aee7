"""What the poller of a front end needs of an I/O engine, and no more of it.

Completions are called from within a round of the poller (`reap`). So the front end knows no engine,
and an engine no front end.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

__all__ = ["Completions", "plug_of"]


class Completions(Protocol):
    """See nbdserve/engines/engine.py."""

    name: str

    @property
    def eventfd(self) -> int | None:
        """Becomes readable with a completion; None: the trio thread is woken in another way."""

    def plug(self) -> AbstractContextManager[None]:
        """Hand over all that the body submits together, at its end; plugs do not nest."""

    def reap(self) -> bool:
        """Call completions that are at hand, not always all; whether there were any. It may not
        raise."""

    def attach(self) -> None:
        """From now on the caller calls `reap`."""

    def detach(self) -> None:
        """It does so no longer."""

    def statistics(self) -> object:
        """Counters since it was started, a NamedTuple."""


def plug_of(engines: Sequence[Completions]) -> Callable[[], AbstractContextManager[None]]:
    """The plug of all of them together. The usual one engine has nothing around its own."""
    if not engines:
        return nullcontext
    if len(engines) == 1:
        return engines[0].plug

    @contextmanager
    def plug() -> Iterator[None]:
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(engine.plug())
            yield

    return plug

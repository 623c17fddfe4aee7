"""What a test can do to the filter nodes of a server in its process, from its own thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import trio

from nbdserve.testing.aside import aside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nbdserve.block.node import Node
    from nbdserve.faults import Fault
    from nbdserve.filters.fault import FaultNode
    from nbdserve.filters.injector import Rule
    from nbdserve.testing.hosted import Hosted

__all__ = ["FaultControl", "find"]

N = TypeVar("N", bound="Node")

WAIT_SECONDS = 10.0


def find(root: Node, kind: type[N], *, below: bool) -> N:
    """The uppermost node of a kind that is above the format, or `below` it."""
    return next(
        node for node, under in _path(root) if isinstance(node, kind) and under is below
    )


def _path(node: Node) -> Iterator[tuple[Node, bool]]:
    """The nodes from the root to the file, and whether each is below the format."""
    below = False
    while True:
        yield node, below
        below = below or not node.is_filter
        if "file" not in node.children:
            return
        node = node.children["file"]


class FaultControl:
    """What goes wrong at one node of a server that runs. Its methods are for any thread; but in a
    test whose own loop runs the client, `until_stuck` is the one that waits."""

    def __init__(self, thread: Hosted[Any], node: FaultNode) -> None:
        self._thread = thread
        self._faults = node.faults

    def add(self, fault: Fault) -> Rule:
        """From now on this goes wrong, too; what `remove` takes."""
        return self._thread.call(self._faults.add, fault)

    def remove(self, rule: Rule) -> None:
        """It goes wrong no longer, what is stuck by it is let go. Raises ValueError: it did not."""
        self._thread.call(self._faults.remove, rule)

    def clear(self) -> None:
        """No fault is left, nothing is stuck."""
        self._thread.call(self._faults.clear)

    def release(self) -> int:
        """Let go what is stuck; how many requests that were."""
        return self._thread.call(self._faults.release)

    @property
    def stuck(self) -> int:
        """How many requests are stuck."""
        return self._thread.call(lambda: self._faults.stuck)

    def wait_stuck(self, requests: int = 1, *, timeout: float = WAIT_SECONDS) -> None:
        """Wait until so many are. Raises TimeoutError."""

        async def wait() -> None:
            with trio.fail_after(timeout):
                await self._faults.wait_stuck(requests)

        try:
            self._thread.run(wait)
        except trio.TooSlowError:
            raise TimeoutError(
                f"{self.stuck} of {requests} requests are stuck after {timeout:g} s"
            ) from None

    async def until_stuck(self, requests: int = 1, *, timeout: float = WAIT_SECONDS) -> None:  # noqa: ASYNC109 - of asyncio and trio alike
        """`wait_stuck` that does not hold up the loop of the caller, which may be trio's or
        asyncio's."""
        await aside(lambda: self.wait_stuck(requests, timeout=timeout))

    @property
    def room(self) -> int | None:
        """Bytes of new space that are left; None: no end of it. May be set."""
        return self._thread.call(lambda: self._faults.room)

    @room.setter
    def room(self, left: int | None) -> None:
        self._thread.call(setattr, self._faults, "room", left)

    def statistics(self) -> dict[str, object]:
        """How often each fault was matched and injected."""
        return self._thread.call(self._faults.statistics)

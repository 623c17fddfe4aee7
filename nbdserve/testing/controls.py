"""What a test can do to the filter nodes of a server in its process, from its own thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from nbdserve.filters.fault import FaultNode
from nbdserve.testing.aside import aside
from nbdserve.testing.patterns import size_of

if TYPE_CHECKING:
    from nbdserve.block.node import Node
    from nbdserve.faults import Fault
    from nbdserve.filters.injector import Rule
    from nbdserve.testing.hosted import Hosted

__all__ = ["FaultControl", "fault_nodes"]

WAIT_SECONDS = 10.0


def fault_nodes(root: Node) -> list[FaultNode]:
    """Those between the root and the file, the uppermost first."""
    found = [root] if isinstance(root, FaultNode) else []
    below = root.children.get("file")
    return found if below is None else found + fault_nodes(below)


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
        """Bytes of new space that are left; None: no end of it. May be set, as the argument of that
        name may, "64k" for example. Raises ConfigError."""
        return self._thread.call(lambda: self._faults.room)

    @room.setter
    def room(self, left: int | str | None) -> None:
        room = None if left is None else size_of(left)
        self._thread.call(setattr, self._faults, "room", room)

    def statistics(self) -> dict[str, object]:
        """How often each fault was matched and injected."""
        return self._thread.call(self._faults.statistics)

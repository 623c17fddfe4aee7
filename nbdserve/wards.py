"""Which of the images that are opened the guardian takes care of.

It writes metadata to the host's file, where the nodes between would have put it. So it can do that
only if all of them pass bytes on as they are, moved at most: not for an image in the disk of
another image, or in memory, not through a filter of a user's own, and not past a power cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdserve.drivers.file import FileNode
from nbdserve.filters.fault import FaultNode
from nbdserve.filters.throttle import ThrottleNode
from nbdserve.formats.raw import RawNode

if TYPE_CHECKING:
    from nbdserve.block.node import Node
    from nbdserve.block.redo import RedoLog
    from nbdserve.guardian import Guardian, Ward

__all__ = ["Wards"]

PASSING = (FaultNode, RawNode, ThrottleNode)


class Wards:
    """The images of a tree that are watched."""

    def __init__(self, guardian: Guardian | None) -> None:
        self._guardian = guardian
        self._wards: list[Ward] = []

    def watch(self, file: Node, data_file: Node | None, *, no_flush: bool) -> RedoLog | None:
        """Have an image watched; the log of what it changes. None if it cannot be."""
        if self._guardian is None:
            return None
        place, data_place = _place(file), None if data_file is None else _place(data_file)
        if place is None or (data_file is not None and data_place is None):
            return None
        ward = self._guardian.watch(
            place[0],
            None if data_place is None else data_place[0],
            offset=place[1],
            no_flush=no_flush,
        )
        if ward is None:
            return None
        self._wards.append(ward)
        return ward.log

    def close(self) -> None:
        """All nodes are closed, well or not."""
        while self._wards:
            self._wards.pop().close()


def _place(node: Node) -> tuple[FileNode, int] | None:
    """The host's file that a node's data is in, and from which byte on; None: it is not there as
    it is in the node."""
    offset = 0
    while isinstance(node, PASSING):
        if isinstance(node, RawNode):
            offset += node.offset
        node = node.children["file"]
    return (node, offset) if isinstance(node, FileNode) else None

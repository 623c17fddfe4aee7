"""What a test asks for, turned into the options of a tree of nodes.

One way for servers in this process and in one of their own: the options are those of --image-opts,
as a ``json:`` name, so whatever a fixture can be asked for a command line can say, too. Only what
is in memory has no name.

Seen from a client the nodes are: faults, power cut, format, faults, power cut, file. A fault is
nearer to who asks than a power cut is, so that a request that fails is not in the write log.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any, Literal

from nbdserve.blockdev import FileOptions, MemoryOptions, image_tree
from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbdserve.blockdev import NodeOptions
    from nbdserve.faults import Fault
    from nbdserve.powercut.content import Content

__all__ = ["DISK", "FILE", "Plan"]

DISK, FILE = "disk", "file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to serve.

    :param format: qcow2 or raw.
    :param options: further options of the format's node, as in --image-opts, dots and all.
    :param faults: what goes wrong above the format, for its clients.
    :param file_faults: the same below the format, where its file is.
    :param seed: of both.
    :param room: bytes until the disk is full; file_room: until the file system below is.
    :param power_cut: where the power can be cut: "disk", above the format, or "file", below it.
    :param write_log: a file that has the log of that as it grows.
    :param history: whether the power can be cut in the past, too; else the log keeps only what the
        disk may still lose.
    :param max_data: bytes that the log may have in memory, by default 1 GiB.
    :param fault_nodes: whether there are nodes for faults though none is asked for yet.
    """

    format: str = "qcow2"
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    faults: Sequence[Fault] = ()
    file_faults: Sequence[Fault] = ()
    seed: int = 0
    room: int | str | None = None
    file_room: int | str | None = None
    power_cut: Literal["disk", "file"] | None = None
    write_log: str | os.PathLike[str] | None = None
    history: bool = True
    max_data: int | str | None = None
    fault_nodes: bool = False

    def __post_init__(self) -> None:
        if self.power_cut not in (None, DISK, FILE):
            raise ConfigError(f"power_cut: {self.power_cut!r} is neither 'disk' nor 'file'")
        if self.power_cut is None:
            for name in self._log_options():
                raise ConfigError(f"{name} needs power_cut")

    def name(self, filename: str) -> str:
        """The name of the image in a file, to be given to a server."""
        return "json:" + json.dumps(self._nodes({"driver": "file", "filename": filename}))

    def tree(self, content: Content, filename: str) -> NodeOptions:
        """The tree on a leaf in memory, which is called `filename`. Raises ConfigError."""
        leaf = MemoryOptions(content=content, filename=filename)
        return _on(leaf, image_tree(self.name(filename), None))

    def _nodes(self, file: Mapping[str, object]) -> dict[str, object]:
        below = self._filters(FILE, self.file_faults, self.file_room, file)
        node = {"driver": self.format, "file": below, **self.options}
        return self._filters(DISK, self.faults, self.room, node)

    def _log_options(self) -> dict[str, object]:
        given = {
            "write_log": None if self.write_log is None else os.path.abspath(self.write_log),
            "history": None if self.history else False,
            "max_data": self.max_data,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _filters(
        self,
        where: str,
        faults: Sequence[Fault],
        room: int | str | None,
        node: Mapping[str, object],
    ) -> dict[str, object]:
        found = dict(node)
        if self.power_cut == where:
            names = {"write_log": "log", "history": "history", "max_data": "max-data"}
            log = {names[name]: value for name, value in self._log_options().items()}
            found = {"driver": "power-cut", **log, "file": found}
        if faults or room is not None or self.fault_nodes:
            found = {"driver": "fault", "seed": self.seed, "file": found}
            if faults:
                found["faults"] = [_fault_options(fault) for fault in faults]
            if room is not None:
                found["room"] = room
        return found


def _on(leaf: MemoryOptions, tree: Any) -> NodeOptions:  # noqa: ANN401 - any but a leaf has `file`
    """The tree with another leaf."""
    if isinstance(tree, FileOptions):
        return leaf
    found: NodeOptions = dataclasses.replace(tree, file=_on(leaf, tree.file))
    return found


def _fault_options(fault: Fault) -> dict[str, object]:
    """The options that say the same as a fault."""
    return {
        option: "+".join(sorted(value)) if isinstance(value, frozenset) else value
        for option, value in fault.options()
    }

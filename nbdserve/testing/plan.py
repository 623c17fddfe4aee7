"""What a test asks for, turned into the options of a tree of nodes.

One way for servers in this process and in one of their own: the options are those of --image-opts,
as a ``json:`` name, so whatever a fixture can be asked for a command line can say, too.

Seen from a client the nodes are: faults, power cut, format, faults, power cut, file. A fault is
nearer to who asks than a power cut is, so that a request that fails is not in the write log.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Literal

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nbdserve.faults import Fault

__all__ = ["DISK", "FILE", "Plan"]

DISK, FILE = "disk", "file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to serve.

    :param format: qcow2 or raw.
    :param options: further options of the format's node, as in --image-opts, dots and all.
    :param faults: what goes wrong above the format, for its clients; None: there shall be no node
        for it, while with an empty sequence faults can be added later.
    :param file_faults: the same below the format, where its file is.
    :param seed: of both.
    :param room: bytes until the disk is full; file_room: until the file system below is.
    :param power_cut: where the power can be cut: "disk", above the format, or "file", below it.
    :param write_log: a file that has the log of that as it grows.
    """

    format: str = "qcow2"
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    faults: Sequence[Fault] | None = None
    file_faults: Sequence[Fault] | None = None
    seed: int = 0
    room: int | str | None = None
    file_room: int | str | None = None
    power_cut: Literal["disk", "file"] | None = None
    write_log: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.power_cut not in (None, DISK, FILE):
            raise ConfigError(f"power_cut: {self.power_cut!r} is neither 'disk' nor 'file'")
        if self.write_log is not None and self.power_cut is None:
            raise ConfigError("write_log needs power_cut")

    def name(self, filename: str) -> str:
        """The name of the image in a file, to be given to a server."""
        return "json:" + json.dumps(self.nodes({"filename": filename}))

    def nodes(self, file: Mapping[str, object]) -> dict[str, object]:
        """The options of the tree, nested; `file`: those of the leaf."""
        below = self._filters(FILE, self.file_faults, self.file_room, file)
        node = {"driver": self.format, "file": below, **self.options}
        return self._filters(DISK, self.faults, self.room, node)

    def _filters(
        self,
        where: str,
        faults: Sequence[Fault] | None,
        room: int | str | None,
        node: Mapping[str, object],
    ) -> dict[str, object]:
        found = dict(node)
        if self.power_cut == where:
            found = {"driver": "power-cut", "file": found}
            if self.write_log is not None:
                found["log"] = os.path.abspath(self.write_log)
        if faults is not None or room is not None:
            found = {"driver": "fault", "seed": self.seed, "file": found}
            if faults:
                found["faults"] = [fault_options(fault) for fault in faults]
            if room is not None:
                found["room"] = room
        return found


def fault_options(fault: Fault) -> dict[str, object]:
    """The options that say the same as a fault."""
    return {
        option: "+".join(sorted(value)) if isinstance(value, frozenset) else value
        for option, value in fault.options()
    }

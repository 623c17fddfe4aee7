"""The names by which users, errors and statistics call the nodes of a process."""

from __future__ import annotations

from nbdserve.errors import ConfigError

__all__ = ["NodeNames"]


class NodeNames:
    """The node names of a process; each names one node."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._made = 0

    def take(self, wanted: str | None) -> str:
        """The name for a node; one of our own, which no user can have taken, if none is wanted."""
        if wanted is None:
            self._made += 1
            return f"#block{self._made:03}"
        if wanted in self._taken:
            raise ConfigError(f"node-name: {wanted!r} is given to two nodes")
        self._taken.add(wanted)
        return wanted

    def give_back(self, name: str) -> None:
        """The node is closed."""
        self._taken.discard(name)

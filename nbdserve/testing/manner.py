"""How a server for a test serves what it has: `Manner`, said to both kinds of servers.

Law: an option has one name and one meaning here, whether it becomes a setting of a server in this
process or a word of the command line; and what is wrong with it is said before anything starts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from nbdserve.blockdev import AIO_MODES, DETECT_ZEROES_MODES, DISCARD_MODES
from nbdserve.cli.throttle import parse_throttle
from nbdserve.config import CACHE_AUTO, CACHE_MODES, ExportConfig, ImageConfig, ServeConfig
from nbdserve.errors import ConfigError
from nbdserve.testing.patterns import size_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from nbdserve.blockdev import Aio, DetectZeroes, Discard, NodeOptions
    from nbdserve.config import ListenConfig

__all__ = ["Manner"]

CACHES = {**CACHE_MODES, "auto": CACHE_AUTO}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
    """The options of ``nbdserve serve`` of the same names, but: `export` is --export-name, and
    `clients` is --shared, 0 for any number."""

    cache: str = "writeback"
    aio: Aio | None = None
    discard: Discard = "unmap"
    detect_zeroes: DetectZeroes = "off"
    read_only: bool = False
    offset: int | str = 0
    throttle: str | None = None
    export: str = ""
    clients: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("cache", self.cache, CACHES),
            ("aio", self.aio, [None, *AIO_MODES]),
            ("discard", self.discard, DISCARD_MODES),
            ("detect_zeroes", self.detect_zeroes, DETECT_ZEROES_MODES),
        ):
            _check(name, value, known)

    def config(
        self, filename: str, options: NodeOptions | None, listen: ListenConfig
    ) -> ServeConfig:
        """For a server in this process, of a name or of options. Raises ConfigError."""
        image = ImageConfig(
            filename,
            options=options,
            read_only=self.read_only,
            cache=CACHES[self.cache],
            discard=DISCARD_MODES[self.discard],
            detect_zeroes=self.detect_zeroes,
            offset=size_of(self.offset),
            aio=self.aio,
            throttle=parse_throttle([self.throttle] if self.throttle else []),
        )
        return ServeConfig(image, ExportConfig(self.export), listen, max_clients=self.clients)

    def words(self) -> list[str]:
        """For a command line."""
        words = [
            f"--cache={self.cache}",
            f"--discard={self.discard}",
            f"--detect-zeroes={self.detect_zeroes}",
            f"--offset={size_of(self.offset)}",
            f"--export-name={self.export}",
            f"--shared={self.clients}",
        ]
        if self.aio is not None:
            words.append(f"--aio={self.aio}")
        if self.throttle is not None:
            words.append(f"--throttle={self.throttle}")
        if self.read_only:
            words.append("--read-only")
        return words


def _check(name: str, value: object, known: Collection[str | None]) -> None:
    if value not in known:
        names = ", ".join(each for each in known if each is not None)
        raise ConfigError(f"{name}: {value!r} is not one of {names}")

"""The table of targets. Nothing of the package is imported here: who fuzzes instruments it
first."""

from __future__ import annotations

import importlib
import pathlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["CORPUS", "TARGETS", "Target"]

CORPUS = pathlib.Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """`share`: of the inputs of a long run, in percent. `cost`: of an input, roughly, beside
    others. `longest`: bytes of an input. `covers`: what is instrumented, by the beginnings of
    module names."""

    name: str
    share: int
    cost: int
    longest: int
    covers: tuple[str, ...]

    @property
    def module(self) -> ModuleType:
        """It has the target under its own name, `seeds`, a `DICTIONARY`, and what mutate.py
        uses."""
        return importlib.import_module(f"fuzz.{self.name}")

    @property
    def function(self) -> Callable[[bytes], None]:
        """The target itself."""
        function: Callable[[bytes], None] = getattr(self.module, self.name)
        return function

    @property
    def corpus(self) -> list[bytes]:
        """The kept inputs, smallest first."""
        files = (CORPUS / self.name).glob("*")
        return sorted((file.read_bytes() for file in files), key=lambda data: (len(data), data))


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "handshake",
            10,
            4,
            4400,
            ("nbdserve.nbd.handshake", "nbdserve.nbd.options", "nbdserve.nbd.metacontext"),
        ),
        Target("requests", 37, 2, 2048, ("nbdserve.nbd.requests", "nbdserve.nbd.validate")),
        Target(
            "transmission",
            2,
            40,
            2048,
            (
                "nbdserve.nbd.connection",
                "nbdserve.nbd.batch",
                "nbdserve.nbd.late",
                "nbdserve.nbd.commands",
                "nbdserve.nbd.replies",
                "nbdserve.nbd.outbox",
                "nbdserve.nbd.intake",
                "nbdserve.nbd.budget",
                "nbdserve.nbd.requests",
                "nbdserve.nbd.validate",
                "nbdserve.block.backend",
            ),
        ),
        Target(
            "header",
            8,
            3,
            4200,
            (
                "nbdserve.formats.qcow2.header",
                "nbdserve.formats.qcow2.fields",
                "nbdserve.formats.qcow2.consistency",
                "nbdserve.formats.qcow2.extensions",
                "nbdserve.formats.qcow2.supported",
            ),
        ),
        Target("image", 5, 25, 8192, ("nbdserve.formats.qcow2", "nbdserve.block.backend")),
        Target(
            "option_strings",
            38,
            1,
            512,
            (
                "nbdserve.imageopts",
                "nbdserve.blockdev",
                "nbdserve.units",
                "nbdserve.inherit",
                "nbdserve.config",
                "nbdserve.cli.objects",
                "nbdserve.cli.throttle",
            ),
        ),
    )
}

"""A smaller world: limits of the package made so small that inputs of some kilobytes meet them.

Only sizes of buffers and the longest payload, which nothing else depends on; and patience, where
who is waited for is in the same thread. A name that is not there is an error.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

    Change = tuple[ModuleType, str, float]

__all__ = ["scaled"]


@contextmanager
def scaled(changes: Sequence[Change]) -> Iterator[None]:
    """These names of modules have other values in the body."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)

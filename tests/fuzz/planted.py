"""Bugs to be found: one small change to one function of the package, for the length of a test.

The function's code is exchanged in place, so everybody who has imported it runs the changed one. A
change whose text is not there once and only once is an error: the test of a fuzzer must not quietly
plant nothing.
"""

from __future__ import annotations

import inspect
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FunctionType

__all__ = ["Bug", "planted"]


@dataclass(frozen=True)
class Bug:
    """`old` in the source of `function` becomes `new`."""

    function: Callable[..., object]
    old: str
    new: str


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug is there for the body."""
    source = textwrap.dedent(inspect.getsource(bug.function))
    assert source.count(bug.old) == 1, f"{bug.old!r} is not once in {bug.function.__qualname__}"
    scope: dict[str, FunctionType] = {}
    code = compile(source.replace(bug.old, bug.new), "<planted>", "exec")
    exec(
        code, cast("FunctionType", bug.function).__globals__, scope
    )  # our own source, one line of it changed
    function = cast("FunctionType", bug.function)
    before = function.__code__
    function.__code__ = scope[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = before

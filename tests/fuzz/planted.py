"""Bugs to be found: one small change to one function of the package, for the length of a test.

The function's code is exchanged in place, so everybody who has imported it runs the changed one. A
change whose text is not there once and only once is an error: the test of a fuzzer must not quietly
plant nothing.
"""

from __future__ import annotations

import __future__
import inspect
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FunctionType

__all__ = ["Bug", "planted"]


@dataclass(frozen=True)
class Bug:
    """`old` in the source of `function` becomes `new`."""

    function: FunctionType
    old: str
    new: str


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug is there for the body."""
    source = textwrap.dedent(inspect.getsource(bug.function))
    assert source.count(bug.old) == 1, f"{bug.old!r} is not once in {bug.function.__qualname__}"
    flags = __future__.annotations.compiler_flag
    scope: dict[str, FunctionType] = {}
    code = compile(source.replace(bug.old, bug.new), "<planted>", "exec", flags, dont_inherit=True)
    exec(code, bug.function.__globals__, scope)  # noqa: S102 - our own source, one line changed
    before = bug.function.__code__
    bug.function.__code__ = scope[bug.function.__name__].__code__
    try:
        yield
    finally:
        bug.function.__code__ = before

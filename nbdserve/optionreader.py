"""Taking the options of one node out of a flat dict, each by its name and as its type.

What was not taken has no meaning, and whoever reads asks for it at the end. An option has a type in
json: names, elsewhere it is text. Errors name it by its whole path.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

from nbdserve.errors import ConfigError
from nbdserve.imageopts import Options, children_of
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nbdserve.imageopts import Scalar

__all__ = ["BOOLEANS", "OptionReader"]

T = TypeVar("T")

BOOLEANS: dict[str, bool] = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
"""Every spelling of a bool (follows ``qapi_bool_parse``)."""

MAX_DIGITS = 20
"""Of a number that is no size: int() is never handed a megabyte."""


class OptionReader:
    """Takes the options of one node out of a dict, so that what is left has no meaning."""

    def __init__(self, options: Mapping[str, Scalar], path: str) -> None:
        self.path = path
        self._options = dict(options)

    def left(self) -> Options:
        """What was not taken yet."""
        return dict(self._options)

    def text(self, key: str) -> str | None:
        return self._take(key, "a string", lambda value: value if isinstance(value, str) else None)

    def boolean(self, key: str) -> bool | None:
        def convert(value: Scalar) -> bool | None:
            return BOOLEANS.get(value) if isinstance(value, str) else _only(value, bool)

        return self._take(key, "on or off", convert)

    def size(self, key: str) -> int | None:
        def convert(value: Scalar) -> int | None:
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                return None
            return parse_size(str(value), f"{self.path}{key}")

        return self._take(key, "a size in bytes", convert)

    def integer(self, key: str) -> int | None:
        def convert(value: Scalar) -> int | None:
            text = str(value)
            return int(text) if text.isdecimal() and len(text) < MAX_DIGITS else None

        return self._take(key, "a number", convert)

    def choice(self, key: str, known: Mapping[str, T]) -> T | None:
        def convert(value: Scalar) -> T | None:
            return known.get(value) if isinstance(value, str) else None

        return self._take(key, f"one of {', '.join(known)}", convert)

    def child(self, name: str, *, nullable: bool = False) -> Options | None:
        """The options of a child; empty if none are given. `nullable`: null or an empty value in
        their place say that there shall be no child, which is None."""
        if name in self._options:
            value = self._options.pop(name)
            if nullable and value in (None, ""):
                return None
            raise ConfigError(
                f"{self.path}{name}: there is no node {value!r} to refer to;"
                f" a file is named by {self.path}{name}.filename"
            )
        found = children_of(self._options, name)
        for key in found:
            del self._options[f"{name}.{key}"]
        return found

    def _take(self, key: str, kind: str, convert: Callable[[Scalar], T | None]) -> T | None:
        if key not in self._options:
            return None
        value = self._options.pop(key)
        converted = convert(value)
        if converted is None:
            raise ConfigError(f"{self.path}{key}: {_spelt(value)} is not {kind}")
        return converted


def _only(value: Scalar, kind: type[T]) -> T | None:
    return value if isinstance(value, kind) else None


def _spelt(value: Scalar) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value)

"""The spellings of block device options, all turned into one flat dict.

``driver=qcow2,file.filename=disk.qcow2,cache.direct=on`` is what --image-opts takes;
``json:{"driver": "qcow2", "file": {"filename": "disk.qcow2"}}`` is a file name that holds options;
and a plain file name is an option too. What they mean is blockdev.py's business. Here a key is a
path with dots, as in QEMU, which flattens the nested spelling to the dotted one; a node's child
gets the keys below ``file.``.

A json: name may stand in an image that somebody else made. Whatever the text, the answer is a dict
of bounded size and depth or a ConfigError of one line.

Follows opts_do_parse and get_opt_value (util/qemu-option.c), parse_json_filename, path_has_protocol
and bdrv_get_full_backing_filename (block.c), qdict_flatten, and json-lexer.c for strings in single
quotes. Unlike QEMU, where the last one wins, an option that is given twice is refused.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, NoReturn

from nbdserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = [
    "JSON_PREFIX",
    "Options",
    "Scalar",
    "children_of",
    "options_of_name",
    "parse_image_opts",
    "parse_json_name",
    "parse_keyval",
    "shown",
]

Scalar = str | int | float | bool | None
Options = dict[str, Scalar]

JSON_PREFIX = "json:"

MAX_TEXT = 1 << 16
"""Longest text in characters; a backing file's name has 1023 bytes at most."""

MAX_DEPTH = 32
"""Most names in a key, and most brackets within brackets: what reads options may recurse."""

MAX_SHOWN = 200
"""Most characters of a name in an error."""

# The implied key of a first item without "=": qemu-nbd's file_opts.
IMPLIED_KEY = "file"

# A colon before any slash: what stands before it names a protocol driver (path_has_protocol).
_PROTOCOL = re.compile("(?P<name>[^/:]*):")

# A string in either kind of quotes, or one bracket. A string without an end is taken to the end of
# the text, so that nothing is looked at twice.
_TOKEN = re.compile(
    r""" "(?:[^"\\]|\\.)*(?:"|\\?\Z) | '(?:[^'\\]|\\.)*(?:'|\\?\Z) | [][{}] """,
    re.VERBOSE | re.DOTALL,
)
_QUOTE = re.compile(r'\\.|"', re.DOTALL)


def parse_image_opts(text: str) -> Options:
    """Options from ``key=value,key=value``.

    A comma in a value is written twice. ``key`` alone is ``key=on``, ``nokey`` is ``key=off``; the
    first item alone is ``file=item``. A comma at the end means nothing.

    :raises ConfigError: a key that is empty, given twice, or both an option and a group of them.
    """
    return _collect(_items(text, IMPLIED_KEY, flags=True))


def parse_keyval(text: str, implied_key: str) -> Options:
    """As `parse_image_opts`, for options that never had the short form ``key`` (keyval_parse)."""
    return _collect(_items(text, implied_key, flags=False))


def _items(text: str, implied_key: str, *, flags: bool) -> Iterator[tuple[str, Scalar]]:
    if len(text) > MAX_TEXT:
        raise ConfigError(f"the options are longer than {MAX_TEXT} characters")
    position = 0
    while position < len(text):
        key_end = min(_find(text, "=", position), _find(text, ",", position))
        key = text[position:key_end]
        if text[key_end : key_end + 1] == "=":
            value, end = _value(text, key_end + 1)
        elif position == 0:
            key = implied_key
            value, end = _value(text, 0)
        elif not flags:
            raise ConfigError(f"{key!r} is not KEY=VALUE")
        else:
            value, end = ("off" if key.startswith("no") else "on"), key_end
            key = key.removeprefix("no")
        yield key, value
        position = end + 1


def _find(text: str, character: str, start: int) -> int:
    found = text.find(character, start)
    return len(text) if found < 0 else found


def _value(text: str, start: int) -> tuple[str, int]:
    """The value that begins at `start`, and where its comma or the end is."""
    end = start
    while (end := _find(text, ",", end)) < len(text) and text[end + 1 : end + 2] == ",":
        end += 2
    return text[start:end].replace(",,", ","), end


def options_of_name(name: str, directory: str = "") -> Options:
    """Options from the name of an image, such as an overlay's header holds.

    A plain name is relative to `directory`. What stands behind ``file:`` is taken as it is, and so
    are the names within ``json:``: both are relative to where the process runs.

    :raises ConfigError: another protocol, or as in `parse_json_name`.
    """
    if name.startswith(JSON_PREFIX):
        return parse_json_name(name)
    protocol = _PROTOCOL.match(name)
    if protocol is None:
        return {"file.filename": os.path.join(directory, name)}
    if protocol["name"] != "file":
        raise ConfigError(
            f"{shown(name)}: unknown protocol {shown(protocol['name'])!r}; a file of that name"
            " is ./ and the name"
        )
    return {"file.filename": name[protocol.end() :]}


def parse_json_name(name: str) -> Options:
    """Options from ``json:{...}``, nested, dotted or both.

    :raises ConfigError: not a JSON object, too deep or too long, or as in `parse_image_opts`.
    """
    text = name.removeprefix(JSON_PREFIX)
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{JSON_PREFIX} longer than {MAX_TEXT} characters")
    try:
        value = json.loads(
            _double_quoted(text),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    # int() refuses numbers of thousands of digits by ValueError.
    except ValueError as error:
        raise ConfigError(f"{shown(name)}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{shown(name)}: not a JSON object")
    return _collect(_flatten(value, ""))


def shown(name: str) -> str:
    """A name as an error shows it, which is a line."""
    return name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."


def _double_quoted(text: str) -> str:
    """The text with all strings in double quotes. Raises ValueError for brackets that are too deep.

    A string without an end gets one. It ends the text, within an object that has no end then, and
    so is refused like any other object that has none."""
    depth = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal depth
        token = match[0]
        if token in "[]{}":
            depth += 1 if token in "[{" else -1
            if depth > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} brackets within each other")
            return token
        return '"' + _QUOTE.sub(_quoted, token[1:-1]) + '"'

    return _TOKEN.sub(replace, text)


def _quoted(match: re.Match[str]) -> str:
    return {'"': '\\"', "\\'": "'"}.get(match[0], match[0])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a value")


def _flatten(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, Scalar]]:
    for key, inner in value.items():
        if isinstance(inner, list):
            inner = {str(index): item for index, item in enumerate(inner)}
        if not isinstance(inner, dict):
            yield prefix + key, inner
        elif inner:
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            raise ConfigError(f"{prefix}{key}: no options in it")


def _collect(items: Iterable[tuple[str, Scalar]]) -> Options:
    """A dict of them, once they are known not to contradict each other."""
    options: Options = {}
    for key, value in items:
        _check_text(key, key)
        if isinstance(value, str):
            _check_text(key, value)
        names = key.split(".")
        if not all(names):
            raise ConfigError(f"{key!r}: an option's name is empty")
        if len(names) > MAX_DEPTH:
            raise ConfigError(f"{'.'.join(names[:3])}...: more than {MAX_DEPTH} names in an option")
        if key in options:
            raise ConfigError(f"{key} is given twice")
        options[key] = value
    for key in options:
        names = key.split(".")
        for length in range(1, len(names)):
            above = ".".join(names[:length])
            if above in options:
                raise ConfigError(f"{above} cannot have a value of its own beside {key}")
    return options


def _check_text(key: str, text: str) -> None:
    """Refuse what could not be a file name: the system would refuse it less clearly."""
    if "\0" in text:
        raise ConfigError(f"{key!r}: contains a NUL byte")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError(f"{key!r}: {text!r} is not valid Unicode") from None


def children_of(options: Mapping[str, Scalar], name: str) -> Options:
    """The options below ``name.``, without it (qdict_extract_subqdict)."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)
    }

"""What shall go wrong: `Fault`, a trigger and its effects, as a value.

A test's author writes one by hand, ``Fault(ops="write", error="EIO", count=3)``; options of a node
and of the command line parse into one, by the same names with - for _. Either way it is checked as
it is made, and what makes no sense is a ConfigError of one line that names the option: a fault that
can never do what it says would let a test pass that shows nothing.

Nothing here does a fault; filters/injector.py decides which requests meet one, filters/fault.py
does it to them.
"""

from __future__ import annotations

import errno
import math
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nbdserve.errors import ConfigError
from nbdserve.imageopts import parse_keyval, shown
from nbdserve.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from nbdserve.imageopts import Scalar

__all__ = ["OPS", "RANDOM", "Fault", "parse_fault", "parse_faults"]

OPS = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
"""What can be asked of a node. A write with FUA is a write."""

RANDOM = "random"
"""For `short`: as many sectors as the seed says."""

WRITES = frozenset({"write", "write-zeroes"})
CARRY_BYTES = frozenset({"read", "write", "write-zeroes", "discard"})
HAVE_RANGE = frozenset(OPS) - {"flush"}

SUITS: dict[str, frozenset[str]] = {
    "flip-bits": frozenset({"read"}),
    "short": WRITES,
    "torn": WRITES,
    "lost": frozenset({"write", "write-zeroes", "discard", "flush"}),
    "bps": CARRY_BYTES,
    "offset": HAVE_RANGE,
    "length": HAVE_RANGE,
}
"""Options that only some operations can have; the others can have all of them."""

ENDINGS = ("lost", "disconnect", "short", "torn")
"""Effects that say what becomes of a request; `error` does too, beside the last two or alone."""

EFFECTS = ("error", "delay", "jitter", "stuck", *ENDINGS, "flip-bits", "bps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Which requests it happens to:

    * `ops`: names out of OPS, in a collection or joined by +, or "all"; empty: all that can have
      the effects. A set afterwards.
    * `offset`, `length`: a range in bytes that the request must overlap; without a length to the
      end of the disk.
    * `if_file`: a path; only while such a file exists.
    * `after`: so many of them are let through first; `count`: to so many of the others, None: all.
    * `probability`: of each of those, by the node's seed.

    What it does to them, one or more of:

    * `delay`, `jitter`: held up for `delay` seconds and a random part of `jitter` more.
    * `bps`: together they get so many bytes a second.
    * `stuck`: held up until somebody lets them go, or `if_file` is gone.
    * `error`: fails with the errno of that name.
    * `short`: only so many of a write's first sectors are written, RANDOM for a random number, and
      at least one is not; then it fails with `error`, by default EIO.
    * `torn`: the same with a random subset of the sectors.
    * `silent`: with `short` or `torn`, the write is acknowledged as if it were done.
    * `lost`: acknowledged, and nothing was done.
    * `flip_bits`: so many bits of what a read returns are turned over, within the range.
    * `disconnect`: the client's connection is dropped without a reply; nothing was done.
    """

    ops: str | Collection[str] = ()
    offset: int | None = None
    length: int | None = None
    after: int = 0
    count: int | None = None
    probability: float = 1.0
    if_file: str | None = None
    error: str | None = None
    delay: float = 0.0
    jitter: float = 0.0
    stuck: bool = False
    short: int | str | None = None
    torn: bool = False
    silent: bool = False
    lost: bool = False
    flip_bits: int = 0
    bps: int = 0
    disconnect: bool = False

    def __post_init__(self) -> None:
        for option, value in self.options():
            kind = KINDS[option]
            if not kind.allows(value):
                said = shown(value) if isinstance(value, str) else value
                raise ConfigError(f"{option}: {said!r} is not {kind.what}")
        _check_effects(self)
        object.__setattr__(self, "ops", _operations(self))

    def options(self) -> Iterator[tuple[str, Any]]:
        """(option, value) of what is not as by default."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                yield field.name.replace("_", "-"), value

    @property
    def errno(self) -> int | None:
        """What a request fails with; None if it does not."""
        cut = self.short is not None or self.torn
        name = self.error or ("EIO" if cut and not self.silent else None)
        return None if name is None else getattr(errno, name)

    @property
    def ends(self) -> bool:
        """Whether it says what becomes of a request, which no further fault then can."""
        cut = self.short is not None or self.torn
        return bool(self.error or cut or self.lost or self.disconnect)

    def overlap(self, offset: int, length: int) -> tuple[int, int]:
        """(start, end) of the part of a request that is within the range; empty if end <= start."""
        first = self.offset or 0
        end = offset + length
        return max(first, offset), end if self.length is None else min(first + self.length, end)

    def concerns(self, op: str, offset: int, length: int) -> bool:
        """Whether a request is one of those, triggers that depend on others left out."""
        if op not in self.ops:
            return False
        if self.offset is None and self.length is None:
            return True
        start, end = self.overlap(offset, length)
        return start < end


# --- what makes sense ----------------------------------------------------------------------------


def _check_effects(fault: Fault) -> None:
    given = dict(fault.options())
    if not any(effect in given for effect in EFFECTS):
        raise ConfigError(f"a fault needs an effect, one of {', '.join(EFFECTS)}")
    endings = [effect for effect in ENDINGS if effect in given]
    if len(endings) > 1:
        raise ConfigError(f"{endings[0]} and {endings[1]} cannot both be set")
    cut = fault.short is not None or fault.torn
    if fault.error and endings and not cut:
        raise ConfigError(f"error and {endings[0]} cannot both be set: no error is answered then")
    if fault.silent and not cut:
        raise ConfigError("silent needs short or torn")
    if fault.silent and fault.error:
        raise ConfigError("silent and error cannot both be set: a silent fault is acknowledged")
    if fault.flip_bits and fault.ends:
        raise ConfigError("flip-bits is for reads that succeed, so no other fate can be set")


def _operations(fault: Fault) -> frozenset[str]:
    """The operations of a fault, once all are known to be able to have it."""
    named = _named_operations(fault.ops)
    suitable = frozenset(OPS)
    for option, _ in fault.options():
        allowed = SUITS.get(option, suitable)
        unsuitable = [op for op in OPS if op in named - allowed]
        if unsuitable:
            raise ConfigError(
                f"{option}: {unsuitable[0]} cannot have it, only {_joined(allowed)}"
            )
        suitable &= allowed
    if not suitable:
        *_, last = fault.options()
        raise ConfigError(f"{last[0]}: there is no operation that can have all of these effects")
    return named or suitable


def _named_operations(ops: str | Collection[str]) -> frozenset[str]:
    if ops == "all":
        return frozenset(OPS)
    names = ops.split("+") if isinstance(ops, str) and ops else ops
    for name in names:
        if name not in OPS:
            known = ", ".join(OPS)
            raise ConfigError(f"ops: {name!r} is not one; known are all or some of {known}")
    return frozenset(names)


def _joined(ops: Collection[str]) -> str:
    return "+".join(op for op in OPS if op in ops)


# --- options -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kind:
    """What values an option may have. `read`: one from an option's text, None if it is none."""

    what: str
    allows: Callable[[Any], bool]
    read: Callable[[str], Any] = str


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_seconds(value: object) -> bool:
    return _is_number(value) and 0 <= value < math.inf  # type: ignore[operator]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text_or(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read`, or the text itself if that fails, which then is refused as a value."""

    def convert(text: str) -> Any:  # noqa: ANN401
        try:
            return read(text)
        except (ValueError, ConfigError):
            return text

    return convert


def _at_least(minimum: int) -> Callable[[Any], bool]:
    return lambda value: _is_integer(value) and value >= minimum


SWITCHES = {"on": True, "yes": True, "true": True, "y": True,
            "off": False, "no": False, "false": False, "n": False}  # fmt: skip

_NUMBER = _text_or(int)
_SIZE = _text_or(parse_size)
_SECONDS = _Kind("a number of seconds", _is_seconds, _text_or(float))
_SWITCH = _Kind("on or off", lambda value: isinstance(value, bool),
                lambda text: SWITCHES.get(text, text))  # fmt: skip

KINDS: dict[str, _Kind] = {
    "ops": _Kind(
        "names of operations",
        lambda value: isinstance(value, (str, frozenset, set, list, tuple)),
    ),
    "offset": _Kind("an offset in bytes", _at_least(0), _SIZE),
    "length": _Kind("a length in bytes, at least 1", _at_least(1), _SIZE),
    "after": _Kind("a number of requests", _at_least(0), _NUMBER),
    "count": _Kind("a number of requests, at least 1", _at_least(1), _NUMBER),
    "probability": _Kind(
        "between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1, _text_or(float)
    ),
    "if-file": _Kind("a path", lambda value: isinstance(value, str) and value != ""),
    "error": _Kind(
        "the name of an error, as EIO or ENOSPC",
        lambda value: isinstance(value, str) and value[:1] == "E" and hasattr(errno, value),
    ),
    "delay": _SECONDS,
    "jitter": _SECONDS,
    "stuck": _SWITCH,
    "short": _Kind(
        f"a number of sectors, or {RANDOM}",
        lambda value: value == RANDOM or _at_least(0)(value),
        _NUMBER,
    ),
    "torn": _SWITCH,
    "silent": _SWITCH,
    "lost": _SWITCH,
    "flip-bits": _Kind("a number of bits, at least 1", _at_least(1), _NUMBER),
    "bps": _Kind("a number of bytes a second, at least 1", _at_least(1), _SIZE),
    "disconnect": _SWITCH,
}
"""The options of a fault."""


def parse_fault(options: Mapping[str, Scalar] | str, path: str = "") -> Fault:
    """A fault from options, or from them as the command line spells them.

    :param path: what stands before an option's name in an error, for example "faults.0.".
    :raises ConfigError: options that there are not, or that make no fault.
    """
    if isinstance(options, str):
        options = parse_keyval(options, "ops")
    values: dict[str, Any] = {}
    for option, value in options.items():
        kind = KINDS.get(option)
        if kind is None:
            raise ConfigError(f"{path}{option}: a fault has no such option")
        values[option.replace("-", "_")] = kind.read(value) if isinstance(value, str) else value
    try:
        return Fault(**values)
    except ConfigError as error:
        is_about_one = re.split("[: ]", str(error))[0] in KINDS
        raise ConfigError(f"{path if is_about_one else _title(path)}{error}") from None


def _title(path: str) -> str:
    return f"{path[:-1]}: " if path else ""


def parse_faults(options: Mapping[str, Scalar], path: str) -> tuple[Fault, ...]:
    """A list of faults from options as ``0.error``, in their order. Raises as `parse_fault`."""
    listed: dict[str, dict[str, Scalar]] = {}
    for key, value in options.items():
        number, _, option = key.partition(".")
        if not option:
            raise ConfigError(f"{path}{key}: a fault has options, as {path}{number}.error=EIO")
        listed.setdefault(number, {})[option] = value
    numbers = [str(number) for number in range(len(listed))]
    for number in numbers:
        if number not in listed:
            raise ConfigError(f"{path}{number} is missing: faults are numbered from 0")
    return tuple(parse_fault(listed[number], f"{path}{number}.") for number in numbers)
